"""The reference ladder: every step says the same as the naive one, at every edge.

Warnings count as errors in this file too, so a stray inf - inf is a failure.
"""

import doctest
import importlib
import math
import pkgutil
from functools import reduce

import numpy as np
import pytest

from flashcpu import reference
from flashcpu.reference import (
    empty_state,
    finish_state,
    flash_attention,
    flash_attention_algorithmic,
    merge_states,
    naive_attention,
    oracle,
    partial_state,
    ref_softmax,
    safe_online_softmax,
    safe_softmax,
    single_element_naive,
    single_element_V0,
    single_element_V1,
    single_element_V2,
    visible_keys,
)

pytestmark = pytest.mark.filterwarnings("error")

INF, NAN = float("inf"), float("nan")
SOFTMAXES = [safe_softmax, ref_softmax, safe_online_softmax]
ELEMENTS = [single_element_naive, single_element_V0, single_element_V1, single_element_V2]
TILED = [flash_attention, flash_attention_algorithmic]
WHOLE = [naive_attention, *TILED]

every_softmax = pytest.mark.parametrize("softmax", SOFTMAXES)
every_element = pytest.mark.parametrize("element", ELEMENTS)
every_tiled = pytest.mark.parametrize("tiled", TILED)
every_whole = pytest.mark.parametrize("attention", WHOLE)


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def normal(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(actual, expected, tolerance=1e-13):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Softmax of a vector


@every_softmax
def test_softmax_is_the_textbook_formula(softmax, rng):
    for L in (1, 2, 16, 100):
        s = rng.standard_normal(L)
        weights = [math.exp(x) for x in s]
        assert_close(softmax(s), np.array(weights) / math.fsum(weights), 1e-15)


@every_softmax
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_softmax_does_not_overflow(softmax, order):
    s = np.array([-2000.0, 1000.0, 1001.0])
    p = np.array([0.0, 1 / (1 + math.e), math.e / (1 + math.e)])
    assert_close(softmax(s[order]), p[order], 1e-15)


@every_softmax
@pytest.mark.parametrize("L", [0, 1, 10])
def test_softmax_of_only_minus_infinity_is_zero(softmax, L):
    np.testing.assert_array_equal(softmax(np.full(L, -INF)), np.zeros(L))


@every_softmax
def test_softmax_of_an_empty_vector_is_empty(softmax):
    assert softmax([]).shape == (0,)


@every_softmax
@pytest.mark.parametrize("place", [0, 1, 4])
def test_softmax_gives_a_score_of_minus_infinity_no_weight(softmax, place, rng):
    s = rng.standard_normal(4)
    assert_close(softmax(np.insert(s, place, -INF)), np.insert(softmax(s), place, 0.0), 1e-15)


@every_softmax
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("rest", [[], [1.0, 2.0], [1000.0], [-INF], [-INF, 1000.0]])
def test_softmax_of_nan_or_plus_infinity_is_nan(softmax, bad, rest):
    for place in range(len(rest) + 1):
        assert np.isnan(softmax([*rest[:place], bad, *rest[place:]])).all()


# One element of the output


@every_element
@pytest.mark.parametrize("Lkv", [1, 2, 32])
def test_element_is_one_number_of_whole_attention(element, Lkv, rng):
    q_row, k_t, v_col = normal(rng, (4,), (4, Lkv), (Lkv,))
    out = naive_attention(q_row[None, None], k_t.T[None], v_col[None, :, None])
    assert_close(element(q_row, k_t, v_col), out[0, 0, 0])


def test_dropping_p_changes_no_bit(rng):
    for _ in range(20):
        case = normal(rng, (4,), (4, 32), (32,))
        assert single_element_V0(*case) == single_element_naive(*case)


@every_element
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_element_does_not_overflow(element, order):
    k_t, v_col = np.array([[-2000.0, 1000.0, 1001.0]]), np.array([5.0, 0.0, 1.0])
    assert_close(element([1.0], k_t[:, order], v_col[order]), math.e / (1 + math.e))


@every_element
def test_element_that_sees_no_key_is_zero(element, rng):
    assert element([1.0, 2.0], np.full((2, 3), -INF), [1.0, 2.0, 3.0]) == 0.0
    assert element([1.0, 2.0], np.zeros((2, 0)), []) == 0.0


@every_element
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("other", [1000.0, -INF])
def test_element_with_a_nan_or_plus_infinite_score_is_nan(element, bad, other):
    assert math.isnan(element([1.0], [[other, bad]], [1.0, 2.0]))
    assert math.isnan(element([1.0], [[bad, other]], [1.0, 2.0]))


# Whole attention


def test_naive_attention_is_made_of_elements(rng):
    q, k, v = normal(rng, (2, 3, 4), (2, 5, 4), (2, 5, 6))
    out = naive_attention(q, k, v)
    assert out.shape == (2, 3, 6)
    for b, i, d in np.ndindex(out.shape):
        assert_close(out[b, i, d], single_element_naive(q[b, i], k[b].T, v[b, :, d]))


def test_all_steps_agree(rng):
    q, k, v = normal(rng, (2, 96, 32), (2, 160, 32), (2, 160, 32))
    for tiled in TILED:
        assert_close(tiled(q, k, v, 32, 32), naive_attention(q, k, v))


@every_tiled
@pytest.mark.parametrize("tile_Lq", [1, 3, 7, 10, 64])
@pytest.mark.parametrize("tile_Lkv", [1, 4, 5, 13, 64])
def test_any_tiles_give_the_same_attention(tiled, tile_Lq, tile_Lkv, rng):
    # 10 and 13 rows: ragged last tiles, tiles of one row, tiles larger than the lengths
    q, k, v = normal(rng, (2, 10, 8), (2, 13, 8), (2, 13, 8))
    assert_close(tiled(q, k, v, tile_Lq, tile_Lkv), naive_attention(q, k, v))


@every_tiled
@pytest.mark.parametrize("order", [1, -1])
def test_the_maximum_may_rise_or_fall_from_tile_to_tile(tiled, order, rng):
    q, v = np.ones((1, 3, 1)), rng.standard_normal((1, 12, 2))
    k = np.linspace(-2000, 2000, 12).reshape(1, 12, 1)[:, ::order]
    assert_close(tiled(q, k, v, 2, 5), naive_attention(q, k, v))
    k = k / 1000  # here every key has a weight
    assert_close(tiled(q, k, v, 2, 5), naive_attention(q, k, v))


@every_whole
@pytest.mark.parametrize("Dv", [1, 3, 20])
def test_values_may_have_another_width(attention, Dv, rng):
    q, k, v = normal(rng, (2, 5, 8), (2, 70, 8), (2, 70, Dv))
    out = attention(q, k, v)
    assert out.shape == (2, 5, Dv)
    for d in range(Dv):
        assert_close(out[..., d : d + 1], attention(q, k, v[..., d : d + 1]))


@every_whole
def test_scale_multiplies_the_scores(attention, rng):
    q, k, v = normal(rng, (2, 5, 8), (2, 70, 8), (2, 70, 8))
    assert_close(attention(q, k, v, scale=0.25), attention(q / 4, k, v))
    assert_close(attention(q, k, v, scale=0.0)[:, :1], v.mean(axis=1, keepdims=True))


@every_whole
@pytest.mark.parametrize(("B", "Lq", "Lkv"), [(2, 3, 0), (2, 0, 3), (0, 2, 3)])
def test_empty_axes_give_zeros_of_the_right_shape(attention, B, Lq, Lkv):
    out = attention(np.ones((B, Lq, 4)), np.ones((B, Lkv, 4)), np.ones((B, Lkv, 5)))
    np.testing.assert_array_equal(out, np.zeros((B, Lq, 5)))


@every_whole
def test_rows_whose_scores_are_all_minus_infinity_give_zero(attention, rng):
    q = np.array([[[1.0], [-1.0], [0.5]]])
    k = np.full((1, 70, 1), -INF)
    v = rng.standard_normal((1, 70, 2))
    out = attention(q[:, ::2], k, v)
    np.testing.assert_array_equal(out, np.zeros((1, 2, 2)))
    assert np.isnan(attention(q, k, v)[:, 1]).all()  # there the scores are +inf
    np.testing.assert_array_equal(attention(q, k, v)[:, ::2], out)
    v[0, 5] = NAN  # no row takes part in any key, whatever its value
    np.testing.assert_array_equal(attention(q[:, ::2], k, v), out)


@every_whole
@pytest.mark.parametrize(("x", "y"), [(0.0, INF), (1e200, 1e200)])
def test_a_score_that_is_undefined_or_overflows_gives_nan_in_silence(attention, x, y):
    q, k, v = np.full((1, 2, 1), x), np.full((1, 3, 1), y), np.ones((1, 3, 1))
    assert np.isnan(attention(q, k, v)).all()


@every_tiled
@pytest.mark.parametrize("first", [0, 4, 8])
def test_tiles_of_only_minus_infinity_add_nothing(tiled, first, rng):
    q, k, v = np.ones((1, 3, 1)), *normal(rng, (1, 4, 1), (1, 4, 2))
    k_among, v_among = np.full((1, 12, 1), -INF), rng.standard_normal((1, 12, 2))
    k_among[:, first : first + 4], v_among[:, first : first + 4] = k, v
    assert_close(tiled(q, k_among, v_among, 2, 4), naive_attention(q, k, v))


@every_whole
@pytest.mark.parametrize("j", [0, 63, 64, 69])
def test_a_nan_reaches_its_rows_and_no_others(attention, j, rng):
    q, k, v = normal(rng, (2, 5, 8), (2, 70, 8), (2, 70, 3))
    clean = attention(q, k, v)

    q_bad = q.copy()
    q_bad[1, 2, 0] = NAN
    out = attention(q_bad, k, v)
    assert np.isnan(out[1, 2]).all()
    out[1, 2] = clean[1, 2]
    assert_close(out, clean)

    k_bad = k.copy()
    k_bad[0, j, 0] = NAN
    out = attention(q, k_bad, v)
    assert np.isnan(out[0]).all()
    assert_close(out[1], clean[1])

    v_bad = v.copy()
    v_bad[0, j, 0] = NAN
    out = attention(q, k, v_bad)
    assert np.isnan(out[0, :, 0]).all()
    assert_close(out[0, :, 1:], clean[0, :, 1:])


@every_tiled
@pytest.mark.parametrize("tiles", [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_a_tile_without_rows_is_refused(tiled, tiles):
    x = np.ones((1, 4, 2))
    with pytest.raises(ValueError, match="at least 1 row"):
        tiled(x, x, x, *tiles)


# Partial states


def state_of(s, v, keys):
    return partial_state(s[..., keys], v[keys])


def test_merge_of_any_cut_equals_the_whole(rng):
    s, v = normal(rng, (6, 9), (9, 4))
    s *= 20
    s[0], s[1, :4], s[2, 5:] = -INF, -INF, -INF
    m, l, o = partial_state(s, v)
    for cut in range(10):
        left, right = state_of(s, v, slice(0, cut)), state_of(s, v, slice(cut, 9))
        for merged in (merge_states(left, right), merge_states(right, left)):
            np.testing.assert_array_equal(merged[0], m)
            assert_close(merged[1], l)
            assert_close(merged[2], o)


def test_merge_of_any_partition_equals_the_whole(rng):
    s, v = normal(rng, (6, 30), (30, 4))
    whole = finish_state(partial_state(s, v))
    for pieces in (2, 3, 30):
        keys = np.array_split(rng.permutation(30), pieces)
        states = [state_of(s, v, piece) for piece in keys]
        assert_close(finish_state(reduce(merge_states, states)), whole)


def test_merge_with_empty_is_the_identity(rng):
    s, v = normal(rng, (6, 9), (9, 4))
    s[0] = -INF
    state, empty = partial_state(s, v), empty_state(6, 4)
    for merged in (merge_states(state, empty), merge_states(empty, state)):
        for merged_part, part in zip(merged, state, strict=True):
            np.testing.assert_array_equal(merged_part, part)


def test_merge_of_two_empty_states_stays_empty():
    m, l, o = merge_states(empty_state(3, 2), empty_state(3, 2))
    np.testing.assert_array_equal(m, np.full((3, 1), -INF))
    np.testing.assert_array_equal(l, np.zeros((3, 1)))
    np.testing.assert_array_equal(o, np.zeros((3, 2)))
    np.testing.assert_array_equal(finish_state((m, l, o)), np.zeros((3, 2)))


def test_no_keys_and_keys_of_minus_infinity_leave_the_empty_state():
    for Lkv in (0, 1, 5):
        state = partial_state(np.full((3, Lkv), -INF), np.ones((Lkv, 2)))
        for part, empty_part in zip(state, empty_state(3, 2), strict=True):
            np.testing.assert_array_equal(part, empty_part)


# The oracle


def looped(q, k, v, scale, seen):
    """The oracle of the oracle, in Python: seen(b, i, j) says whether a key is visible."""
    B, Hq, Lq, _ = q.shape
    _, Hkv, Lkv, Dv = v.shape
    out, lse = np.zeros((B, Hq, Lq, Dv)), np.full((B, Hq, Lq), -INF)
    for b, h, i in np.ndindex(B, Hq, Lq):
        keys = [j for j in range(Lkv) if seen(b, i, j)]
        if not keys:
            continue
        g = h // (Hq // Hkv)
        s = [scale * math.fsum(q[b, h, i] * k[b, g, j]) for j in keys]
        weights = [math.exp(x) for x in s]
        l = math.fsum(weights)
        lse[b, h, i] = math.log(l)
        for d in range(Dv):
            out[b, h, i, d] = math.fsum(
                w * v[b, g, j, d] for w, j in zip(weights, keys, strict=True)
            )
        out[b, h, i] /= l
    return out, lse


def assert_oracle(actual, expected):
    for part, expected_part in zip(actual, expected, strict=True):
        assert_close(part, expected_part)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_oracle_is_the_loop(Hq, Hkv, rng):
    q, k, v = normal(rng, (2, Hq, 5, 3), (2, Hkv, 7, 3), (2, Hkv, 7, 4))
    everything = looped(q, k, v, 1 / math.sqrt(3), lambda b, i, j: True)
    assert_oracle(oracle(q, k, v), everything)
    assert_oracle(oracle(q, k, v, scale=0.3), looped(q, k, v, 0.3, lambda b, i, j: True))


@pytest.mark.parametrize("kv_len", [None, 0, 3, 7, [2, 7], [0, 5]])
@pytest.mark.parametrize("q_start", [None, 0, 4, -2, [1, -3], [0, 20]])
@pytest.mark.parametrize("Lq", [1, 5, 9])
def test_oracle_is_the_loop_with_causal_and_kv_len(Lq, q_start, kv_len, rng):
    q, k, v = normal(rng, (2, 4, Lq, 3), (2, 2, 7, 3), (2, 2, 7, 4))
    lens = np.broadcast_to(7 if kv_len is None else kv_len, (2,))
    starts = lens - Lq if q_start is None else np.broadcast_to(q_start, (2,))

    def seen(b, i, j):
        return j < lens[b] and j <= starts[b] + i

    causal = oracle(q, k, v, scale=0.5, causal=True, q_start=q_start, kv_len=kv_len)
    assert_oracle(causal, looped(q, k, v, 0.5, seen))
    padded = oracle(q, k, v, scale=0.5, kv_len=kv_len)
    assert_oracle(padded, looped(q, k, v, 0.5, lambda b, i, j: j < lens[b]))


def test_visible_keys_are_the_drawn_picture():
    picture = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(visible_keys(2, 5, causal=True), picture)
    picture = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    np.testing.assert_array_equal(visible_keys(5, 2, causal=True), picture)
    kv_len = np.array([1, 4], dtype=np.uint8)  # kv_len - Lq must not wrap round
    assert visible_keys(2, 4, causal=True, kv_len=kv_len).sum(axis=(1, 2)).tolist() == [1, 7]


def test_oracle_of_the_notebook_form_is_naive_attention(rng):
    q, k, v = normal(rng, (2, 5, 8), (2, 7, 8), (2, 7, 3))
    out, lse = oracle(q, k, v, scale=1.0)
    assert_close(out, naive_attention(q, k, v))
    assert lse.shape == (2, 5)
    one = oracle(q[0], k[0], v[0], scale=1.0)
    assert_oracle(one, (out[0], lse[0]))

    out, lse = oracle(q, k, v, causal=True, kv_len=[6, 4])
    for b, kv_len in enumerate((6, 4)):
        one = oracle(q[b], k[b, :kv_len], v[b, :kv_len], causal=True)
        assert_oracle(one, (out[b], lse[b]))


def test_oracle_broadcasts_leading_axes(rng):
    q, k, v = normal(rng, (2, 1, 4, 5, 8), (3, 2, 7, 8), (2, 1, 4, 7, 3))
    out, lse = oracle(q, k, v, causal=True, kv_len=[5, 6, 7])
    assert out.shape == (2, 3, 4, 5, 3)
    assert lse.shape == (2, 3, 4, 5)
    for a, b in np.ndindex(2, 3):
        # the values have as many heads as the queries, the keys half as many
        k_full = np.repeat(k[b], 2, axis=0)[None]
        one = oracle(q[a, 0][None], k_full, v[a, 0][None], causal=True, kv_len=5 + b)
        assert_oracle((out[a, b][None], lse[a, b][None]), one)


def test_only_the_values_may_have_a_leading_axis(rng):
    q, k, v = normal(rng, (5, 8), (7, 8), (2, 7, 3))
    out, lse = oracle(q, k, v)
    for b in range(2):
        assert_oracle((out[b], lse[b]), oracle(q, k, v[b]))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_never_leaks(bad, rng):
    q, k, v = normal(rng, (2, 2, 6, 8), (2, 2, 9, 8), (2, 2, 9, 3))
    clean = oracle(q, k, v, causal=True, q_start=0, kv_len=[4, 9])
    k[0, :, 4:], v[0, :, 4:], k[1, :, 6:], v[1, :, 6:] = bad, bad, bad, bad
    assert_oracle(oracle(q, k, v, causal=True, q_start=0, kv_len=[4, 9]), clean)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_seen_reaches_the_rows_that_see_it(bad, rng):
    q, k, v = normal(rng, (6, 8), (6, 8), (6, 3))
    out, lse = oracle(q, k, v, causal=True)
    v_bad = v.copy()
    v_bad[3, 1] = bad
    out_bad, lse_bad = oracle(q, k, v_bad, causal=True)
    np.testing.assert_array_equal(out_bad[3:, 1], np.full(3, bad))
    out_bad[3:, 1] = out[3:, 1]
    assert_oracle((out_bad, lse_bad), (out, lse))

    k_bad = k.copy()
    k_bad[3, 1] = NAN
    out_bad, lse_bad = oracle(q, k_bad, v, causal=True)
    assert np.isnan(out_bad[3:]).all()
    assert np.isnan(lse_bad[3:]).all()
    assert_oracle((out_bad[:3], lse_bad[:3]), (out[:3], lse[:3]))


def test_a_weight_of_zero_does_not_hide_a_nan():
    out, lse = oracle([[1.0]], [[0.0], [-2000.0]], [[1.0], [NAN]])
    assert np.isnan(out).all()
    assert lse[0] == 0.0


def test_a_score_of_plus_infinity_gives_nan():
    out, lse = oracle([[1.0]], [[0.0], [INF]], [[1.0], [2.0]])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("Lkv", [0, 1, 5])
def test_a_row_of_only_minus_infinity_gives_zero_and_minus_infinity(Lkv):
    v = np.full((Lkv, 2), NAN)
    out, lse = oracle(np.ones((3, 1)), np.full((Lkv, 1), -INF), v)
    np.testing.assert_array_equal(out, np.zeros((3, 2)))
    np.testing.assert_array_equal(lse, np.full(3, -INF))


def test_oracle_does_not_overflow():
    out, lse = oracle([[1.0]], [[1000.0], [1001.0]], [[0.0], [1.0]])
    assert_close(out, [[math.e / (1 + math.e)]])
    assert_close(lse, [1000 + math.log(1 + math.e)])


def test_oracle_computes_in_the_dtype_asked_for(rng):
    q, k, v = (x.astype(np.float32) for x in normal(rng, (2, 5, 8), (2, 70, 8), (2, 70, 8)))
    out, lse = oracle(q, k, v)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_array_equal(out, oracle(*(x.astype(np.float64) for x in (q, k, v)))[0])
    out32, lse32 = oracle(q, k, v, dtype=np.float32, scale=np.float64(1 / math.sqrt(8)))
    assert out32.dtype == lse32.dtype == np.float32
    for wide, narrow in ((out, out32), (lse, lse32)):
        error = np.max(np.abs(wide - narrow))
        assert 0 < error < 1e-5, "float32 arithmetic differs, and not by more than it should"


def test_oracle_refuses_shapes_that_do_not_fit():
    def ones(*shape):
        return np.ones(shape)

    with pytest.raises(ValueError, match="multiple"):
        oracle(ones(1, 3, 5, 8), ones(1, 2, 7, 8), ones(1, 2, 7, 8))
    with pytest.raises(ValueError, match="multiple"):
        oracle(ones(1, 1, 5, 8), ones(1, 2, 7, 8), ones(1, 2, 7, 8))
    with pytest.raises(ValueError, match="keys and"):
        oracle(ones(5, 8), ones(1, 8), ones(7, 8))
    with pytest.raises(ValueError, match="broadcast"):
        oracle(ones(2, 2, 5, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 8), kv_len=[1, 2, 3])


# The ladder as a whole


def test_the_examples_of_the_docstrings_are_true():
    attempted = 0
    for module in pkgutil.iter_modules(reference.__path__, reference.__name__ + "."):
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted > 0


def test_walking_the_ladder_shows_every_step_and_its_small_difference(capsys):
    importlib.import_module("flashcpu.reference.__main__").main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    differences = {row[0]: row[1] for row in rows if len(row) > 4 and row[3] in ("us", "ms")}
    steps = [step.__name__ for step in (*SOFTMAXES, *ELEMENTS, *WHOLE)]
    assert list(differences) == [*steps, "flashcpu.attention"]
    for step, difference in differences.items():
        if step in ("safe_softmax", "single_element_naive", "naive_attention"):
            assert difference == "-"
        else:
            assert float(difference) < 1e-12
