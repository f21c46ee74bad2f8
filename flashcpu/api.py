"""`attention`: check (problem.py), plan (plan.py), run (_engine.pyx).

What was asked before (_question.pyx) is not checked again.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flashcpu import _engine, machine, plan, problem
from flashcpu import threads as threading_
from flashcpu._question import Question


def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=None,
    mask=None,
    kv_len=None,
    q_start=None,
    softcap=None,
    alibi_slopes=None,
    sinks=None,
    return_lse=False,
    out=None,
    threads=None,
    tiles=None,
):
    """Exact attention, ``softmax(scale * q @ k.T) @ v``, streamed tile by tile.

    The Lq x Lkv matrix of scores never exists: beside the result a call needs a few hundred KiB a
    thread (for D up to 128; more in proportion), whatever Lq and Lkv. The bits of a row of the
    result do not depend on the number of threads, the other rows, heads and members of the batch,
    strides, alignment or tiles.

    Parameters
    ----------
    q : (..., Hq, Lq, D) array, float64, float32, float16 or bfloat16
        Queries. Where none of q, k and v has more than 3 axes also (B, Lq, D) and (Lq, D), without
        heads; else axes are missing in front, as NumPy broadcasts. bfloat16 is the dtype of
        ml_dtypes. 16-bit numbers are computed with in float32, and the result is rounded once.
        Where the CPU has dot products of bfloat16 and all of q, k and v are bfloat16, they are
        used: then weights are rounded to bfloat16 too, the lse within 2**-9 is that of the rounded
        ones, numbers below 2**-126 count as 0 and such products may, and scores from 2**100 on may
        count as infinite.
    k : (..., Hkv, Lkv, D) array, of the dtype of q; of 16 bits also with q float32
        Keys. Hq must be a multiple of Hkv; consecutive groups of Hq / Hkv query heads share a KV
        head.
    v : (..., Hkv, Lkv, Dv) array, of the dtype of k
        Values. Leading axes of q, k and v broadcast, without copies. Arrays whose last axis has
        unit stride are read where they lie; others are copied once.
    scale : float, default 1 / sqrt(D)
        Factor of the scores.
    causal : bool
        Query i stands at position q_start + i and sees the keys j <= its position. With 2 queries
        and 5 keys, and with 5 queries and 2 keys (x: seen)::

            q_start = 3 (default)     q_start = 0
            x x x x .                 x . . . .
            x x x x x                 x x . . .

            q_start = -3 (default)    q_start = 0
            . .                       x .
            . .                       x x
            . .                       x x
            x .                       x x
            x x                       x x

    kv_len : int or (B,) integers, default Lkv
        How many keys each member of the batch has; keys and values from there on are never read.
        B stands for the broadcast leading axes. A tuple is known again at the next call, as of the
        next layer; a list or an array is checked each time.
    q_start : int or (B,) integers, default kv_len - Lq
        Position of the first query. The default is that of a KV cache: the last query sees
        all keys. Without causal it has no effect.
    return_lse : bool
        Return also the natural logarithm of each row's softmax denominator.
    out : (..., Hq, Lq, Dv) array, optional
        Where to write the result. It may overlap the inputs.
    threads : int, optional
        Largest number of threads. Default: what OpenMP says at the time of the call
        (OMP_NUM_THREADS, threadpoolctl), within the affinity and the cgroup quota of the process.
    tiles : (int, int), optional
        Query rows and keys of a cache tile, rounded to what the kernels need. Never changes a bit
        of the result.
    window, mask, softcap, alibi_slopes, sinks
        Not supported yet; NotImplementedError unless None.

    Returns
    -------
    out : (..., Hq, Lq, Dv) array, of the dtype of q
        A row that sees no key is 0, also when Lkv = 0.
    lse : (..., Hq, Lq) array, float32, or float64 for float64
        Only with return_lse. A row that sees no key has -inf.

    Raises
    ------
    ValueError
        For shapes or numbers that do not fit; the message has the shapes.
    TypeError
        For other dtypes, other mixtures of them, masked arrays, and options of the wrong type.
    NotImplementedError
        For the arguments above.
    MemoryError
        If there is no memory for the result or the scratch.

    Notes
    -----
    NaN in a key or value reaches the rows that see it, and no others; a score of +inf gives NaN. A
    row whose scores are all -inf counts as one that sees no key.
    Scores of 2**127 or more (float64: 2**1023), a query times the scale beyond the arithmetic, and
    values of 2**128 / Lkv or more (2**1024 / Lkv) may count as infinite, and give NaN: weighted
    values are summed before they are divided by the sum of the weights.
    Weights below 2**-126 (float64: 2**-1022) of the row's largest count as 0.

    References
    ----------
    Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022), algorithm 1; Milakov, Gimelshein: Online
    normalizer calculation for softmax (2018). `flashcpu.reference` derives the method step by step.

    Examples
    --------
    >>> import numpy as np
    >>> from flashcpu import attention
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 100, 64), np.float32)
    >>> k = rng.standard_normal((1, 2, 100, 64), np.float32)  # 4 query heads share a KV head
    >>> v = rng.standard_normal((1, 2, 100, 64), np.float32)
    >>> attention(q, k, v, causal=True).shape
    (1, 8, 100, 64)
    >>> last = attention(q[:, :, 99:], k, v, causal=True)  # one step of decoding
    >>> bool((last == attention(q, k, v, causal=True)[:, :, 99:]).all())
    True
    """
    if not (window is mask is softcap is alibi_slopes is sinks is None):
        problem.refuse(
            window=window, mask=mask, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks
        )
    isa = machine.isa()
    for known in _known:
        if known.question.is_asked(q, k, v, scale, causal, kv_len, q_start, tiles, threads, isa):
            break
    else:
        q, k, v, known = understand(q, k, v, scale, causal, kv_len, q_start, tiles, threads, isa)
    if known.alone is not None and out is None and return_lse is False:
        return known.alone.attend(q, k, v)
    if return_lse is not True and return_lse is not False:
        return_lse = problem.flag(return_lse, "return_lse")
    asked = known.asked
    result = out if out is None else problem.output(out, asked, q.dtype)
    if result is None or problem.needs_own_memory(result, q, k, v):
        result = np.empty(asked.out_shape, q.dtype)  # before a plan: it may be what cannot be had
    lse = np.empty(asked.lse_shape, asked.lse_dtype) if return_lse else None

    if 0 in asked.lse_shape:
        result = result if out is None else out
        return (result, lse) if return_lse else result

    most = threading_.limit(known.threads) if known.is_worth_threads else 1
    call = known.prepare(asked, result.strides, known.kv_len, known.q_start, known.tiles, most, isa)
    threading_.run(call.attend, (q, k, v, result, lse), call.threads)
    if out is not None and result is not out:
        out[...] = result
        result = out
    return (result, lse) if return_lse else result


class Known(NamedTuple):
    """A question, and what was found out about it before any number was read."""

    question: Question
    asked: problem.Problem
    kv_len: int | tuple
    q_start: int | tuple | None
    tiles: tuple | None
    threads: int | None
    prepare: Callable
    is_worth_threads: bool
    # The call, where one thread has it and makes its result: few steps from Python to the kernels
    # and back, for between two layers each of them has left the caches. 9 heads over 3, 2048 keys,
    # D = 64, on Ice Lake: 26 of 315 us, 0.95 of the time in all so; a tiny call 3.2 us, so 2.1.
    alone: _engine.Prepared | None


# The last questions that could be remembered, the latest first: a model asks them again for each of
# its layers, of which there may be kinds, such as with and without a window.
_known = ()
KINDS = 4
# Options that stay what they are, and tuples of them. A list or an array of lengths may hold others
# when it is seen again.
CONSTANT = {type(None), bool, int, float}


def is_constant(option):
    return type(option) in CONSTANT or (
        type(option) is tuple and CONSTANT.issuperset(map(type, option))
    )


def understand(q, k, v, scale, causal, kv_len, q_start, tiles, threads, isa):
    """The arrays as the kernels can read them, and what is Known; raises as `attention` does."""
    global _known
    given, options = (q, k, v), (scale, causal, kv_len, q_start, tiles, threads)
    q, k, v = problem.operand(q, "q"), problem.operand(k, "k"), problem.operand(v, "v")
    factor, causal = problem.scale_factor(scale), problem.flag(causal, "causal")
    asked = problem.of(q, k, v, factor, causal)
    far = problem.FARTHEST
    kv_len = problem.per_member(kv_len, "kv_len", asked.lead, asked.Lkv, 0, asked.Lkv)
    q_start = problem.per_member(q_start, "q_start", asked.lead, None, -far, far)
    longest = kv_len if isinstance(kv_len, int) else max(kv_len)
    if not all(map(problem.is_readable, (q, k, v))):
        # What stands behind kv_len is not read, by a copy neither.
        q, k, v = map(problem.readable, (q, k[..., :longest, :], v[..., :longest, :]))
        asked = problem.of(q, k, v, factor, causal)
    tiles, threads = problem.tile_sizes(tiles), problem.thread_count(threads)
    is_small, is_worth_threads = plan.is_small(asked, longest), plan.is_worth_threads(asked, kv_len)
    alone = None
    if is_small and 0 not in asked.lse_shape and (threads == 1 or not is_worth_threads):
        strides = np.empty(asked.out_shape, q.dtype).strides
        alone = prepare_once(asked, strides, kv_len, q_start, tiles, 1, isa)
    known = Known(
        Question(q, k, v, (*options, isa)),
        asked,
        kv_len,
        q_start,
        tiles,
        threads,
        prepare_once if is_small else prepare,
        is_worth_threads,
        alone,
    )
    # What is copied, or no array as any other, is never known again.
    if all(map(is_constant, options)) and known.question.is_asked(*given, *options, isa):
        _known = (known, *_known[: KINDS - 1])
    return q, k, v, known


def prepare(asked, out_strides, kv_len, q_start, tiles, threads, isa):
    """The call for a Problem: planned, for a result with these strides, on an instruction set."""
    kernels, lanes = machine.kernels(asked.rows, asked.stored, isa)
    strides = asked.result_strides(out_strides)
    return _engine.Prepared(
        kernels,
        machine.storage(asked.rows, lanes.arithmetic, isa),
        machine.storage(asked.stored, lanes.arithmetic, isa),
        (*asked.q_strides, *asked.k_strides, *asked.v_strides, *strides[-2:]),
        (asked.Hq, asked.group, asked.Lq, asked.D, asked.Dv),
        plan.cut(asked, lanes, strides, kv_len, q_start, tiles, threads),
        asked.scale * problem.LOG2_E,
        asked.causal,
        asked.out_shape,
    )


# Planning again would be felt where little is computed: see plan.is_small.
prepare_once = lru_cache(maxsize=256)(prepare)
