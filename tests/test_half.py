"""float16 and bfloat16: stored in 16 bits, computed in float32, rounded once to nearest even.

But bfloat16 on a CPU that has its dot products: those are taken of pairs of numbers, and weights
are rounded to bfloat16. There the budget is twice the error of the naive formula in float32 with
its result rounded.
"""

import numpy as np
import pytest
from checks import assert_same_bits, bits, misaligned, normal, odd_rows, root_mean_square

from flashcpu import attention, machine
from flashcpu.reference import oracle

SHAPES = [
    # q, k, v
    ((2, 4, 100, 64), (2, 2, 130, 64), (2, 2, 130, 32)),
    ((3, 60, 64), (3, 700, 64), (3, 700, 70)),
    ((1, 9, 1, 33), (1, 3, 1100, 33), (1, 3, 1100, 17)),
    ((2, 1), (5, 1), (5, 1)),
]


def widened(*arrays):
    return [x.astype(np.float32) for x in arrays]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_result_is_that_of_float32_rounded_once(shapes, causal, half_in_float32, rng):
    half = half_in_float32
    q, k, v = normal(rng, *shapes, dtype=half)
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    wide, wide_lse = attention(*widened(q, k, v), causal=causal, return_lse=True)
    assert out.dtype == half
    assert lse.dtype == np.float32
    assert_same_bits(out, wide.astype(half))
    assert_same_bits(lse, wide_lse)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_float32_queries_against_keys_and_values_in_16_bits(shapes, half, rng):
    (q,) = normal(rng, shapes[0])
    k, v = normal(rng, *shapes[1:], dtype=half)
    out = attention(q, k, v)
    assert out.dtype == np.float32
    assert_same_bits(out, attention(q, *widened(k, v)))


def test_the_error_is_that_of_rounding_the_result(half_in_float32, rng):
    half = half_in_float32
    q, k, v = normal(rng, (4, 50, 64), (4, 900, 64), (4, 900, 64), dtype=half)
    true = oracle(*(x.astype(np.float64) for x in (q, k, v)))[0]
    naive = oracle(*widened(q, k, v), dtype=np.float32)[0].astype(half)
    error, allowed = (np.abs(x.astype(np.float64) - true) for x in (attention(q, k, v), naive))
    assert error.max() <= 2 * allowed.max()


# q, k, v: depths 1 to 128, odd ones, odd lengths, grouped heads, many rows and few.
BUDGETED = [
    *SHAPES[:3],
    ((3, 50, 1), (3, 33, 1), (3, 33, 40)),
    ((2, 50, 2), (2, 65, 2), (2, 65, 3)),
    ((1, 6, 80, 127), (1, 2, 257, 127), (1, 2, 257, 16)),
    ((1, 12, 1, 128), (1, 1, 999, 128), (1, 1, 999, 128)),
    ((2, 3, 16), (2, 4001, 16), (2, 4001, 31)),
]
KINDS = {
    "normal": lambda q, k, v: (q, k, v),
    "coherent values": lambda q, k, v: (q, k, 100 + v),
    "peaked weights": lambda q, k, v: (12 * q, k, v),
    "flat weights": lambda q, k, v: (q / 100, k, v),
}


@pytest.mark.parametrize("shapes", BUDGETED, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_in_pairs_the_error_is_at_most_twice_that_of_rounding_the_result(
    shapes, causal, bfloat16_in_pairs, rng
):
    """Against float64, of the same stored numbers; that of the lse is one of a rounded weight."""
    half = bfloat16_in_pairs
    for kind in KINDS.values():
        q, k, v = (x.astype(half) for x in kind(*normal(rng, *shapes)))
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
        true, true_lse = oracle(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)
        naive = oracle(*widened(q, k, v), dtype=np.float32, causal=causal)[0].astype(half)
        error, allowed = (np.abs(x.astype(np.float64) - true) for x in (out, naive))
        assert error.max() <= 2 * allowed.max()
        assert root_mean_square(error) <= 2 * root_mean_square(allowed)
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(true_lse))
        seen = np.isfinite(true_lse)
        np.testing.assert_allclose(lse[seen], true_lse[seen], rtol=1e-6, atol=2.0**-9)


