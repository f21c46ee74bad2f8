"""Few query rows against many keys: other kernels (decode.inc), the same bits as in a prefill."""

import numpy as np
import pytest
from checks import assert_same_bits, normal

from flashcpu import _engine, attention, machine, plan
from flashcpu import problem as problem_

pytestmark = pytest.mark.usefixtures("isa_of_bf16")

ROWS = 60
DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture(params=DTYPES)
def dtype(request):
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)


# Hq, Hkv, D, Dv, Lkv: one head a group and several, depths with and without tails, span borders.
PROBLEMS = [(4, 4, 64, 64, 300), (9, 3, 64, 64, 513), (8, 1, 17, 9, 700), (4, 2, 128, 80, 1030)]
PROBLEMS += [(2, 2, 1, 1, 100), (6, 2, 33, 70, 256), (1, 1, 3, 200, 60), (12, 1, 16, 24, 257)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_decode_row_is_the_prefill_row(problem, causal, dtype, rng):
    Hq, Hkv, D, Dv, L = problem
    shapes = (2, Hq, ROWS, D), (2, Hkv, L, D), (2, Hkv, L, Dv)
    q, k, v = normal(rng, *shapes, dtype=dtype)
    whole, whole_lse = attention(q, k, v, causal=causal, return_lse=True)
    for first, count in [(59, 1), (30, 1), (0, 1), (57, 2), (56, 4), (52, 8), (47, 13), (20, 3)]:
        at = slice(first, first + count)
        out, lse = attention(
            q[:, :, at], k, v, causal=causal, q_start=L - ROWS + first, return_lse=True
        )
        assert_same_bits(out, whole[:, :, at])
        assert_same_bits(lse, whole_lse[:, :, at])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_nothing_behind_kv_len_or_the_diagonal_is_seen(rows, dtype, rng):
    q, k, v = normal(rng, (2, rows, 20), (2, 150, 20), (2, 150, 20), dtype=dtype)
    expected = attention(q, k[:, :100], v[:, :100], causal=True)
    k[:, 100:], v[:, 100:] = np.nan, np.inf
    assert_same_bits(attention(q, k, v, kv_len=100, causal=True), expected)
    assert_same_bits(attention(q, k, v, q_start=100 - rows, causal=True), expected)


def test_nan_and_infinity_reach_the_row_that_sees_them(rng):
    q, k, v = normal(rng, (4, 8), (300, 8), (300, 8))
    v[299] = np.nan  # only the last of four rows sees it
    out = attention(q, k, v, causal=True)
    assert np.isfinite(out[:3]).all()
    assert np.isnan(out[3]).all()
    k[0, 0] = np.nan
    assert np.isnan(attention(q, k, v)).all()


@pytest.mark.parametrize("rows", [1, 60])
def test_a_nan_value_under_scores_of_minus_infinity_goes_on(rows):
    """Its weight is 0, and 0 NaN is NaN; also when its whole span weighs nothing."""
    q, k, v = np.ones((rows, 1)), np.zeros((700, 1)), np.ones((700, 2))
    k[:300], v[5, 0] = -np.inf, np.nan
    out = attention(q, k, v)
    assert np.isnan(out[:, 0]).all()
    assert (out[:, 1] == 1).all()


def test_a_row_that_sees_no_key_is_zero(dtype):
    k = v = np.ones((0, 5), dtype)
    out, lse = attention(np.ones((1, 5), dtype), k, v, return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_instruction_sets_with_fma_agree(dtype, rng):
    """Where bfloat16 is multiplied in pairs, it is another answer, and says so in its name."""
    fused = [name for name in machine.ISAS if name != "scalar" and not name.endswith("_bf16")]
    q, k, v = normal(rng, (1, 6, 1, 72), (1, 2, 600, 72), (1, 2, 600, 40), dtype=dtype)
    results = []
    for name in fused:
        with machine.use_isa(name):
            results.append(attention(q, k, v))
    for other in results[1:]:
        assert_same_bits(other, results[0])


# Hq, Hkv, Lq, Lkv, D: one strip and several, few rows and many, tails of spans.
CHAINS = [(1, 1, 1, 20_000, 16), (12, 1, 1, 9001, 8), (4, 2, 3, 5000, 33), (1, 1, 20, 9000, 16)]
CHAINS += [(3, 1, 40, 4100, 16)]


@pytest.mark.parametrize("problem", CHAINS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_cut_between_threads_give_the_same_bits(problem, causal, dtype, rng):
    Hq, Hkv, Lq, Lkv, D = problem
    q, k, v = normal(rng, (1, Hq, Lq, D), (1, Hkv, Lkv, D), (1, Hkv, Lkv, D), dtype=dtype)
    expected = attention(q, k, v, causal=causal, return_lse=True, threads=1)
    for threads in (2, 3, 5):
        actual = attention(q, k, v, causal=causal, return_lse=True, threads=threads)
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_members_of_very_different_lengths_share_their_threads(rows, dtype, rng):
    lengths = [0, 1, 255, 20_000, 257]
    q, k, v = normal(rng, (5, rows, 32), (5, 20_000, 32), (5, 20_000, 32), dtype=dtype)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = np.nan
    whole = attention(q, k, v, kv_len=lengths, causal=True, threads=2)
    for b, length in enumerate(lengths):
        alone = attention(q[b], k[b, :length], v[b, :length], causal=True, threads=1)
        assert_same_bits(whole[b], alone)


def test_scratch_does_not_depend_on_the_number_of_keys():
    sizes = set()
    for Lkv in (10**5, 10**6):
        shapes = (1, 8, 1, 64), (1, 8, Lkv, 64), (1, 8, Lkv, 64)
        strides = [tuple(4 * int(np.prod(shape[i + 1 :])) for i in range(4)) for shape in shapes]
        asked = problem_.describe((np.dtype(np.float32),) * 3, shapes, tuple(strides), None, False)
        kernels, lanes = machine.kernels(asked.rows, asked.stored, machine.isa())
        cut = plan.cut(asked, lanes, asked.result_strides(strides[0]), Lkv, None, None)
        sizes.add((cut.chains, _engine.workspace_bytes(kernels, 64, 64, cut[:6])))
    assert len(sizes) == 1
