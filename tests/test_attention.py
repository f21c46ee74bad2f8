"""Right answers: attention against the oracle, on every instruction set, at every edge."""

import itertools
import math

import numpy as np
import pytest
from checks import assert_right, assert_same_bits, assert_within_budget, normal

from flashcpu import attention
from flashcpu.reference import naive_attention, oracle

pytestmark = pytest.mark.usefixtures("isa")

INF, NAN = float("inf"), float("nan")
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
# Few query rows of a KV head have kernels of their own.
few_or_many = pytest.mark.parametrize("Lq", [3, 63], ids=["few rows", "many rows"])

# Around the widths of vectors, register tiles, panels, strips.
WIDTHS = [*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 100, 128, 256, 512]
# Around the widths of vectors and strips, and a block of keys.
SHORT = [0, 1, 2, 3, 15, 16, 17, 47, 48, 49, 63, 64, 65, 97]
# (Lq, Lkv) around tiles of keys and spans.
LONG = [
    (127, 127),
    (128, 129),
    (129, 128),
    (197, 197),
    (200, 255),
    (150, 256),
    (257, 257),
    (193, 320),
    (70, 511),
    (1, 1023),
    (3, 1024),
    (50, 1025),
    (1023, 17),
    (1025, 1),
    (2049, 33),
    (17, 2049),
    (1, 2048),
    (60, 3100),
]


# Shapes


@both_dtypes
@pytest.mark.parametrize("D", WIDTHS)
@few_or_many
def test_queries_and_keys_of_any_depth(Lq, D, dtype, rng):
    assert_right(*normal(rng, (1, 2, Lq, D), (1, 2, 70, D), (1, 2, 70, 5), dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("Dv", WIDTHS)
@few_or_many
def test_values_of_any_width(Lq, Dv, dtype, rng):
    assert_right(*normal(rng, (1, 2, Lq, 5), (1, 2, 70, 5), (1, 2, 70, Dv), dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("Lkv", SHORT)
def test_short_lengths(Lkv, dtype, rng):
    for Lq, causal in itertools.product(SHORT, (False, True)):
        q, k, v = normal(rng, (2, 2, Lq, 6), (2, 2, Lkv, 6), (2, 2, Lkv, 9), dtype=dtype)
        assert_right(q, k, v, causal=causal)


@both_dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("Lq", "Lkv"), LONG)
def test_long_lengths(Lq, Lkv, causal, dtype, rng):
    q, k, v = normal(rng, (1, 2, Lq, 8), (1, 2, Lkv, 8), (1, 2, Lkv, 5), dtype=dtype)
    assert_right(q, k, v, causal=causal)
    assert_right(q, k, v, causal=causal, q_start=0)


@both_dtypes
@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8), (7, 3)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 3)),
        ((3, 5, 8), (7, 8), (1, 7, 3)),
        ((5, 8), (7, 8), (3, 7, 4)),
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
        ((2, 4, 5, 8), (7, 8), (7, 3)),
        ((1, 4, 5, 8), (3, 2, 7, 8), (1, 2, 7, 3)),
        ((4, 5, 8), (3, 2, 7, 8), (2, 7, 3)),
        ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 3)),
        ((2, 1, 4, 5, 8), (3, 2, 7, 8), (2, 1, 2, 7, 3)),
        ((4, 5, 8), (2, 1, 2, 7, 8), (1, 3, 2, 7, 3)),
        ((2, 1, 2, 4, 5, 8), (3, 1, 1, 7, 8), (7, 3)),
    ],
    ids=str,
)
def test_leading_axes_broadcast(shapes, dtype, rng):
    assert_right(*normal(rng, *shapes, dtype=dtype), causal=True, q_start=3)


@pytest.mark.parametrize("axis", range(4))
def test_axes_of_stride_zero_are_repeated_elements(axis, rng):
    q, k, v = normal(rng, (2, 4, 50, 8), (2, 4, 70, 8), (2, 4, 70, 8))
    repeated = [np.broadcast_to(x.take([1], axis), x.shape) for x in (q, k, v)]
    assert 0 in repeated[1].strides
    copies = [x.copy() for x in repeated]
    for which in range(1, 8):  # any of the three
        arrays = [repeated[i] if which >> i & 1 else x for i, x in enumerate((q, k, v))]
        expected = [copies[i] if which >> i & 1 else x for i, x in enumerate((q, k, v))]
        assert_same_bits(attention(*arrays), attention(*expected))