@pytest.mark.parametrize("rows", [1, 12, 50, 63])
def test_equal_values_are_the_result(rows, half, rng):
    """Whatever the weights were rounded to: their sum sums the same ones."""
    q, k = normal(rng, (rows, 33), (777, 33), dtype=half)
    for value in (1, 100, -3):
        assert (attention(3 * q, k, np.full((777, 5), value, half)) == value).all()


@pytest.mark.parametrize("rows", [1, 63])
def test_every_number_of_16_bits_is_read_and_written_exactly(rows, half):
    """One key: the result is its value, whatever it is. But subnormal ones: see below."""
    v = np.arange(2**16, dtype=np.uint16).view(half)
    q, k = np.zeros((rows, 1), half), np.zeros((1, 1), half)
    with np.errstate(all="ignore"):
        out = attention(q, k, v[None])
        size = np.abs(v.astype(np.float32))
    nan = np.isnan(size)
    number = ~nan
    # A sum of +0 and a product with a zero value is +0.
    number &= bits(v) != 0x8000
    if in_pairs(half):
        number &= (size == 0) | (size >= 2.0**-126)
    for row in (0, rows - 1):
        assert np.array_equal(bits(out[row])[number], bits(v)[number])
        assert np.isnan(out[row][nan].astype(np.float32)).all()


def in_pairs(dtype):
    """Whether it is computed with in pairs here."""
    return dtype.name == "bfloat16" and machine.arithmetic("bf16", "bf16", machine.isa()) == "bf16"


@pytest.mark.parametrize("rows", [1, 63])
def test_subnormal_values_in_bfloat16_are_exact_or_zero_and_never_off_by_2_to_minus_126(
    rows, bfloat16, rng
):
    """The dot products of CPUs take subnormal numbers for zeros, and give zeros for them."""
    q, k = normal(rng, (rows, 5), (71, 5), dtype=bfloat16)
    patterns = rng.integers(0, 0x80, (71, 9)) | rng.choice([0, 0x8000], (71, 9))
    v = patterns.astype(np.uint16).view(bfloat16)
    out = attention(q, k, v).astype(np.float64)
    true, _ = oracle(*(x.astype(np.float64) for x in (q, k, v)))
    assert (np.abs(true) < 2.0**-126).all()
    assert np.abs(out - true).max() < 2.0**-126
    # Nor do subnormal queries and keys change a score that can be seen.
    for tiny_q, tiny_k in ((q, v[:, :5]), (v[:rows, :5], k)):
        values = np.ones((71, 2), bfloat16)
        assert (attention(tiny_q, tiny_k, values) == 1).all()


def test_results_are_rounded_to_nearest_even(half, rng):
    """Equal weights, small integers for values: all that is rounded is the result, ties with it."""
    v = rng.integers(-255, 256, (64, 500))
    mean = v.sum(axis=0) / 64
    assert (mean.astype(half) != mean).any()
    for rows in (1, 63):
        out = attention(np.zeros((rows, 1), half), np.zeros((64, 1), half), v.astype(half))
        assert_same_bits(out, np.broadcast_to(mean.astype(half), out.shape).copy())


def test_results_of_any_size_are_rounded_to_nearest_even(half_in_float32, rng):
    half = half_in_float32
    v = rng.standard_normal((64, 200)).astype(np.float32)
    scale = np.exp2(rng.integers(-30, 16, v.shape)).astype(np.float32)
    q, k = np.zeros((1, 1), half), np.zeros((64, 1), half)
    with np.errstate(all="ignore"):
        v = (v * scale).astype(half)
        assert_same_bits(attention(q, k, v), attention(*widened(q, k, v)).astype(half))


def test_scores_that_overflow_the_16_bit_type_do_not_matter(half):
    q = np.full((1, 64), 200, half)
    k = np.stack([np.full(64, 200, half), np.full(64, 199, half)])
    v = np.array([[1.0], [2.0]], half)
    assert attention(q, k, v).astype(np.float32).item() == 1


