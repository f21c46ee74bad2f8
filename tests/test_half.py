"""float16 and bfloat16: stored in 16 bits, computed in float32, rounded once to nearest even.

Where the CPU multiplies bfloat16 in pairs and all numbers are bfloat16, weights are rounded too,
and numbers below 2^-126 count as zero; there results are near those of float32, not equal.
"""

import numpy as np
import pytest
from checks import assert_same_bits, normal

from flashcpu import attention
from flashcpu.reference import oracle

pytestmark = pytest.mark.usefixtures("isa_of_bf16")


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request):
    if request.param == "float16":
        return np.dtype(np.float16)
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.fixture
def half(dtype, isa_of_bf16):
    return dtype


@pytest.fixture
def in_pairs(half, isa_of_bf16):
    """Whether calls with nothing but this dtype multiply in pairs."""
    return half.name == "bfloat16" and isa_of_bf16.endswith("_bf16")


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
def test_the_result_is_that_of_float32_rounded_once(shapes, causal, half, in_pairs, rng):
    if in_pairs:
        pytest.skip("weights are rounded")
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


def test_the_error_is_that_of_rounding_the_result(half, rng):
    q, k, v = normal(rng, (4, 50, 64), (4, 900, 64), (4, 900, 64), dtype=half)
    true = oracle(*(x.astype(np.float64) for x in (q, k, v)))[0]
    naive = oracle(*widened(q, k, v), dtype=np.float32)[0].astype(half)
    error, allowed = (np.abs(x.astype(np.float64) - true) for x in (attention(q, k, v), naive))
    assert error.max() <= 2 * allowed.max()


@pytest.mark.parametrize("rows", [1, 50])
def test_every_number_of_16_bits_is_read_and_written_exactly(rows, half, in_pairs):
    """One key: the result is its value, whatever it is. In pairs, but for subnormal numbers."""
    v = np.arange(2**16, dtype=np.uint16).view(half)
    q, k = np.zeros((rows, 1), half), np.zeros((1, 1), half)
    with np.errstate(all="ignore"):
        out = attention(q, k, v[None])
    nan = np.isnan(v.astype(np.float32))
    number = ~nan
    # A sum of +0 and a product with a zero value is +0.
    number &= v.view(np.uint16) != 0x8000
    if in_pairs:
        number &= (v.view(np.uint16) & 0x7F80) != 0
        assert (
            np.abs(out.astype(np.float64))[:, (v.view(np.uint16) & 0x7F80) == 0] < 2**-126
        ).all()
    for row in (0, rows - 1):
        assert np.array_equal(out[row].view(np.uint16)[number], v.view(np.uint16)[number])
        assert np.isnan(out[row][nan].astype(np.float32)).all()


def test_results_are_rounded_to_nearest_even(half, in_pairs, rng):
    """64 weights of 1 are exact in every arithmetic."""
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


def test_nan_in_16_bits_reaches_the_rows_that_see_it(half, rng):
    q, k, v = normal(rng, (60, 16), (60, 16), (60, 16), dtype=half)
    k.view(np.uint16)[30, 3] = 0x7FFF  # all payload bits
    out = attention(q, k, v, causal=True).astype(np.float32)
    assert np.isfinite(out[:30]).all()
    assert np.isnan(out[30:]).all()


def test_strided_misaligned_and_big_endian(half, rng):
    q, k, v = normal(rng, (40, 3, 24), (90, 3, 24), (90, 3, 24), dtype=half)
    heads_first = [x.transpose(1, 0, 2) for x in (q, k, v)]
    expected = attention(*(np.ascontiguousarray(x) for x in heads_first))
    assert_same_bits(attention(*heads_first), expected)
    if half == np.float16:
        assert_same_bits(attention(*(x.astype(">f2") for x in heads_first)), expected)


def assert_twice_as_good_as_numpy(out, q, k, v, causal=False):
    """Error at most twice that of NumPy in float32 on the same numbers, rounded likewise."""
    true = oracle(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)[0]
    naive = oracle(*widened(q, k, v), dtype=np.float32, causal=causal)[0].astype(out.dtype)
    error, allowed = (np.abs(x.astype(np.float64) - true) for x in (out, naive))
    ulp = np.abs(true).max() * 2.0**-9 if out.dtype.name == "bfloat16" else 2.0**-12
    assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((allowed**2).mean()) + 1e-3 * ulp
    assert error.max() <= 2 * allowed.max() + 1e-3 * ulp


@pytest.mark.parametrize("shapes", SHAPES[:3], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1, 10], ids=["flat", "normal", "peaked"])
@pytest.mark.parametrize("mean", [0, 100])
def test_the_error_is_at_most_twice_that_of_numpy(shapes, causal, spread, mean, half, rng):
    q, k, v = normal(rng, *shapes)
    q, k, v = (x.astype(half) for x in (q * np.float32(spread), k, v + np.float32(mean)))
    out = attention(q, k, v, causal=causal, q_start=None)
    assert_twice_as_good_as_numpy(out, q, k, v, causal)


def test_values_of_one_give_exactly_one(half, rng):
    for rows, keys in [(1, 1), (3, 301), (60, 700), (13, 64)]:
        q, k = normal(rng, (rows, 40), (keys, 40), dtype=half)
        assert (attention(q, k, np.ones((keys, 5), half)) == 1).all()


@pytest.mark.parametrize("rows", [1, 12, 50])
@pytest.mark.parametrize("kv_len", [1, 63, 64, 101, 257])
def test_nothing_behind_an_odd_end_is_seen(rows, kv_len, half, rng):
    """The last key of an odd number stands alone in its pair."""
    q, k, v = normal(rng, (rows, 33), (300, 33), (300, 17), dtype=half)
    expected = attention(q, k[:kv_len].copy(), v[:kv_len].copy(), causal=True)
    for garbage in (np.nan, np.inf):
        k[kv_len:], v[kv_len:] = garbage, -garbage
        assert_same_bits(attention(q, k, v, kv_len=kv_len, causal=True), expected)
        assert_same_bits(attention(q, k, v, q_start=kv_len - rows, causal=True), expected)


@pytest.mark.parametrize("tiles", [(1, 1), (16, 64), (60, 192), (1000, 1000)])
def test_any_tiles_and_any_chunks(tiles, half, rng):
    q, k, v = normal(rng, (2, 130, 33), (2, 601, 33), (2, 601, 17), dtype=half)
    whole = attention(q, k, v, causal=True)
    assert_same_bits(attention(q, k, v, causal=True, tiles=tiles, threads=2), whole)
    for first, end in [(0, 1), (5, 18), (40, 100), (100, 130)]:
        part = attention(q[:, first:end], k, v, causal=True, q_start=601 - 130 + first)
        assert_same_bits(part, whole[:, first:end])
