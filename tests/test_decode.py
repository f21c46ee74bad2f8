"""Few query rows against many keys: other kernels (decode.inc), the same bits as in a prefill.

And where their keys are cut into chains of items, the same bits as in one piece.
"""

import numpy as np
import pytest
from checks import LAYOUTS, assert_same, both, causal_or_not, misaligned, normal, odd_rows

from flashcpu import api, attention, machine, problem

ROWS = 63

# Hq, Hkv, D, Dv, Lkv: one head a group and several, depths with and without tails, span borders.
PROBLEMS = [(4, 4, 64, 64, 300), (9, 3, 64, 64, 513), (8, 1, 17, 9, 700), (4, 2, 128, 80, 1030)]
PROBLEMS += [(2, 2, 1, 1, 100), (6, 2, 33, 70, 256), (1, 1, 3, 200, 60), (16, 1, 300, 8, 290)]


# Other kernels


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@causal_or_not
def test_a_decode_row_is_the_prefill_row(problem, causal, any_dtype, rng):
    Hq, Hkv, D, Dv, L = problem
    shapes = (2, Hq, ROWS, D), (2, Hkv, L, D), (2, Hkv, L, Dv)
    q, k, v = normal(rng, *shapes, dtype=any_dtype)
    whole = both(q, k, v, causal=causal)
    for first, count in [(62, 1), (30, 1), (0, 1), (60, 2), (59, 4), (51, 8), (20, 3), (12, 51)]:
        at = slice(first, first + count)
        part = both(q[:, :, at], k, v, causal=causal, q_start=L - ROWS + first)
        assert_same(part, [x[:, :, at] for x in whole])


@pytest.mark.parametrize("group", [1, 3, 4, 8, 12, 13, 16, 37, 47, 48])
def test_any_group_at_any_border_of_spans(group, any_dtype, rng):
    """Rows for the kernels for few, against those of whole strips for the kernels for many."""
    Lq = 16 * -(-4 // group)
    q, k, v = normal(rng, (1, group, Lq, 6), (1, 1, 2049, 6), (1, 1, 2049, 17), dtype=any_dtype)
    for keys in (255, 256, 257, 511, 513, 2049):
        seen = k[:, :, :keys], v[:, :, :keys]
        for causal in (False, True):
            whole = both(q, *seen, causal=causal)
            for first, count in [(Lq - 1, 1), (Lq - 3, 2), (0, 1)]:
                at = slice(first, first + count)
                part = both(q[:, :, at], *seen, causal=causal, q_start=keys - Lq + first)
                assert_same(part, [x[:, :, at] for x in whole])


@pytest.mark.parametrize(("D", "Dv"), [(1, 16), (7, 48), (8, 128), (40, 1), (65, 145)])
def test_any_few_rows_at_any_width(D, Dv, any_dtype, rng):
    """Rows accumulate up to eight at a time, columns up to eight vectors. Of 290 keys the first
    rows do not see all of the 32 that two vectors hold, of 301 some make no vector."""
    for keys in (290, 301):
        q, k, v = normal(rng, (63, D), (keys, D), (keys, Dv), dtype=any_dtype)
        whole = both(q, k, v, causal=True)
        for rows in (*range(1, 14), 53):
            assert_same(both(q[-rows:], k, v, causal=True), [x[-rows:] for x in whole])


@pytest.mark.parametrize(("rows", "D"), [(1, 24), (3, 24), (3, 20), (8, 20), (12, 24), (13, 20)])
def test_nothing_behind_kv_len_or_the_diagonal_is_seen(rows, D, any_dtype, rng):
    """Even and odd lengths: the last key of an odd one is half of a pair."""
    q, k, v = normal(rng, (2, rows, D), (2, 600, D), (2, 600, D), dtype=any_dtype)
    for keys in (1, 15, 99, 100, 255, 257, 511):
        expected = both(q, k[:, :keys], v[:, :keys], causal=True)
        for garbage in ((np.nan, np.inf), (np.inf, np.nan), (3e4, -3e4)):
            dirty_k, dirty_v = k.copy(), v.copy()
            dirty_k[:, keys:], dirty_v[:, keys:] = garbage
            assert_same(both(q, dirty_k, dirty_v, kv_len=keys, causal=True), expected)
            assert_same(both(q, dirty_k, dirty_v, causal=True, q_start=keys - rows), expected)
            # The diagonal alone, where other rows of the strip see one key more each.
            every = both(q, dirty_k, dirty_v, causal=True, q_start=keys - 1)
            assert_same([x[:, :1] for x in every], both(q[:, :1], k[:, :keys], v[:, :keys]))


@pytest.mark.parametrize("rows", [1, 12, 50])
def test_any_place_of_keys_and_values(rows, half, rng):
    """In 16 bits; the contract has more of them for the others."""
    q, k, v = normal(rng, (2, 2, rows, 33), (2, 2, 101, 33), (2, 2, 101, 40), dtype=half)
    expected = both(q, k, v, causal=True)
    places = [odd_rows, misaligned]
    places += [LAYOUTS[name] for name in ("rows a page apart", "rows backwards")]
    for place in places:
        assert_same(both(q, place(k), place(v), causal=True), expected)
        assert_same(both(place(q), k, place(v), causal=True), expected)


@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_reach_the_row_that_sees_them(rng):
    q, k, v = normal(rng, (4, 8), (300, 8), (300, 8))
    v[299] = np.nan  # only the last of four rows sees it
    out = attention(q, k, v, causal=True)
    assert np.isfinite(out[:3]).all()
    assert np.isnan(out[3]).all()
    k[0, 0] = np.nan
    assert np.isnan(attention(q, k, v)).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [1, 63])