@pytest.mark.parametrize("rows", [1, 12, 50, 63])
def test_scores_that_overflow_float32_are_infinite(rows, bfloat16):
    """-inf is no weight, and no key where all are; +inf is NaN."""
    q, k = np.full((rows, 3), 1e30, bfloat16), np.zeros((301, 3), bfloat16)
    v = np.ones((301, 2), bfloat16)
    k[:300] = -1e30
    v[:300] = 2
    out, lse = attention(q, k, v, return_lse=True)
    assert (out == 1).all()
    assert (lse == 0).all()
    out, lse = attention(q, k[:300], v[:300], return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    k[7] = 1e30
    assert np.isnan(attention(q, k, v).astype(np.float32)).all()


# Powers of two of q and k. Their products overflow, underflow, or fit float32; with the scale they
# are of ordinary size.
BROUGHT_BACK = [
    *((63, 63), (100, 26), (26, 100), (0, 120), (120, 0)),
    *((-64, -63), (-100, -26), (-26, -100), (0, -100), (-100, 0)),
]


@pytest.mark.parametrize("rows", [1, 12, 63])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("powers", BROUGHT_BACK, ids=str)
def test_powers_of_two_may_move_between_queries_keys_and_scale(powers, heads, rows, bfloat16, rng):
    """Not a bit changes: so a scale may bring back what overflows float32, or would be lost."""
    Hq, Hkv = heads
    q, k, v = normal(rng, (Hq, rows, 64), (Hkv, 300, 64), (Hkv, 300, 9), dtype=bfloat16)
    q, k, v = q[None], k[None], v[None]
    far = [np.ldexp(x.astype(np.float64), power) for x, power in zip((q, k), powers, strict=True)]
    far_q, far_k = (x.astype(bfloat16) for x in far)
    far_scale = 1.3 * 2.0 ** -sum(powers)
    out, lse = attention(far_q, far_k, v, scale=far_scale, causal=True, return_lse=True)
    for scale, sign in ((1.3, 1), (-1.3, -1)):
        near = attention(sign * q, k, v, scale=scale, causal=True, return_lse=True)
        assert_same_bits(out, near[0])
        assert_same_bits(lse, near[1])
    assert_same_bits(attention(-far_q, far_k, v, scale=-far_scale, causal=True), out)

    stored = [x.astype(np.float64) for x in (far_q, far_k, v)]
    true = oracle(*stored, scale=far_scale, causal=True)[0]
    naive = oracle(*widened(q, k, v), scale=1.3, causal=True, dtype=np.float32)[0].astype(bfloat16)
    error, allowed = (np.abs(x.astype(np.float64) - true) for x in (out, naive))
    assert error.max() <= 2 * allowed.max()

    for special in (np.inf, -np.inf, np.nan):
        far_q[0, 0, -1, 5] = special
        out = attention(far_q, far_k, v, scale=far_scale)
        wide = attention(*widened(far_q, far_k, v), scale=far_scale)
        np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), np.isnan(wide))


def test_how_keys_are_stored_decides_how_many_rows_are_few(isa):
    """f32 queries with f16 keys count as f16, whose prefill has to be widened."""
    _, lanes = machine.kernels("f32", "f16", isa)
    assert lanes.few_shares == machine.storage("f16", "f32", isa).few_shares
    assert lanes.few_shares != machine.storage("f32", "f32", isa).few_shares


@pytest.mark.parametrize("rows", [1, 12, 63])
def test_a_scale_that_float32_has_not_in_full_brings_products_back(rows, bfloat16):
    """Of a subnormal float: less exact, but all there."""
    q = np.full((rows, 1), 1e25, bfloat16)
    k, v = (np.array(x, bfloat16)[:, None] for x in ([0, 1e20, 1e20], [2, 1, 1]))
    assert (attention(q, k, v, scale=1e-40) == 1).all()
    assert (attention(q, -k, v, scale=-1e-40) == 1).all()


@pytest.mark.parametrize("rows", [1, 12, 63])
@pytest.mark.parametrize("scale", [0.0, -0.0, 5e-324, -1e-300, 1e-90])
def test_scores_of_zero_whatever_the_products(scale, rows, bfloat16, rng):
    q, k = (np.ldexp(x, 110).astype(bfloat16) for x in normal(rng, (rows, 33), (301, 33)))
    (v,) = normal(rng, (301, 5), dtype=bfloat16)
    assert_same_bits(attention(q, k, v, scale=scale), attention(0 * q, k, v, scale=1))
    q[0, 32] = np.inf  # 0 times infinity
    assert np.isnan(attention(q, k, v, scale=scale)[0].astype(np.float32)).all()


