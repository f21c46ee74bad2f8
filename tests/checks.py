"""What the tests mean by right and by the same: the error budget, equal bits, and layouts.

Right: the error is at most twice that of the naive formula in the same dtype, plus an ulp. The
error of a result is its root mean square over all elements. The largest one, which is that of one
unlucky row in either formula, may be four times the naive one's, plus four ulp. An ulp is one of
the largest sum of p |v|, which is what rounding acts on. The truth is the oracle in a wider type:
float64 for float32, long double for float64.

The naive formula is taken twice and the larger error counts: with NumPy's matmul, and with every
dot product of q and k summed term by term. BLAS may sum in as many short chains as a vector has
lanes, which depends on the machine and the shape, and errs less at large D; the contract of
flashcpu is one chain, which no kernel may cut.
"""

import numpy as np
import pytest

from flashcpu import attention
from flashcpu.reference import oracle
from flashcpu.reference.attention_oracle import share_heads


def root_mean_square(errors):
    return np.sqrt(np.mean(np.square(errors)))


# (error, factor of the naive one, ulps)
BUDGET = [(root_mean_square, 2, 1), (np.max, 4, 4)]
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}


def normal(rng, *shapes, dtype=np.float32):
    """Standard normal arrays, one a shape."""
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# Right


def assert_right(q, k, v, **options):
    """attention(q, k, v, **options) is within the budget, the lse too. Returns both."""
    out, lse = attention(q, k, v, return_lse=True, **options)
    assert_within_budget(out, lse, q, k, v, **options)
    return out, lse


def assert_within_budget(out, lse, q, k, v, **meaning):
    """out and lse are attention(q, k, v, **meaning), to rounding."""
    dtype = np.dtype(out.dtype)
    true_out, true_lse = oracle(q, k, v, dtype=WIDER[dtype], **meaning)
    naive_out, naive_lse = oracle(q, k, v, dtype=dtype, **meaning)
    out_errors = errors(out, true_out, dtype)
    lse_errors = errors(lse, true_lse, dtype)
    # What costs more to find out is found out only when it matters.
    if not fits(out_errors, [errors(naive_out, true_out)], ulp(true_out, dtype)):
        size = oracle(q, k, np.abs(v), dtype=dtype, **meaning)[0]
        naives = naive_out, naive_in_order(q, k, v, dtype, **meaning)[0]
        assert fits(out_errors, [errors(x, true_out) for x in naives], ulp(size, dtype)), "out"
    if not fits(lse_errors, [errors(naive_lse, true_lse)], ulp(true_lse, dtype)):
        naives = naive_lse, naive_in_order(q, k, v, dtype, **meaning)[1]
        assert fits(lse_errors, [errors(x, true_lse) for x in naives], ulp(true_lse, dtype)), "lse"


def errors(actual, true, dtype=None):
    """The errors where the truth is finite; elsewhere actual must be the truth."""
    assert actual.shape == true.shape
    finite = np.isfinite(true)
    if dtype:
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual[~finite], true[~finite].astype(dtype))
        assert np.isfinite(actual[finite]).all(), "not finite where the truth is"
    return np.abs(actual[finite] - true[finite])


def ulp(array, dtype):
    """That of the largest finite element."""
    finite = np.abs(array[np.isfinite(array)])
    return float(np.spacing(finite.max(initial=0).astype(dtype)))


def fits(errors, naives, ulp):
    """Whether errors are within the budget that those of the naive formulas give."""
    return not errors.size or all(
        error(errors) <= factor * max(error(naive) for naive in naives) + ulps * ulp
        for error, factor, ulps in BUDGET
    )


def naive_in_order(q, k, v, dtype, *, scale=None, **masks):
    """The naive formula in dtype with the terms of a score added one by one."""
    q, k = (np.asarray(x).astype(dtype) for x in (q, k))
    if max(q.ndim, k.ndim) > 3:
        k = share_heads(k, q.shape[-3])
    scores = np.zeros(
        (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2]), dtype
    )
    for d in range(q.shape[-1]):
        scores += q[..., :, None, d] * k[..., None, :, d]
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    # Scores are what the oracle sees when they are the queries and the unit vectors are the keys.
    return oracle(scores * dtype.type(scale), np.eye(k.shape[-2]), v, scale=1, dtype=dtype, **masks)


# The same

causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])


def both(q, k, v, **options):
    """(out, lse)"""
    return attention(q, k, v, return_lse=True, **options)


def assert_same(actual, expected):
    """Pairs (out, lse) of the same bits."""
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def assert_same_bits(actual, expected):
    """Equal bit for bit. Any NaN equals any NaN: their payloads are outside the contract."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differ = bits(actual) != bits(expected)
    differ &= ~(np.isnan(actual) & np.isnan(expected))
    if differ.any():
        first = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(
            f"{differ.sum()} of {differ.size} elements differ, first at {first}: "
            f"{actual[first]!r} and {expected[first]!r}"
        )


def bits(array):
    """The elements as unsigned integers."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


# Layouts


def spread(x, axis, padded):
    """A copy of x in which axis is embedded in `padded` elements: a larger stride before it."""
    shape = list(x.shape)
    shape[axis] = padded
    room = np.full(shape, np.nan, x.dtype)  # what is not x must never be read
    view = np.moveaxis(np.moveaxis(room, axis, 0)[: x.shape[axis]], 0, axis)
    view[...] = x
    return view


def misaligned(x):
    """A copy of x one byte beside its alignment."""
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = np.ndarray(x.shape, x.dtype, memory.data, offset=1)
    view[...] = x
    assert not view.flags.aligned
    return view


def odd_rows(x):
    """A copy whose rows begin at odd elements and an odd number of them apart, NaN between."""
    padded = np.concatenate([x[..., :1], x], axis=-1)
    view = spread(padded, -1, padded.shape[-1] + 1 + padded.shape[-1] % 2)[..., 1:]
    assert view.strides[-2] // view.itemsize % 2 == 1
    return view


def reversed_in_memory(x, axis):
    """A copy of x with a negative stride."""
    return np.flip(np.flip(x, axis).copy(), axis)


# (..., H, L, D) arrays of the same elements; all but those of COPIED are read where they lie.
LAYOUTS = {
    "heads between lengths and depth": lambda x: x.swapaxes(-3, -2).copy().swapaxes(-3, -2),
    "batch inside": lambda x: np.moveaxis(np.moveaxis(x, 0, -2).copy(), -2, 0),
    "padded rows": lambda x: spread(x, -1, x.shape[-1] + 3),
    "rows a page apart": lambda x: spread(x, -1, 4096 // x.itemsize),
    "rows four pages apart": lambda x: spread(x, -1, 16384 // x.itemsize),
    "rows a page apart, backwards": lambda x: np.flip(
        spread(np.flip(x, -2), -1, 4096 // x.itemsize), -2
    ),
    "rows backwards": lambda x: reversed_in_memory(x, -2),
    "heads backwards": lambda x: reversed_in_memory(x, -3),
    "batch backwards": lambda x: reversed_in_memory(x, 0),
    "read-only": lambda x: np.broadcast_to(x.copy(), x.shape),
    "Fortran order": np.asfortranarray,
    "depth backwards": lambda x: reversed_in_memory(x, -1),
    "every second column": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "misaligned": misaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}
COPIED = ("Fortran order", "depth backwards", "every second column", "misaligned", "big-endian")