@both_dtypes
@pytest.mark.parametrize("Lq", [1, 3, 50])
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 1), (6, 2), (6, 3), (9, 3), (71, 1)])
def test_grouped_heads(Hq, Hkv, Lq, dtype, rng):
    q, k, v = normal(rng, (2, Hq, Lq, 8), (2, Hkv, 70, 8), (2, Hkv, 70, 5), dtype=dtype)
    assert_right(q, k, v)
    assert_right(q, k, v, causal=True, kv_len=[70, 41])


@both_dtypes
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 0, 8), (2, 2, 7, 8), (2, 2, 7, 3)),
        ((2, 4, 5, 8), (2, 2, 0, 8), (2, 2, 0, 3)),
        ((0, 4, 5, 8), (0, 2, 7, 8), (0, 2, 7, 3)),
        ((2, 0, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)),
        ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 3)),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 0)),
        ((0, 8), (0, 8), (0, 8)),
        ((3, 0, 8), (7, 8), (7, 8)),
    ],
    ids=str,
)
def test_empty_axes_give_empty_results_or_rows_that_see_no_key(shapes, dtype):
    q, k, v = (np.ones(shape, dtype) for shape in shapes)
    for options in ({}, {"causal": True}, {"causal": True, "kv_len": 0}):
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert out.shape == (*q.shape[:-1], v.shape[-1])
        assert lse.shape == q.shape[:-1]
        if k.shape[-2] == 0:
            np.testing.assert_array_equal(out, 0)
            np.testing.assert_array_equal(lse, -INF)


@pytest.mark.parametrize("stride", [0, 4, 2**55], ids="stride {}".format)
def test_values_of_width_zero_still_have_an_lse(stride, rng):
    q, k = normal(rng, (2, 5, 8), (2, 7, 8))
    v = np.lib.stride_tricks.as_strided(q[:0, :0, :0], (2, 7, 0), (0, stride, 4))
    assert_same_bits(attention(q, k, v, return_lse=True)[1], attention(q, k, k, return_lse=True)[1])


def test_the_notebooks_case_is_naive_attention(rng):
    q, k, v = normal(rng, (4, 64, 128), (4, 192, 128), (4, 192, 128), dtype=np.float64)
    difference = attention(q, k, v, scale=1.0) - naive_attention(q, k, v)
    assert np.abs(difference).max() < 1e-13


def test_only_return_lse_makes_a_pair(rng):
    q, k, v = normal(rng, (5, 8), (7, 8), (7, 3))
    alone = attention(q, k, v)
    out, lse = attention(q, k, v, return_lse=True)
    assert isinstance(alone, np.ndarray)
    assert_same_bits(alone, out)
    assert lse.shape == (5,)


# Options


@both_dtypes
@pytest.mark.parametrize("scale", [0, 0.0, 1, -0.3, 2.5, np.float32(0.125), 1e-30])
def test_scale_multiplies_the_scores(scale, dtype, rng):
    q, k, v = normal(rng, (2, 50, 8), (2, 70, 8), (2, 70, 5), dtype=dtype)
    out, lse = assert_right(q, k, v, scale=scale)
    if scale == 0:
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(-2, keepdims=True), out.shape), 1e-4)
        np.testing.assert_allclose(lse, math.log(70), 1e-6)


def expected_rows(q, k, v, ends):
    """Row i is attention over the first ends[i] keys: the definition, without any mask."""
    rows = [oracle(q[i : i + 1], k[:n], v[:n]) for i, n in enumerate(ends)]
    return np.concatenate([out for out, _ in rows]), np.concatenate([lse for _, lse in rows])


@both_dtypes
@pytest.mark.parametrize(
    "q_start", [None, 0, 1, 5, -1, -4, -49, -50, 69, 70, 1000, 2**60, -(2**60), np.int32(3)]
)
@pytest.mark.parametrize("kv_len", [None, 0, 1, 41, 64, 70, np.int64(65)])
def test_causal_row_sees_the_keys_up_to_its_position(q_start, kv_len, dtype, rng):
    q, k, v = normal(rng, (50, 8), (70, 8), (70, 5), dtype=dtype)
    keys = 70 if kv_len is None else int(kv_len)
    start = keys - 50 if q_start is None else int(q_start)
    ends = [min(max(start + i + 1, 0), keys) for i in range(50)]
    out, lse = attention(q, k, v, causal=True, q_start=q_start, kv_len=kv_len, return_lse=True)
    expected_out, expected_lse = expected_rows(q, k, v, ends)
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(out, expected_out, tolerance, tolerance)
    np.testing.assert_allclose(lse, expected_lse, tolerance, tolerance)
    unseen = np.array(ends) == 0
    np.testing.assert_array_equal(out[unseen], 0)
    np.testing.assert_array_equal(lse[unseen], -INF)