def test_a_nan_value_under_scores_of_minus_infinity_goes_on(rows):
    """Its weight is 0, and 0 NaN is NaN; also when its whole span weighs nothing."""
    q, k, v = np.ones((rows, 1)), np.zeros((700, 1)), np.ones((700, 2))
    k[:300], v[5, 0] = -np.inf, np.nan
    out = attention(q, k, v)
    assert np.isnan(out[:, 0]).all()
    assert (out[:, 1] == 1).all()


def test_a_row_that_sees_no_key_is_zero(any_dtype):
    k = v = np.ones((0, 5), any_dtype)
    out, lse = both(np.ones((1, 5), any_dtype), k, v)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("q_start", [-26, -27, -40])
def test_rows_that_see_no_key_beside_rows_that_do(q_start, any_dtype, rng):
    """Of 53 rows the first part, or not all of it, or also some of the second."""
    q, k, v = normal(rng, (53, 6), (300, 6), (300, 5), dtype=any_dtype)
    out, lse = both(q, k, v, causal=True, q_start=q_start)
    assert (out[:-q_start] == 0).all()
    assert np.isneginf(lse[:-q_start]).all()
    seeing = both(q[-q_start:], k, v, causal=True, q_start=0)
    assert_same([x[-q_start:] for x in (out, lse)], seeing)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 20])
def test_instruction_sets_with_fma_agree(rows, dtype, rng):
    """In bfloat16 those that compute in float32."""
    fused = [name for name in machine.ISAS if name != "scalar"]
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
        fused = [name for name in fused if machine.arithmetic("bf16", "bf16", name) == "f32"]
    q, k, v = normal(rng, (1, 6, rows, 72), (1, 2, 600, 72), (1, 2, 600, 40), dtype=dtype)
    results = []
    for name in fused:
        with machine.use_isa(name):
            results.append(both(q, k, v))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("keys", [254, 255])
def test_an_unseen_half_of_a_pair_adds_not_even_a_sign(keys, bfloat16):
    """A sum that underflowed to -0.0 stays so beside a key that is not there."""
    k = np.repeat(np.arange(4), 64)[:keys, None].astype(bfloat16)  # o shrinks once a block
    v = np.full((keys, 2), -0.0, bfloat16)
    v[0] = -(2.0**-126)
    few, many = (both(np.full((rows, 1), 30, bfloat16), k, v) for rows in (1, 63))
    assert np.signbit(many[0].astype(np.float32)).all()
    assert_same(few, [x[:1] for x in many])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("empty", [slice(256), slice(256, 512)], ids=["first", "second"])
def test_a_span_without_weight_adds_not_even_a_sign(empty):
    """A sum that underflowed to -0.0 stays so beside a span whose scores are all -inf."""
    k = np.tile(np.repeat(np.arange(4, dtype=np.float32), 64), 2)[:, None]
    v = np.full((512, 2), -0.0, np.float32)
    v[::256] = -(2.0**-126)
    k[empty], v[empty] = -np.inf, 0
    few, many = (both(np.full((rows, 1), 30, np.float32), k, v) for rows in (1, 63))
    assert np.signbit(many[0]).all()
    assert_same(few, [x[:1] for x in many])


# Chains


