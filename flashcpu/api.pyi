from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashcpu._engine import Prepared
from flashcpu.problem import Problem

# float64, float32, float16, or the bfloat16 of ml_dtypes.
Result: TypeAlias = NDArray[Any]
Real: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | np.floating[Any] | np.integer[Any] | None = None,
    causal: bool | np.bool_ = False,
    window: None = None,
    mask: None = None,
    kv_len: ArrayLike | None = None,
    q_start: ArrayLike | None = None,
    softcap: None = None,
    alibi_slopes: None = None,
    sinks: None = None,
    return_lse: Literal[False] = False,
    out: NDArray[Any] | None = None,
    threads: SupportsIndex | None = None,
    tiles: Sequence[SupportsIndex] | None = None,
) -> Result: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | np.floating[Any] | np.integer[Any] | None = None,
    causal: bool | np.bool_ = False,
    window: None = None,
    mask: None = None,
    kv_len: ArrayLike | None = None,
    q_start: ArrayLike | None = None,
    softcap: None = None,
    alibi_slopes: None = None,
    sinks: None = None,
    return_lse: Literal[True],
    out: NDArray[Any] | None = None,
    threads: SupportsIndex | None = None,
    tiles: Sequence[SupportsIndex] | None = None,
) -> tuple[Result, Real]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | np.floating[Any] | np.integer[Any] | None = None,
    causal: bool | np.bool_ = False,
    window: None = None,
    mask: None = None,
    kv_len: ArrayLike | None = None,
    q_start: ArrayLike | None = None,
    softcap: None = None,
    alibi_slopes: None = None,
    sinks: None = None,
    return_lse: bool | np.bool_,
    out: NDArray[Any] | None = None,
    threads: SupportsIndex | None = None,
    tiles: Sequence[SupportsIndex] | None = None,
) -> Result | tuple[Result, Real]: ...
def prepare(
    asked: Problem,
    out_strides: tuple[int, ...],
    kv_len: int | tuple[int, ...],
    q_start: int | tuple[int, ...] | None,
    tiles: tuple[int, int] | None,
    threads: int,
    isa: str,
) -> Prepared: ...