def test_causal_is_the_drawn_picture():
    """Each row's mean of one-hot values says which keys it saw."""
    for Lq, Lkv, q_start, picture in [
        (2, 5, None, "xxxx. xxxxx"),
        (2, 5, 0, "x.... xx..."),
        (5, 2, None, ".. .. .. x. xx"),
        (5, 2, 0, "x. xx xx xx xx"),
    ]:
        out = attention(
            np.ones((Lq, 1)), np.ones((Lkv, 1)), np.eye(Lkv), causal=True, q_start=q_start
        )
        drawn = " ".join("".join("x" if seen else "." for seen in row) for row in out > 0)
        assert drawn == picture


@both_dtypes
@pytest.mark.parametrize("kv_len", [0, 1, 41, 64, 65, 70])
def test_kv_len_is_the_number_of_keys(kv_len, dtype, rng):
    q, k, v = normal(rng, (2, 50, 8), (2, 70, 8), (2, 70, 5), dtype=dtype)
    out, lse = assert_right(q, k, v, kv_len=kv_len)
    assert_within_budget(out, lse, q, k[:, :kv_len], v[:, :kv_len])


@both_dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_every_member_has_its_own_kv_len_and_q_start(causal, dtype, rng):
    lens = [0, 1, 600, 256, 513, 63]
    starts = [0, -3, 590, -2000, 2000, 20]
    q, k, v = normal(rng, (6, 4, 20, 8), (6, 2, 600, 8), (6, 2, 600, 5), dtype=dtype)
    for kv_len, q_start in itertools.product((None, 257, lens), (None, 7, starts)):
        options = {"causal": causal, "kv_len": kv_len, "q_start": q_start}
        assert_right(q, k, v, **options)
        arrays = {
            name: np.array(x, np.uint16) if name == "kv_len" else np.array(x, np.int16)
            for name, x in options.items()
            if isinstance(x, list)
        }
        assert_same_bits(attention(q, k, v, **(options | arrays)), attention(q, k, v, **options))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
def test_per_member_numbers_broadcast_over_the_leading_axes(shape, rng):
    q, k, v = normal(rng, (2, 1, 4, 5, 8), (3, 2, 7, 8), (1, 3, 2, 7, 3))
    kv_len, q_start = rng.integers(0, 8, shape), rng.integers(-5, 8, shape)
    assert_right(q, k, v, causal=True, kv_len=kv_len, q_start=q_start)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_one_number_in_an_array_fits_every_rank(rank, rng):
    q, k, v = (x[(None,) * (rank - 2)] for x in normal(rng, (5, 8), (7, 8), (7, 3)))
    expected = attention(q, k, v, causal=True, kv_len=4, q_start=1)
    for one in (np.array, lambda x: [x]):
        assert_same_bits(attention(q, k, v, causal=True, kv_len=one(4), q_start=one(1)), expected)


def test_q_start_means_nothing_without_causal(rng):
    q, k, v = normal(rng, (5, 8), (7, 8), (7, 3))
    assert_same_bits(attention(q, k, v, q_start=-100), attention(q, k, v))


@both_dtypes
@pytest.mark.parametrize("Lkv", [0, 5, 70])
def test_a_row_that_sees_no_key_is_zero_and_its_lse_minus_infinity(Lkv, dtype, rng):
    """Whatever stands in its query; the rows beside it are as always."""
    q, k, v = normal(rng, (2, 60, 8), (2, Lkv, 8), (2, Lkv, 5), dtype=dtype)
    q[:, 10], q[:, 20] = NAN, INF
    out, lse = attention(q, k, v, causal=True, q_start=-30, return_lse=True)
    np.testing.assert_array_equal(out[:, :30], 0)
    np.testing.assert_array_equal(lse[:, :30], -INF)
    assert_within_budget(out[:, 30:], lse[:, 30:], q[:, 30:], k, v, causal=True, q_start=0)


# What arrays may be