@pytest.mark.usefixtures("always_threads")
@pytest.mark.parametrize("rows", [1, 12, 16, 53, 63])
@causal_or_not
def test_any_number_of_threads_and_any_cut_of_the_keys(rows, causal, arithmetic, rng):
    """One head and 20000 keys: links of a chain on any thread, in any order of their ends."""
    q, k, v = normal(rng, (1, 1, rows, 8), (1, 1, 20_000, 8), (1, 1, 20_000, 9), dtype=arithmetic)
    q *= 2  # spans whose maxima differ
    expected = both(q, k, v, causal=causal, threads=1)
    for threads in (2, 3, 5):
        assert_same(both(q, k, v, causal=causal, threads=threads), expected)
    for tiles in ((1, 64), (10**6, 10**6)):
        assert_same(both(q, k, v, causal=causal, tiles=tiles, threads=3), expected)
    # Beside members of no key.
    lengths = np.zeros(30, int)
    lengths[5] = 20_000
    many = [np.broadcast_to(x, (30, *x.shape[1:])) for x in (q, k, v)]
    whole = both(*many, causal=causal, kv_len=lengths, threads=1)
    assert_same([x[5:6] for x in whole], expected)


@pytest.mark.usefixtures("always_threads")
@causal_or_not
@pytest.mark.parametrize(
    "shape", [(6, 2, 1), (4, 4, 2), (1, 1, 16), (2, 1, 26), (2, 1, 32)], ids=str
)
def test_a_member_alone_and_beside_longer_ones(shape, causal, any_dtype, rng):
    """Beside 20000 keys the items of others are chains of one link, also those of no key."""
    Hq, Hkv, Lq = shape
    lengths = [0, 20_000, 1, 255, 700]
    shapes = (5, Hq, Lq, 8), (1, Hkv, 20_000, 8), (1, Hkv, 20_000, 9)
    q, k, v = normal(rng, *shapes, dtype=any_dtype)
    together = [both(q, k, v, causal=causal, kv_len=lengths, threads=n) for n in (1, 3)]
    assert_same(*together)
    for b, keys in enumerate(lengths):
        own = (x[:, :, :keys] for x in (k, v))
        alone = both(q[b : b + 1], *own, causal=causal, threads=2)
        assert_same(alone, [x[b : b + 1] for x in together[0]])


@pytest.mark.usefixtures("always_threads")
@pytest.mark.parametrize("past", [1, 20, 31, 40, 62])
def test_strips_of_a_link_that_end_in_different_spans(past, arithmetic, rng):
    """A span that one strip sees and another does not, last of two that wait together."""
    q, k, v = normal(rng, (1, 63, 8), (1, 20_000, 8), (1, 20_000, 9), dtype=arithmetic)
    for spans in (76, 77):
        q_start = 256 * spans - past
        first = both(q[:, :13], k, v, causal=True, q_start=q_start)
        last = both(q[:, 50:], k, v, causal=True, q_start=q_start + 50)
        for threads in (1, 2, 3, 5):
            whole = both(q, k, v, causal=True, q_start=q_start, tiles=(10**6, 256), threads=threads)
            assert_same([x[:, :13] for x in whole], first)
            assert_same([x[:, 50:] for x in whole], last)


@pytest.mark.usefixtures("always_threads")
def test_many_calls_with_chains_at_once_and_again(any_dtype, rng):
    """Each link writes to the state that all of its chain share: in its turn, or bits change."""
    q, k, v = normal(rng, (1, 2, 3, 32), (1, 2, 9000, 32), (1, 2, 9000, 32), dtype=any_dtype)
    expected = both(q, k, v, threads=1)
    for threads in (2, 4, 7) * 3:
        assert_same(both(q, k, v, threads=threads), expected)


@pytest.mark.parametrize("rows", [1, 53, 63])
@pytest.mark.parametrize("tiles", [None, (63, 10**9)])
def test_scratch_does_not_depend_on_the_number_of_keys(tiles, rows, any_dtype):
    """That of a thread, and the states that the links of a chain hand on."""
    sizes, chains = set(), set()
    for keys in (10**5, 10**6, 10**7):
        shapes = (rows, 64), (keys, 64), (keys, 64)
        rows_of = (64 * any_dtype.itemsize, any_dtype.itemsize)
        question = problem.describe((any_dtype,) * 3, shapes, (rows_of,) * 3, None, False)
        prepared = api.prepare(question, rows_of, keys, None, tiles, 2, machine.isa())
        sizes.add(prepared.workspace_bytes)
        chains.add(prepared.chains)
    assert len(sizes) == len(chains) == 1
    assert sizes.pop() < 2 << 20
