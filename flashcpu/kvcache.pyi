from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

class KVCache:
    def __init__(
        self,
        batch: SupportsIndex,
        heads: SupportsIndex,
        depth: SupportsIndex,
        value_depth: SupportsIndex | None = None,
        *,
        dtype: DTypeLike | None = ...,
        capacity: SupportsIndex | None = None,
        window: SupportsIndex | None = None,
    ) -> None: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def start(self) -> NDArray[np.int64]: ...
    @property
    def keys(self) -> NDArray[Any]: ...
    @property
    def values(self) -> NDArray[Any]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def window(self) -> int | None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def append(self, k: ArrayLike, v: ArrayLike, count: ArrayLike | None = None) -> None: ...
    def truncate(self, length: ArrayLike) -> None: ...
    def rewind(self, count: ArrayLike) -> None: ...
    def clear(self) -> None: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        count: ArrayLike | None = None,
        causal: bool | np.bool_ = True,
        scale: float | np.floating[Any] | np.integer[Any] | None = None,
        return_lse: Literal[False] = False,
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Sequence[SupportsIndex] | None = None,
    ) -> NDArray[Any]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        count: ArrayLike | None = None,
        causal: bool | np.bool_ = True,
        scale: float | np.floating[Any] | np.integer[Any] | None = None,
        return_lse: Literal[True],
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Sequence[SupportsIndex] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        count: ArrayLike | None = None,
        causal: bool | np.bool_ = True,
        scale: float | np.floating[Any] | np.integer[Any] | None = None,
        return_lse: bool | np.bool_,
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Sequence[SupportsIndex] | None = None,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