@both_dtypes
def test_anything_that_numpy_takes(dtype, rng):
    q, k, v = normal(rng, (2, 4, 50, 8), (2, 2, 70, 8), (2, 2, 70, 5), dtype=dtype)
    expected = attention(q, k, v)

    class Sub(np.ndarray):
        pass

    big_endian = np.dtype(dtype).newbyteorder(">")
    forms = [
        np.asfortranarray,
        lambda x: x.astype(big_endian),
        lambda x: x.view(Sub),
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: memoryview(x),
    ]
    if dtype is np.float64:
        forms.append(np.ndarray.tolist)
    for form in forms:
        out = attention(form(q), form(k), form(v))
        assert type(out) is np.ndarray
        assert_same_bits(out, expected)
    for x in (q, k, v):
        x.setflags(write=False)
    assert_same_bits(attention(q, k, v), expected)


def test_inputs_stay_as_they_were(rng):
    arrays = normal(rng, (2, 4, 50, 8), (2, 2, 70, 8), (2, 2, 70, 5))
    before = [x.copy() for x in arrays]
    attention(*arrays, causal=True, kv_len=[70, 3], scale=2.0)
    for x, copy in zip(arrays, before, strict=True):
        assert_same_bits(x, copy)


# out


@both_dtypes
@pytest.mark.parametrize("shape", [(50, 5), (2, 50, 5), (2, 4, 50, 5), (3, 2, 4, 50, 5)])
def test_out_is_filled_and_returned(shape, dtype, rng):
    lead = shape[:-2]
    q, k, v = normal(rng, (*lead, 50, 8), (*lead, 70, 8), (*lead, 70, 5), dtype=dtype)
    out = np.full(shape, NAN, dtype)
    assert attention(q, k, v, out=out) is out
    assert_same_bits(out, attention(q, k, v))
    returned, lse = attention(q, k, v, out=out, return_lse=True)
    assert returned is out
    assert lse.shape == shape[:-1]


def misaligned_view(memory, dtype):
    return (
        memory.view(np.uint8)
        .reshape(-1)[1 : 1 + 2 * 4 * 63 * 5 * np.dtype(dtype).itemsize]
        .view(dtype)
        .reshape(2, 4, 63, 5)
    )


OUTS = {
    "contiguous": lambda room: room[1:3, 2:6, :63, :5].copy(),
    "inside a larger array": lambda room: room[1:3, 2:6, 7:70, 3:8],
    "every second row and head": lambda room: room[1:3, 0:8:2, 1:127:2, 3:8],
    "heads inside": lambda room: room[1:3, 2:65, 1:5, 3:8].swapaxes(1, 2),
    "batch inside": lambda room: np.moveaxis(room[2:6, 2:65, 1:3, 3:8], 2, 0),
    "backwards": lambda room: room[2:0:-1, 5:1:-1, 69:6:-1, 3:8],
    "columns backwards": lambda room: room[1:3, 2:6, 7:70, 7:2:-1],
    "every second column": lambda room: room[1:3, 2:6, 7:70, 1:11:2],
    "Fortran order": lambda room: room.T[:5, :63, :4, :2].T,
    "misaligned": lambda room: misaligned_view(room, room.dtype),
}


@both_dtypes
@pytest.mark.parametrize("Dv", [1, 5])
@pytest.mark.parametrize("layout", OUTS)
@few_or_many
def test_nothing_outside_out_is_written(Lq, layout, Dv, dtype, rng):
    q, k, v = normal(rng, (2, 4, Lq, 8), (2, 2, 70, 8), (2, 2, 70, Dv), dtype=dtype)
    room = rng.standard_normal((8, 80, 140, 12)).astype(dtype)
    out = OUTS[layout](room)[:, :, :Lq, :Dv]
    before = room.copy()
    attention(q, k, v, causal=True, out=out)
    expected = attention(q, k, v, causal=True)
    assert_same_bits(np.array(out), expected)
    out[...] = OUTS[layout](before)[:, :, :Lq, :Dv]
    assert_same_bits(room, before)


@pytest.mark.usefixtures("always_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shift", [0, 1, 5, 48])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_out_may_overlap_an_input(which, shift, threads, rng):
    room = rng.standard_normal((4, 2, 400, 16)).astype(np.float32)
    arrays = dict(zip("qkv", normal(rng, *[(2, 350, 16)] * 3), strict=True))
    arrays[which] = room[0, :, shift : shift + 350]
    expected = attention(**arrays, threads=threads)
    out = room[0, :, :350]
    attention(**arrays, out=out, threads=threads)
    assert_same_bits(np.array(out), expected)


def test_out_may_be_all_three_inputs(rng):
    (x,) = normal(rng, (2, 100, 16))
    expected = attention(x, x, x)
    assert_same_bits(attention(x, x, x, out=x), expected)


