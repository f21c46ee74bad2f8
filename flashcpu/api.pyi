from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashcpu._engine import Prepared
from flashcpu.problem import Problem

# float64, float32, float16, or the bfloat16 of ml_dtypes.
Result: TypeAlias = NDArray[Any]
Flag: TypeAlias = bool | np.bool_
Scale: TypeAlias = float | np.floating[Any] | np.integer[Any] | None
Tiles: TypeAlias = Sequence[SupportsIndex] | None
Real: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: Scale = None,
    causal: Flag = False,
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
    tiles: Tiles = None,
) -> Result: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: Scale = None,
    causal: Flag = False,
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
    tiles: Tiles = None,
) -> tuple[Result, Real]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: Scale = None,
    causal: Flag = False,
    window: None = None,
    mask: None = None,
    kv_len: ArrayLike | None = None,
    q_start: ArrayLike | None = None,
    softcap: None = None,
    alibi_slopes: None = None,
    sinks: None = None,
    return_lse: Flag,
    out: NDArray[Any] | None = None,
    threads: SupportsIndex | None = None,
    tiles: Tiles = None,
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
