from typing import Any, Literal, SupportsIndex, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from flashcpu.api import Flag, Real, Result, Scale, Tiles

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
        causal: Flag = True,
        scale: Scale = None,
        return_lse: Literal[False] = False,
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Tiles = None,
    ) -> Result: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        count: ArrayLike | None = None,
        causal: Flag = True,
        scale: Scale = None,
        return_lse: Literal[True],
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Tiles = None,
    ) -> tuple[Result, Real]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        count: ArrayLike | None = None,
        causal: Flag = True,
        scale: Scale = None,
        return_lse: Flag,
        out: NDArray[Any] | None = None,
        threads: SupportsIndex | None = None,
        tiles: Tiles = None,
    ) -> Result | tuple[Result, Real]: ...