def test_results_never_share_memory_with_each_other_or_with_inputs(rng):
    q, k, v = normal(rng, (50, 8), (1, 8), (1, 8))
    first, second = attention(q, k, v), attention(q, k, v)
    assert not np.may_share_memory(first, second)
    assert not any(np.may_share_memory(first, x) for x in (q, k, v))


# NaN and infinity


@both_dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("kv_len", [0, 1, 15, 63, 64, 65, 255, 256, 300, [0, 77], [257, 128]])
@few_or_many
def test_what_lies_behind_kv_len_never_leaks(Lq, kv_len, bad, dtype, rng):
    q, k, v = normal(rng, (2, 4, Lq, 8), (2, 2, 310, 8), (2, 2, 310, 5), dtype=dtype)
    k_bad, v_bad = k.copy(), v.copy()
    for member, keys in enumerate(np.broadcast_to(kv_len, 2)):
        k_bad[member, :, keys:] = v_bad[member, :, keys:] = bad
    for causal in (False, True):
        options = {"kv_len": kv_len, "causal": causal, "return_lse": True}
        for actual, expected in zip(
            attention(q, k_bad, v_bad, **options), attention(q, k, v, **options), strict=True
        ):
            assert_same_bits(actual, expected)


POSITIONS = [*range(0, 290, 24), 1, 2, 7, 15, 16, 47, 63, 64, 65, 127, 255, 256, 257, 287, 289]
rows_of_the_end = pytest.mark.parametrize(
    ("group", "Lq"), [(1, 290), (3, 290), (1, 4), (2, 3)], ids=str
)


@both_dtypes
@rows_of_the_end
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_reaches_the_rows_that_see_it_and_no_others(bad, group, Lq, dtype, rng):
    q, k, v = normal(rng, (1, group, Lq, 8), (1, 1, 290, 8), (1, 1, 290, 5), dtype=dtype)
    clean = attention(q, k, v, causal=True)
    for j in POSITIONS:
        first = max(j - (290 - Lq), 0)  # the first row that sees key j
        v_bad = v.copy()
        v_bad[0, 0, j, 3] = bad
        out = attention(q, k, v_bad, causal=True)
        np.testing.assert_array_equal(out[:, :, first:, 3], bad)
        out[:, :, first:, 3] = clean[:, :, first:, 3]
        assert_same_bits(out, clean)


@both_dtypes
@rows_of_the_end
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_key_reaches_the_rows_that_see_it_and_no_others(bad, group, Lq, dtype, rng):
    """An infinite element gives a score of +inf or, beside another infinity, NaN: NaN both."""
    q, k, v = normal(rng, (1, group, Lq, 8), (1, 1, 290, 8), (1, 1, 290, 5), dtype=dtype)
    q[..., 3] = np.abs(q[..., 3])
    clean, clean_lse = attention(q, k, v, causal=True, return_lse=True)
    for j in POSITIONS:
        first = max(j - (290 - Lq), 0)
        k_bad = k.copy()
        k_bad[0, 0, j, 3] = bad
        out, lse = attention(q, k_bad, v, causal=True, return_lse=True)
        assert np.isnan(out[:, :, first:]).all()
        assert np.isnan(lse[:, :, first:]).all()
        assert_same_bits(out[:, :, :first], clean[:, :, :first])
        assert_same_bits(lse[:, :, :first], clean_lse[:, :, :first])


