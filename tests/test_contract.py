"""The contract: one answer. Every theorem here is about equal bits, never about tolerances.

For given inputs and options the bits of a row do not depend on how the work was cut, on what else
was computed, on where the arrays lie or, among those with FMA, on the instruction set.
"""

import ctypes
import itertools
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from checks import COPIED, LAYOUTS, assert_same, assert_same_bits, both, causal_or_not, normal
from rules import BLOCK, SPAN, attention_by_the_rules, fma_once, fma_twice

from flashcpu import _engine, api, attention, machine, problem


def both_dtypes(test):
    """Runs a test in float32 and float64 on every instruction set."""
    dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
    return pytest.mark.usefixtures("isa")(dtypes(test))


# How the work is cut


# Shapes of q, k, v: over several strips and spans; grouped heads; a short batch; one query.
CUTS = {
    "spans": ((1, 2, 200, 20), (1, 2, 2100, 20), (1, 2, 2100, 9)),
    "groups": ((2, 6, 130, 33), (2, 2, 150, 33), (2, 2, 150, 40)),
    "members": ((9, 3, 70, 16), (9, 3, 65, 16), (9, 3, 65, 16)),
    "rows": ((1, 1, 1000, 24), (1, 1, 130, 24), (1, 1, 130, 24)),
    "decode": ((4, 12, 1, 20), (4, 4, 3000, 20), (4, 4, 3000, 30)),
}
every_cut = pytest.mark.parametrize("shapes", CUTS.values(), ids=CUTS)


@pytest.mark.usefixtures("always_threads")
@causal_or_not
@every_cut
def test_any_number_of_threads(shapes, causal, arithmetic, rng):
    q, k, v = normal(rng, *shapes, dtype=arithmetic)
    expected = both(q, k, v, causal=causal, threads=1)
    for threads in (2, 3, 5):
        assert_same(both(q, k, v, causal=causal, threads=threads), expected)


@causal_or_not
@every_cut
def test_any_tiles(shapes, causal, arithmetic, rng):
    q, k, v = normal(rng, *shapes, dtype=arithmetic)
    expected = both(q, k, v, causal=causal)
    sizes = [(1, 1), (7, 65), (16, 64), (49, 192), (100, 320), (96, 448), (300, 1000), (10**6,) * 2]
    for tiles in sizes:
        assert_same(both(q, k, v, causal=causal, tiles=tiles), expected)


@pytest.mark.parametrize("chunk", [1, 7, 48, 100])
@pytest.mark.parametrize(
    ("group", "Lq", "Lkv"), [(1, 150, 150), (3, 150, 210), (2, 101, 1100), (1, 230, 2100)]
)
def test_queries_in_chunks(group, Lq, Lkv, chunk, arithmetic, rng):
    """So a decode step is a row of the prefill."""
    shapes = (1, group, Lq, 12), (1, 1, Lkv, 12), (1, 1, Lkv, 7)
    q, k, v = normal(rng, *shapes, dtype=arithmetic)
    # One query costs a call of its own; some of them say as much as all.
    starts = range(0, Lq, chunk) if chunk > 1 else [*range(0, Lq, 13), Lq - 1]
    for q_start in (0, Lkv - Lq, Lkv - Lq - 20):
        whole = both(q, k, v, causal=True, q_start=q_start)
        for at in starts:
            rows = slice(at, at + chunk)
            part = both(q[:, :, rows], k, v, causal=True, q_start=q_start + at)
            assert_same(part, [x[:, :, rows] for x in whole])
    whole = both(q, k, v)
    for at in starts:
        rows = slice(at, at + chunk)
        assert_same(both(q[:, :, rows], k, v), [x[:, :, rows] for x in whole])


# What else was computed