@pytest.mark.parametrize("rows", [1, 12, 63])
@pytest.mark.parametrize("payload", [0x7F81, 0x7FFF, 0xFF81])
def test_nan_in_16_bits_reaches_the_rows_that_see_it(payload, rows, half, rng):
    """Any payload: also those that a rounding of the upper half would make infinite."""
    q, k, v = normal(rng, (64, 17), (601, 17), (601, 16), dtype=half)
    q, first = q[:rows], 601 - rows // 2 - 1
    for array, column in ((k, 3), (k, 16), (v, 5)):
        array = array.copy()
        bits_of = array.view(np.uint16)
        bits_of[first, column] = payload if half.name == "bfloat16" else payload & 0x83FF | 0x7C00
        arrays = (q, array, v) if array.shape[1] == 17 else (q, k, array)
        out = attention(*arrays, causal=True).astype(np.float32)
        seeing = out[np.arange(rows) + 601 - rows >= first]
        assert np.isfinite(out[: rows - len(seeing)]).all()
        assert len(seeing) > 0
        if array.shape[1] == 17:
            assert np.isnan(seeing).all()
        else:
            np.testing.assert_array_equal(np.isnan(seeing).any(axis=0), np.arange(16) == 5)
            assert np.isnan(seeing[:, 5]).all()
    q = q.copy()
    q.view(np.uint16)[0, 16] = payload if half.name == "bfloat16" else payload & 0x83FF | 0x7C00
    out = attention(q, k, v).astype(np.float32)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("rows", [1, 12, 63])
def test_infinity_and_nan_are_where_float32_has_them(rows, half, rng):
    q, k, v = normal(rng, (rows, 9), (301, 9), (301, 60), dtype=half)
    at = rng.integers(0, 301, 30)
    v[at, np.arange(30)] = rng.choice([np.inf, -np.inf, np.nan], 30)
    v[at[:4], 40:44] = np.inf
    v[at[4:8], 40:44] = -np.inf  # both: NaN
    out = attention(q, k, v, causal=True).astype(np.float32)
    wide = attention(*widened(q, k, v), causal=True)
    assert np.isinf(wide).any()
    for what in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(what(out), what(wide))
    k[5, 3] = np.inf
    out = attention(q, k, v, causal=True).astype(np.float32)
    wide = attention(*widened(q, k, v), causal=True)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(wide))


def test_float32_is_what_bfloat16_is_computed_in_but_for_pairs(bfloat16):
    """Which calls are: those in which all numbers are bfloat16, where the CPU has it."""
    isa = machine.isa()
    expected = "bf16" if isa.endswith("_bf16") else "f32"
    assert machine.arithmetic("bf16", "bf16", isa) == expected
    for rows, stored in [("f32", "bf16"), ("f16", "f16"), ("f32", "f16"), ("f32", "f32")]:
        assert machine.arithmetic(rows, stored, isa) == "f32"
    assert machine.arithmetic("f64", "f64", isa) == "f64"


@pytest.mark.parametrize("D", [24, 33])
@pytest.mark.parametrize("rows", [1, 11, 40])
def test_strided_misaligned_and_big_endian(rows, D, half, rng):
    q, k, v = normal(rng, (rows, 3, D), (91, 3, D), (91, 3, 21), dtype=half)
    heads_first = [x.transpose(1, 0, 2) for x in (q, k, v)]
    expected = attention(*(np.ascontiguousarray(x) for x in heads_first))
    assert_same_bits(attention(*heads_first), expected)
    if half == np.float16:
        assert_same_bits(attention(*(x.astype(">f2") for x in heads_first)), expected)
    for arrays in ([odd_rows(x) for x in heads_first], [misaligned(x) for x in heads_first]):
        assert_same_bits(attention(*arrays), expected)
        assert_same_bits(attention(heads_first[0], *arrays[1:]), expected)