@both_dtypes
@pytest.mark.parametrize("Lkv", [200, 256, 260, 1030])
@few_or_many
def test_a_nan_in_an_early_span_is_not_lost_in_the_merge(Lq, Lkv, dtype, rng):
    q, k, v = normal(rng, (Lq, 8), (Lkv, 8), (Lkv, 3), dtype=dtype)
    for j in (0, Lkv // 2, Lkv - 1):
        k_bad, v_bad = k.copy(), v.copy()
        k_bad[j, 0] = NAN
        v_bad[j, 0] = NAN
        assert np.isnan(attention(q, k_bad, v)).all()
        out = attention(q, k, v_bad)
        assert np.isnan(out[:, 0]).all()
        assert_same_bits(out[:, 1:], attention(q, k, v)[:, 1:])


@both_dtypes
@pytest.mark.parametrize("hidden", [slice(0, 40), slice(0, 256), slice(0, 300), slice(290, 600)])
@few_or_many
def test_a_weight_of_zero_does_not_hide_a_nan(Lq, hidden, dtype, rng):
    """The score of such a key is -inf; other keys of the row have one, in the same span or not."""
    q, k, v = normal(rng, (Lq, 8), (600, 8), (600, 3), dtype=dtype)
    q = np.abs(q)
    k[hidden, 0] = -INF
    for j in (hidden.start, hidden.stop - 1):
        v_bad = v.copy()
        v_bad[j, 0] = NAN
        out = attention(q, k, v_bad)
        assert np.isnan(out[:, 0]).all()
        assert_same_bits(out[:, 1:], attention(q, k, v)[:, 1:])


@both_dtypes
@pytest.mark.parametrize("Lkv", [*range(1, 20), 63, 64, 65])
@few_or_many
def test_a_query_of_nan_gives_a_row_of_nan_at_every_length(Lq, Lkv, dtype, rng):
    q, k, v = normal(rng, (Lq, 8), (Lkv, 8), (Lkv, 5), dtype=dtype)
    clean = attention(q, k, v)
    for row in (0, Lq // 3, Lq - 1):
        q_bad = q.copy()
        q_bad[row] = NAN
        out, lse = attention(q_bad, k, v, return_lse=True)
        assert np.isnan(out[row]).all()
        assert np.isnan(lse[row])
        out[row] = clean[row]
        assert_same_bits(out, clean)


@both_dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_and_infinity_stand_where_the_oracle_has_them(which, bad, dtype, rng):
    shapes = (2, 4, 40, 6), (2, 2, 90, 6), (2, 2, 90, 5)
    for _ in range(5):
        arrays = dict(zip("qkv", normal(rng, *shapes, dtype=dtype), strict=True))
        array = arrays[which].reshape(-1)
        array[rng.integers(array.size, size=3)] = bad
        assert_right(**arrays, causal=True, q_start=30, kv_len=[90, 60])


@both_dtypes
@few_or_many
def test_a_score_of_plus_infinity_gives_nan(Lq, dtype):
    tiny, huge = np.finfo(dtype).smallest_normal, np.finfo(dtype).max
    for one, other in [(INF, 1.0), (huge, huge), (1.0, INF), (INF, tiny), (-INF, -INF)]:
        q = np.full((Lq, 1), one, dtype)
        for j, Lkv in itertools.product((0, 69), (70, 300)):
            k, v = np.zeros((Lkv, 1), dtype), np.ones((Lkv, 2), dtype)
            k[:, 0] = np.copysign(tiny, -one)
            k[j] = other
            out, lse = attention(q, k, v, return_lse=True, scale=1.0)
            assert np.isnan(out).all()
            assert np.isnan(lse).all()


@both_dtypes
@pytest.mark.parametrize("Lkv", [1, 5, 64, 70, 1030])
@few_or_many
def test_a_row_of_only_minus_infinity_gives_zero(Lq, Lkv, dtype, rng):
    q = np.ones((Lq, 1), dtype)
    q[1::2] = -1
    k, v = np.full((Lkv, 1), -INF, dtype), rng.standard_normal((Lkv, 2)).astype(dtype)
    out, lse = attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out[::2], 0)
    np.testing.assert_array_equal(lse[::2], -INF)
    assert np.isnan(out[1::2]).all()  # there the scores are +inf
    v[0] = NAN  # no row takes part in any key
    np.testing.assert_array_equal(attention(q, k, v)[::2], 0)


@both_dtypes
@pytest.mark.parametrize("first", [0, 63, 64, 66, 254, 256, 1090])
@few_or_many
def test_keys_of_score_minus_infinity_add_nothing(Lq, first, dtype, rng):
    """Wherever the keys with a score stand, before, after and between blocks without one."""
    q, k, v = normal(rng, (Lq, 1), (4, 1), (4, 2), dtype=dtype)
    q = np.abs(q)
    k_among = np.full((1100, 1), -INF, dtype)
    v_among = rng.standard_normal((1100, 2)).astype(dtype)
    k_among[first : first + 4], v_among[first : first + 4] = k, v
    out, lse = attention(q, k_among, v_among, return_lse=True)
    assert_within_budget(out, lse, q, k, v)


# Invariants to rounding


@both_dtypes
@pytest.mark.parametrize("Lkv", [1, 2, 63, 64, 65, 255, 257, 2049])
def test_values_of_one_give_one(Lkv, dtype, rng):
    q, k = normal(rng, (2, 63, 8), (2, Lkv, 8), dtype=dtype)
    out = attention(3 * q, k, np.ones((2, Lkv, 3), dtype))
    assert np.abs(out - 1).max() <= 16 * np.finfo(dtype).eps


@both_dtypes
@pytest.mark.parametrize("Lkv", [1, 2, 64, 257, 2049])
def test_equal_values_come_back(Lkv, dtype, rng):
    q, k, v = normal(rng, (2, 63, 8), (2, Lkv, 8), (2, 1, 3), dtype=dtype)
    out = attention(q, k, np.repeat(v, Lkv, axis=1))
    np.testing.assert_allclose(out, np.broadcast_to(v, out.shape), 16 * np.finfo(dtype).eps)


@both_dtypes
@pytest.mark.parametrize("Lkv", [2, 65, 700])
def test_the_order_of_keys_matters_to_rounding_only(Lkv, dtype, rng):
    q, k, v = normal(rng, (2, 63, 8), (2, Lkv, 8), (2, Lkv, 5), dtype=dtype)
    order = rng.permutation(Lkv)
    out, lse = attention(q, k[:, order], v[:, order], return_lse=True)
    assert_within_budget(out, lse, q, k, v)


def test_a_cut_along_keys_merges_to_the_whole(rng):
    """By the formula of merge, from the two results and their lse."""
    q, k, v = normal(rng, (2, 63, 8), (2, 300, 8), (2, 300, 5), dtype=np.float64)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    for cut in (1, 64, 150, 299):
        left, left_lse = attention(q, k[:, :cut], v[:, :cut], return_lse=True)
        right, right_lse = attention(q, k[:, cut:], v[:, cut:], return_lse=True)
        lse = np.logaddexp(left_lse, right_lse)
        out = left * np.exp(left_lse - lse)[..., None] + right * np.exp(right_lse - lse)[..., None]
        np.testing.assert_allclose(lse, whole_lse, 1e-14)
        np.testing.assert_allclose(out, whole, 1e-13, 1e-14)


# The error budget on inputs that are hard


def wide(rng, *shapes):
    """In float64 whatever is asked for: products of float32 numbers would be exact there."""
    return normal(rng, *shapes, dtype=np.float64)


def equal_scores(rng, B):
    """Every key the same, scores of thousands: the result is the mean."""
    q, k, v = wide(rng, (B, 40, 16), (B, 1, 16), (B, 300, 7))
    return 100 * q, np.repeat(30 * k, 300, axis=1), v


def equal_keys_a_block(rng, B):
    q, k, v = wide(rng, (B, 40, 16), (B, 5, 16), (B, 320, 7))
    return 10 * q, np.repeat(k, 64, axis=1), v


def one_huge_score(rng, B):
    """One key takes all of the weight, in another place for every member."""
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    q[..., 0] = 30
    k[np.arange(B), rng.integers(300, size=B), 0] = 300
    return q, k, v


def one_key_almost_takes_all(rng, B):
    """Weights of all others around the rounding of the sum."""
    q, k, v = wide(rng, (B, 40, 4), (B, 300, 4), (B, 300, 7))
    q[..., 0] = 1
    k[np.arange(B), rng.integers(300, size=B), 0] = rng.uniform(20, 60, B)
    return q, k, v


def rising_scores(rng, B):
    """Every key a new maximum: the rescale factor is never 1."""
    q, k, v = wide(rng, (B, 40, 2), (B, 300, 2), (B, 300, 7))
    q[..., 0], k[..., 0] = 1, np.linspace(0, 60, 300)
    return q, k, v


def falling_scores(rng, B):
    q, k, v = rising_scores(rng, B)
    return q, k[:, ::-1].copy(), v


def falling_below_the_clamp(rng, B):
    """Weights from 1 down to far below the smallest number, through the subnormals."""
    q, k, v = wide(rng, (B, 40, 1), (B, 300, 1), (B, 300, 7))
    q[..., 0], k[..., 0] = 1, np.linspace(0, -1500, 300)
    return q, k, v


def weights_at_the_clamp(rng, B):
    """One key of weight 1 and value 0; the values of the others show any weight they get."""
    q, k = np.ones((B, 8, 1)), np.zeros((B, 65, 1))
    k[:, 1:, 0] = -rng.uniform(80, 1100, (B, 64))
    v = np.full((B, 65, 7), 1e6)
    v[:, 0] = 1e-3
    return q, k, v


def cancelling_values(rng, B):
    """Pairs of equal keys with opposite values, 1e6 beside a rest of 1."""
    q, k, v = wide(rng, (B, 40, 16), (B, 150, 16), (B, 150, 7))
    return q, np.repeat(k, 2, axis=1), np.stack([1e6 + v, -1e6 + v], 2).reshape(B, 300, 7)


def cancelling_products(rng, B):
    """Scores that are small differences of large products."""
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    q[..., 0], q[..., 1] = 100, 37
    k[..., 1] = k[..., 0] * (-100 / 37)
    return q, k, v


def subnormal_queries(rng, B):
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    return q * 1e-40, k, v


def subnormal_values(rng, B):
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    return q, k, v * 1e-40


def subnormal_values_of_one_sign(rng, B):
    q, k, v = subnormal_values(rng, B)
    return q, k, np.abs(v)


def depth_one(rng, B):
    return wide(rng, (B, 40, 1), (B, 300, 1), (B, 300, 1))


def depth_one_large_scores(rng, B):
    q, k, v = depth_one(rng, B)
    return 30 * q, k, v


def length_one(rng, B):
    return wide(rng, (40 * B, 1, 16), (40 * B, 1, 16), (40 * B, 1, 7))


def wide_range_of_products(rng, B):
    """Elements of q and k over forty orders of magnitude; products of at most about 10."""
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    magnitude = 10.0 ** rng.uniform(-20, 20, 16)
    shrink = 10.0 ** rng.uniform(-6, 0, (B, 300, 16))
    return q * magnitude, k * shrink / magnitude, v


def wide_range_of_values(rng, B):
    q, k, v = wide(rng, (B, 40, 16), (B, 300, 16), (B, 300, 7))
    return q, k, v * 10.0 ** rng.uniform(-30, 30, (1, 1, 7))


def large_depth(rng, B):
    return wide(rng, (B, 20, 512), (B, 100, 512), (B, 100, 7))


def large_scores(rng, B):
    q, k, v = wide(rng, (B, 40, 64), (B, 300, 64), (B, 300, 7))
    return 30 * q, k, v


def several_spans(rng, B):
    q, k, v = wide(rng, (B, 7, 8), (B, 1500, 8), (B, 1500, 7))
    return 2 * q, k, v


def spans_of_rising_scores(rng, B):
    q, k, v = wide(rng, (B, 7, 2), (B, 1500, 2), (B, 1500, 7))
    q[..., 0], k[..., 0] = 1, np.linspace(0, 60, 1500)
    return q, k, v


HARD = [
    equal_scores,
    equal_keys_a_block,
    one_huge_score,
    one_key_almost_takes_all,
    rising_scores,
    falling_scores,
    falling_below_the_clamp,
    weights_at_the_clamp,
    cancelling_values,
    cancelling_products,
    subnormal_queries,
    subnormal_values,
    subnormal_values_of_one_sign,
    depth_one,
    depth_one_large_scores,
    length_one,
    wide_range_of_products,
    wide_range_of_values,
    large_depth,
    large_scores,
    several_spans,
    spans_of_rising_scores,
]


@both_dtypes
@pytest.mark.parametrize("inputs", HARD, ids=lambda inputs: inputs.__name__)
def test_the_error_is_within_twice_that_of_the_naive_formula(inputs, dtype, rng):
    # Enough that the largest errors are no draw; long double, the truth of f64, is slow.
    q, k, v = inputs(rng, B=24 if dtype is np.float32 else 12)
    assert_right(*(x.astype(dtype) for x in (q, k, v)))


@both_dtypes
@pytest.mark.parametrize("seed", range(40))
def test_any_problem(seed, dtype):
    """Random shapes, heads, lengths and options against the oracle."""
    rng = np.random.default_rng(seed)
    group, Hkv = rng.integers(1, 5, 2)
    B, Lq, Lkv = rng.integers(1, 4), rng.integers(0, 150), rng.integers(0, 300)
    if seed % 8 == 0:
        Lq, Lkv = rng.integers(1, 40), rng.integers(300, 1500)
    D, Dv = rng.integers(1, 70, 2)
    shapes = (B, Hkv * group, Lq, D), (B, Hkv, Lkv, D), (B, Hkv, Lkv, Dv)
    q, k, v = normal(rng, *shapes, dtype=dtype)
    options = {"causal": bool(rng.integers(2))}
    if rng.integers(2):
        options["kv_len"] = rng.integers(0, Lkv + 1, B)
    if rng.integers(2):
        options["q_start"] = rng.integers(-Lq - 2, Lkv + 3, B)
    if rng.integers(2):
        options["scale"] = float(rng.normal() * 0.3)
    assert_right(q, k, v, **options)