@causal_or_not
def test_a_member_alone_and_in_its_batch(causal, arithmetic, rng):
    q, k, v = normal(rng, (5, 4, 63, 12), (5, 2, 1100, 12), (5, 2, 1100, 9), dtype=arithmetic)
    options = {"kv_len": [1100, 1, 0, 1025, 700], "q_start": [1040, 0, 5, -20, 690]}
    together = both(q, k, v, causal=causal, **options)
    for b in range(5):
        own = {name: value[b] for name, value in options.items()}
        alone = both(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=causal, **own)
        assert_same(alone, [x[b : b + 1] for x in together])


@causal_or_not
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (6, 2), (5, 1)])
def test_a_head_alone_and_with_others(Hq, Hkv, causal, arithmetic, rng):
    q, k, v = normal(rng, (2, Hq, 63, 12), (2, Hkv, 1100, 12), (2, Hkv, 1100, 9), dtype=arithmetic)
    together = both(q, k, v, causal=causal)
    for h in range(Hq):
        g = h // (Hq // Hkv)
        alone = both(q[:, h], k[:, g], v[:, g], causal=causal)
        assert_same(alone, [x[:, h] for x in together])


@causal_or_not
@pytest.mark.parametrize("Lq", [1, 20, 130])
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 1), (6, 2), (6, 3)])
def test_grouped_heads_are_repeated_heads(Hq, Hkv, Lq, causal, arithmetic, rng):
    q, k, v = normal(rng, (2, Hq, Lq, 12), (2, Hkv, 200, 12), (2, Hkv, 200, 9), dtype=arithmetic)
    repeated = (np.repeat(x, Hq // Hkv, axis=1) for x in (k, v))
    assert_same(both(q, k, v, causal=causal), both(q, *repeated, causal=causal))


@both_dtypes
def test_rows_do_not_know_their_neighbours(dtype, rng):
    """Huge, infinite and NaN rows beside a row change nothing in it."""
    q, k, v = normal(rng, (100, 12), (1100, 12), (1100, 9), dtype=dtype)
    expected = both(q, k, v)
    for others in (1e30, 1e-30, np.inf, np.nan):
        mixed = np.full_like(q, others)
        mixed[::3] = q[::3]
        assert_same([x[::3] for x in both(mixed, k, v)], [x[::3] for x in expected])


@pytest.mark.parametrize("Lq", [50, 63])
def test_columns_of_values_do_not_know_each_other(Lq, arithmetic, rng):
    q, k, v = normal(rng, (Lq, 12), (1100, 12), (1100, 37), dtype=arithmetic)
    whole = attention(q, k, v)
    for first, end in [(0, 1), (5, 6), (0, 16), (3, 20), (16, 37), (36, 37)]:
        assert_same_bits(attention(q, k, v[:, first:end]), whole[:, first:end])


@pytest.mark.usefixtures("isa", "always_threads")
def test_calls_from_many_threads_at_once(rng):
    shapes = [((1, 4, 70 + i, 20), (1, 4, 400, 20), (1, 4, 400, 9)) for i in range(6)]
    shapes += [((1, 1, 1, 20), (1, 1, 20_000 + i, 20), (1, 1, 20_000 + i, 9)) for i in range(6)]
    arrays = [normal(rng, *of_call) for of_call in shapes]  # and with chains of items
    expected = [both(*of_call, causal=True, threads=1) for of_call in arrays]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = pool.map(lambda x: both(*x, causal=True, threads=2), arrays)
            for actual, one in zip(results, expected, strict=True):
                assert_same(actual, one)


# Masks


@pytest.mark.parametrize(
    "keys", [0, 1, 40, 63, 64, 65, 128, 255, 256, 257, 300, 512, 767, 1023, 1025, 1099]
)
def test_kv_len_is_slicing_and_keys_appended_behind_change_nothing(keys, arithmetic, rng):
    q, k, v = normal(rng, (2, 63, 12), (2, 1100, 12), (2, 1100, 9), dtype=arithmetic)
    for options in ({}, {"causal": True}, {"causal": True, "q_start": keys // 2}):
        sliced = both(q, k[:, :keys], v[:, :keys], **options)
        assert_same(both(q, k, v, kv_len=keys, **options), sliced)
        many = both(q, k, v, kv_len=np.array([keys, 1100]), **options)
        assert_same([x[0] for x in many], [x[0] for x in sliced])


@pytest.mark.parametrize("Lkv", [150, 256, 257, 520, 1025])
def test_a_causal_row_is_attention_over_the_keys_before_it(Lkv, arithmetic, rng):
    """Also where the rows of one strip end in different blocks and in different spans."""
    q, k, v = normal(rng, (Lkv, 12), (Lkv, 12), (Lkv, 9), dtype=arithmetic)
    whole = both(q, k, v, causal=True)
    borders = [n + d for n in (48, BLOCK, SPAN, 2 * SPAN, 4 * SPAN) for d in (-2, -1, 0, 1)]
    rows = {0, 1, 7, 8, 31, 32, Lkv - 1, *borders, *range(0, Lkv, 97)}
    for i in sorted(row for row in rows if row < Lkv):
        one = both(q[i : i + 1], k[: i + 1], v[: i + 1])
        assert_same(one, [x[i : i + 1] for x in whole])


@pytest.mark.parametrize("q_start", [200, 230, 254, 255, 256, 500, 1000, 2020])
@pytest.mark.parametrize("group", [1, 3, 50])
def test_a_strip_whose_rows_end_in_different_spans(group, q_start, arithmetic, rng):
    q, k, v = normal(rng, (1, group, 63, 6), (1, 1, 2100, 6), (1, 1, 2100, 5), dtype=arithmetic)
    out, lse = both(q, k, v, causal=True, q_start=q_start)
    for i in range(0, 63, 7):
        end = q_start + i + 1
        one = both(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end])
        assert_same(one, (out[:, :, i : i + 1], lse[:, :, i : i + 1]))


@both_dtypes
def test_spans_that_a_row_does_not_see_add_not_even_a_sign(dtype):
    """A row whose result underflows to -0.0 keeps it beside rows that go on to further spans."""
    q = np.ones((60, 1), dtype)
    k = 10 * (np.arange(2 * SPAN) // BLOCK).astype(dtype)[:, None]  # o shrinks once a block
    v = np.full((2 * SPAN, 2), -0.0, dtype)
    v[0] = -np.finfo(dtype).smallest_subnormal
    together = both(q, k, v, causal=True, q_start=SPAN - 30)
    assert np.signbit(together[0][:30]).all()  # those that end in the first span
    for i in (0, 15, 29, 30, 59):
        end = SPAN - 30 + i + 1
        assert_same(both(q[i : i + 1], k[:end], v[:end]), [x[i : i + 1] for x in together])


def test_a_mask_that_hides_nothing_is_none(arithmetic, rng):
    q, k, v = normal(rng, (2, 63, 12), (2, 1100, 12), (2, 1100, 9), dtype=arithmetic)
    plain = both(q, k, v)
    assert_same(both(q, k, v, causal=True, q_start=1100), plain)
    assert_same(both(q, k, v, kv_len=1100), plain)
    assert_same(both(q, k, v, kv_len=[1100, 1100], q_start=[3, 5]), plain)


# Where the arrays lie


@both_dtypes
@causal_or_not
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("Lq", [2, 63])
def test_any_layout(Lq, layout, causal, dtype, rng):
    shapes = (2, 4, Lq, 20), (2, 2, 150, 20), (2, 2, 150, 37)
    arrays = normal(rng, *shapes, dtype=dtype)
    expected = both(*arrays, causal=causal)
    laid_out = [LAYOUTS[layout](x) for x in arrays]
    for x, other in zip(arrays, laid_out, strict=True):
        assert other.strides != x.strides or layout in ("read-only", "misaligned", "big-endian")
        np.testing.assert_array_equal(x, other)
    assert_same(both(*laid_out, causal=causal), expected)
    for i in range(3):  # each beside two contiguous ones
        mixed = [laid_out[j] if i == j else x for j, x in enumerate(arrays)]
        assert_same(both(*mixed, causal=causal), expected)


def test_no_question_is_taken_for_one_before(monkeypatch, rng):
    q, k, v = normal(rng, (2, 4, 3, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    lengths = np.array([40, 40])
    options = (
        {},
        {"causal": True},
        {"causal": True, "q_start": 1},
        {"causal": True, "q_start": 2},
        {"scale": 1.0},
        {"scale": 1},
        {"kv_len": 1},
        {"kv_len": 39},
        {"kv_len": [40, 7]},
        {"tiles": [1, 1]},
    )
    questions = [((q, k, v), chosen) for chosen in options]
    questions += [(tuple(map(lay, (q, k, v))), {}) for lay in LAYOUTS.values()]
    questions += [
        ((q, k, v[..., :9]), {}),
        ((q, k[:, :, :17], v[:, :, :17]), {}),
        ((q[:, :2], k, v), {}),
        ((q[..., :8], k[..., :8], v), {}),
        ((q[0, :2], k[0], v[0]), {}),
        ((q, k.astype(np.float16), v.astype(np.float16)), {}),
        (tuple(x.view(np.int32).view(np.float32) for x in (v[:, :, :3], k, k)), {}),
    ]
    expected = []
    for arrays, chosen in questions:
        monkeypatch.setattr(api, "_known", ())
        expected.append(both(*arrays, **chosen))
    for (before, chosen_before), (after, right) in itertools.product(
        questions, zip(questions, expected, strict=True)
    ):
        attention(*before, **chosen_before)
        arrays, chosen = after
        assert_same(both(*arrays, **chosen), right)
    # An array that holds something else when it is seen again.
    monkeypatch.setattr(api, "_known", ())
    expected = [both(q, k, v, kv_len=[40, length]) for length in (40, 7)]
    for lengths[1], right in zip((40, 7), expected, strict=True):
        assert_same(both(q, k, v, kv_len=lengths), right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_kernels_can_read_is_not_copied(layout, rng):
    x = LAYOUTS[layout](normal(rng, (2, 2, 150, 20))[0])
    read = problem.readable(problem.operand(x, "k"))
    assert read.flags.aligned
    assert read.dtype.isnative
    assert read.strides[-1] == read.itemsize
    assert (read is x) == (layout not in COPIED)


def test_what_is_copied_may_be_reversed_in_every_axis(rng):
    q, k, v = normal(rng, (2, 2, 5, 20), (2, 2, 150, 20), (2, 2, 150, 20))
    back = (np.ascontiguousarray(np.flip(x)) for x in (q, k, v))
    assert_same_bits(attention(*map(np.flip, back)), attention(q, k, v))


@pytest.mark.parametrize("Dv", [1, 7, 8, 15, 16, 17, 31, 32, 33, 65])
@pytest.mark.parametrize("Lkv", [64, 333, 1100])
def test_rows_a_page_apart_at_every_width(Lkv, Dv, arithmetic, rng):
    """K and V are copied a tile at a time there, V in panels of columns."""
    q, k, v = normal(rng, (2, 63, Dv), (2, Lkv, Dv), (2, Lkv, Dv), dtype=arithmetic)
    expected = both(q, k, v, causal=True)
    apart = LAYOUTS["rows a page apart"]
    assert_same(both(q, apart(k), apart(v), causal=True), expected)
    for tiles in ((48, 64), (500, 192)):
        assert_same(both(q, apart(k), apart(v), causal=True, tiles=tiles), expected)


@both_dtypes
@pytest.mark.parametrize("offset", [4, 8, 16, 32, 60])
def test_any_alignment_of_the_elements(offset, dtype, rng):
    """Inputs and results on any multiple of their own size."""
    offset = max(offset, np.dtype(dtype).itemsize)
    q, k, v = normal(rng, (2, 63, 20), (2, 150, 20), (2, 150, 37), dtype=dtype)
    expected = attention(q, k, v)

    def shifted(x):
        memory = np.zeros(x.nbytes + 128, np.uint8)
        at = -memory.ctypes.data % 64 + offset
        view = np.ndarray(x.shape, x.dtype, memory.data, at)
        view[...] = x
        return view

    out = shifted(np.zeros_like(expected))
    attention(*(shifted(x) for x in (q, k, v)), out=out)
    assert_same_bits(out, expected)


# What the thread had been told


# Where a thread's floating-point control stands in fenv_t, as 32 bits, and those that flush
# subnormal numbers to 0, read and written.
FLUSHING = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}


@contextmanager
def flushing_subnormals():
    """As libraries for sound and for neural networks leave a thread."""
    place, bits = FLUSHING[platform.machine()]
    libm = ctypes.CDLL(None)
    environment = (ctypes.c_uint32 * 16)()
    libm.fegetenv(environment)
    before = environment[place]
    environment[place] |= bits
    libm.fesetenv(environment)
    try:
        yield
        libm.fegetenv(environment)
        assert environment[place] & bits == bits, "the call left another environment"
    finally:
        environment[place] = before
        libm.fesetenv(environment)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() not in FLUSHING,
    reason="where the bits are is not known",
)
@pytest.mark.usefixtures("always_threads")
@pytest.mark.parametrize("rows", [1, 63])
def test_a_thread_that_flushes_subnormal_numbers(rows, any_dtype, rng):
    """float16 is widened by way of subnormal numbers of float32, in decode and not in prefill."""
    q, k, v = normal(rng, (1, 2, rows, 64), (1, 2, 5000, 64), (1, 2, 5000, 64), dtype=any_dtype)
    q *= any_dtype.type(2.0**13)
    k *= any_dtype.type(2.0**-17)
    v[..., :32] *= any_dtype.type(2.0**-20)
    expected = both(q, k, v)
    with flushing_subnormals():
        results = [both(q, k, v, threads=threads) for threads in (1, 2)]
    for result in results:
        assert_same(result, expected)


# Instruction sets, and the rules


@both_dtypes
@causal_or_not
@every_cut
def test_any_instruction_set_with_fma(shapes, causal, dtype, rng, isa):
    """The one in use against all others of the machine."""
    others = [name for name in machine.ISAS if name not in (isa, "scalar")]
    if isa == "scalar" or not others:
        pytest.skip("needs two instruction sets with FMA")
    q, k, v = normal(rng, *shapes, dtype=dtype)
    expected = both(3 * q, k, v, causal=causal)
    for name in others:
        with machine.use_isa(name):
            assert_same(both(3 * q, k, v, causal=causal), expected)


def test_the_lengths_of_blocks_and_spans_are_frozen():
    """They are in every bit, and in the rules; a version with others gives other answers."""
    assert (_engine.BLOCK, _engine.SPAN) == (BLOCK, SPAN)


@both_dtypes
@pytest.mark.parametrize(
    ("Lkv", "D", "Dv", "spread"),
    [(1, 1, 1, 1), (70, 5, 3, 30), (150, 33, 2, 1), (257, 3, 2, 9), (1400, 3, 2, 4)],
)
def test_the_bits_are_those_of_the_rules(Lkv, D, Dv, spread, dtype, rng, isa):
    q, k, v = normal(rng, (20, D), (Lkv, D), (Lkv, Dv), dtype=dtype)
    q *= dtype(spread)
    fma = fma_twice if isa == "scalar" else fma_once
    for q_start in (Lkv, max(Lkv - 20, 0), Lkv // 2 - 10, -10):
        ends = np.clip(q_start + np.arange(20) + 1, 0, Lkv)
        out, lse = both(q, k, v, causal=True, q_start=q_start)
        few, few_lse = both(q[:3], k, v, causal=True, q_start=q_start)
        assert_same((few, few_lse), (out[:3], lse[:3]))
        expected, m, l = attention_by_the_rules(q, k, v, ends, fma)
        assert_same_bits(out, expected)
        with np.errstate(divide="ignore"):
            lse_in_double = np.float64(m) * math.log(2) + np.log(np.float64(l))
        np.testing.assert_allclose(lse, lse_in_double, 4 * np.finfo(dtype).eps)
