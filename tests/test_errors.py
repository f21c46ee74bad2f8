"""Refusals: whatever cannot be done raises, names the argument, and leaves `out` as it was."""

import re

import numpy as np
import pytest

from flashcpu import attention, plan

F32 = np.float32
NAN = float("nan")


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


# Two members, five queries, seven keys.
Q, K, V = ones(2, 5, 8), ones(2, 7, 8), ones(2, 7, 3)


def refused(error, match, q=Q, k=K, v=V, **options):
    """The call raises `error`; where it gave an array to fill, not an element changed."""
    options.setdefault("out", np.full((2, 5, 3), 7, F32))
    out = options["out"]
    before = np.array(out, copy=True, subok=False)
    attention(Q, K, V, out=np.empty((2, 5, 3), F32))  # the question before it was a right one
    with pytest.raises(error, match=match):
        attention(q, k, v, **options)
    if isinstance(out, np.ndarray):
        np.testing.assert_array_equal(np.asarray(out), before)


# Shapes


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((5, 8), (7, 9), (7, 3)), "q and k must have one depth"),
        (((5, 8), (7, 8), (6, 3)), "k and v must have one length"),
        (((5, 0), (7, 0), (7, 3)), "depth .* at least 1"),
        (((2, 5, 8), (3, 7, 8), (3, 7, 3)), "leading axes do not broadcast"),
        (((2, 5, 8), (2, 7, 8), (3, 7, 3)), "leading axes do not broadcast"),
        (((2, 4, 5, 8), (3, 4, 7, 8), (4, 7, 3)), "leading axes do not broadcast"),
        (((1, 4, 5, 8), (1, 3, 7, 8), (1, 3, 7, 3)), "heads of q .* multiple"),
        (((1, 2, 5, 8), (1, 4, 7, 8), (1, 4, 7, 3)), "heads of q .* multiple"),
        (((1, 2, 5, 8), (1, 0, 7, 8), (1, 0, 7, 3)), "heads of q .* multiple"),
        (((1, 4, 5, 8), (1, 2, 7, 8), (1, 4, 7, 3)), "one number of heads"),
        (((5, 8), (1, 2, 7, 8), (1, 2, 7, 3)), "heads of q .* multiple"),
        (((8,), (7, 8), (7, 3)), "q needs at least 2 axes"),
        (((5, 8), (8,), (7, 3)), "k needs at least 2 axes"),
        (((5, 8), (7, 8), (3,)), "v needs at least 2 axes"),
        (((), (7, 8), (7, 3)), "q needs at least 2 axes"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named_and_shown(shapes, match):
    q, k, v = (ones(*shape) for shape in shapes)
    seen = re.escape("got q {}, k {}, v {}".format(*shapes))
    refused(ValueError, f"(?s){match}.*{seen}", q, k, v)


def test_more_leading_axes_than_numpy_broadcasts():
    axes = (1,) * 34
    try:
        array = ones(*axes, 5, 8)
        np.broadcast_shapes(axes, axes)
    except ValueError:
        pytest.skip("this NumPy has no arrays of so many axes")
    except RuntimeError:
        seen = re.escape(f"got q {array.shape}, k {array.shape}, v {array.shape}")
        refused(ValueError, f"(?s)too many leading axes.*{seen}", array, array, array)
    else:
        assert attention(array, array, array).shape == array.shape


# Dtypes


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize(
    "dtype",
    [bool, np.int8, int, np.uint64, complex, np.complex64, np.longdouble, object, "M8[s]", "U3"],
)
def test_dtypes_other_than_floats(which, dtype):
    if dtype is np.longdouble and np.dtype(dtype) == np.float64:
        pytest.skip("long double is float64 here")
    array = {"q": Q, "k": K, "v": V}[which].astype(int).astype(dtype)
    refused(TypeError, re.escape(f"{which} has dtype {np.dtype(dtype)}"), **{which: array})


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("something", [None, "abc", {1, 2}, object(), [[1, 2], [3, 4]]])
def test_what_is_no_array_of_floats(which, something):
    refused(TypeError, f"{which} has dtype", **{which: something})


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_ragged_lists(which):
    refused(ValueError, rf"\b{which}\b", **{which: [[1.0], [1.0, 2.0]]})


def test_structured_arrays():
    refused(TypeError, "k has dtype", k=np.zeros((2, 7, 8), [("a", F32)]))


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_mixed_dtypes(which):
    array = {"q": Q, "k": K, "v": V}[which].astype(np.float64)
    refused(TypeError, "one dtype.*got .*float64", **{which: array})


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_keys_and_values_of_two_types(which, order):
    array = {"k": K, "v": V}[which].astype(order + "f2")
    refused(TypeError, "one dtype.*got .*float16", **{which: array})


def test_queries_of_16_bits_need_such_keys():
    refused(TypeError, "one dtype.*got float16, float32", q=Q.astype(np.float16))


def test_two_types_of_16_bits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    k, v = (x.astype(ml_dtypes.bfloat16) for x in (K, V))
    refused(TypeError, "one dtype.*got float16, bfloat16", q=Q.astype(np.float16), k=k, v=v)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_masked_arrays(which):
    """Their mask would be lost in silence."""
    array = np.ma.masked_array({"q": Q, "k": K, "v": V}[which])
    refused(TypeError, f"{which} is a masked array", **{which: array})


# Options


@pytest.mark.parametrize(
    "option",
    [
        {"window": (1, 0)},
        {"mask": np.ones((5, 7), bool)},
        {"mask": False},
        {"softcap": 0.0},
        {"alibi_slopes": [0.5]},
        {"sinks": [0.5]},
    ],
    ids=str,
)
def test_options_that_do_nothing_yet(option):
    (name,) = option
    refused(NotImplementedError, f"{name} is not supported yet", **option)


@pytest.mark.parametrize(
    "value", [NAN, np.inf, -np.inf, np.float32(NAN), pytest.param(10**400, id="10**400")]
)
def test_scale_must_be_finite(value):
    refused(ValueError, "scale must be finite", scale=value)


@pytest.mark.parametrize("value", ["0.5", b"1", "x", 1j, [1.0], np.ones(2), {}, (1.0,)], ids=str)
def test_scale_must_be_a_number(value):
    refused(TypeError, "scale must be a real number", scale=value)


@pytest.mark.parametrize("value", [1, 0, None, "yes", 1.0, [True], np.ones(2, bool), {}], ids=str)
def test_causal_must_be_a_flag(value):
    refused(TypeError, "causal must be True or False", causal=value)


@pytest.mark.parametrize("value", [1, None, "yes", np.ones(2, bool)], ids=str)
def test_return_lse_must_be_a_flag(value):
    refused(TypeError, "return_lse must be True or False", return_lse=value)


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_flags_may_be_those_of_numpy(value):
    expected = attention(Q, K, V, causal=bool(value))
    np.testing.assert_array_equal(attention(Q, K, V, causal=value), expected)


@pytest.mark.parametrize(
    "value", [-1, 8, 10**30, [0, 8], [-1, 7], [0, 10**30], np.array([0, 2**64 - 1], "u8")]
)
def test_kv_len_must_be_within_the_keys(value):
    refused(ValueError, "kv_len must be between 0 and 7, got -?[0-9]+", kv_len=value)


@pytest.mark.parametrize("name", ["kv_len", "q_start"])
@pytest.mark.parametrize(
    "value",
    [
        3.0,
        True,
        "3",
        [1.0, 2.0],
        np.ones(2, bool),
        {},
        [None, 1],
        1j,
        np.timedelta64(3, "s"),
        np.array([1, 2], "m8[ns]"),
        np.array([1, True], object),
    ],
    ids=str,
)
def test_numbers_of_keys_and_positions_must_be_integers(name, value):
    refused(TypeError, f"{name} must be an int or integers", **{name: value})


@pytest.mark.parametrize("numbers", [(5, 3), (5, 5)], ids=str)
def test_numbers_of_keys_may_be_integers_of_any_type(numbers):
    expected = attention(Q, K, V, kv_len=numbers)
    for value in (
        list(numbers),
        np.array(numbers, ">u2"),
        np.array([*map(np.uint8, numbers)], object),
        (np.int8(numbers[0]), numbers[1]),
    ):
        np.testing.assert_array_equal(attention(Q, K, V, kv_len=value), expected)
    assert attention(Q[:0], K[:0], V[:0], kv_len=[]).shape == (0, 5, 3)


@pytest.mark.parametrize("name", ["kv_len", "q_start"])
def test_masked_numbers_of_keys_and_positions(name):
    refused(TypeError, f"{name} is a masked array", **{name: np.ma.array([1, 2], mask=[0, 1])})


@pytest.mark.parametrize("value", [(True, 2), (1.0, 2)], ids=str)
def test_equal_numbers_of_other_types_are_another_question(value):
    right = attention(Q, K, V, kv_len=(1, 2))
    if isinstance(value[0], float):
        refused(TypeError, "kv_len must be", kv_len=value)
    else:
        np.testing.assert_array_equal(attention(Q, K, V, kv_len=value), right)
    np.testing.assert_array_equal(attention(Q, K, V, kv_len=(1, 2)), right)


@pytest.mark.parametrize("name", ["kv_len", "q_start"])
@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 1), (0,)])
def test_numbers_of_keys_and_positions_must_fit_the_batch(name, shape):
    seen = re.escape(f"{name} has shape {shape}")
    refused(ValueError, f"{seen}.*batch", **{name: np.ones(shape, int)})


@pytest.mark.parametrize("name", ["kv_len", "q_start"])
def test_ragged_numbers_of_keys_and_positions(name):
    with pytest.raises((ValueError, TypeError), match=name):
        attention(Q, K, V, **{name: [1, [2]]})


@pytest.mark.parametrize("value", [2**61, -(2**61), 10**30, [0, 2**61]])
def test_q_start_must_be_a_position(value):
    refused(ValueError, "q_start must be between", q_start=value, causal=True)


@pytest.mark.parametrize("value", [0, -1, np.int64(0)])
def test_threads_must_be_at_least_one(value):
    refused(ValueError, "threads must be at least 1", threads=value)


@pytest.mark.parametrize("value", [1.5, 2.0, True, np.True_, "2", [2], {}], ids=str)
def test_threads_must_be_an_int(value):
    refused(TypeError, "threads must be an int", threads=value)


@pytest.mark.parametrize("value", [5, (1,), (1, 2, 3), {}, 1.5], ids=str)
def test_tiles_must_be_a_pair(value):
    refused(TypeError, "tiles must be a pair", tiles=value)


@pytest.mark.parametrize("value", [1.5, "a", True, None, [1]], ids=str)
def test_tiles_must_be_ints(value):
    refused(TypeError, r"tiles\[0\] must be an int", tiles=(value, 64))
    refused(TypeError, r"tiles\[1\] must be an int", tiles=(64, value))


@pytest.mark.parametrize("value", [0, -1])
def test_tiles_must_be_at_least_one(value):
    refused(ValueError, r"tiles\[0\] must be at least 1", tiles=(value, 64))
    refused(ValueError, r"tiles\[1\] must be at least 1", tiles=(64, value))


def test_options_are_words():
    with pytest.raises(TypeError, match="positional"):
        attention(Q, K, V, 0.5)
    with pytest.raises(TypeError, match="dropout"):
        attention(Q, K, V, dropout=0.1)


# out


def test_out_must_be_an_array():
    refused(TypeError, "out must be a NumPy array, got list", out=[1.0])
    refused(TypeError, "out must be a NumPy array", out=np.ma.zeros((2, 5, 3), F32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, int, ">f4"])
def test_out_must_have_the_dtype_of_the_result(dtype):
    seen = re.escape(str(np.dtype(dtype)))
    refused(TypeError, f"out has dtype {seen}.*float32", out=np.zeros((2, 5, 3), dtype))


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 4), (2, 1, 5, 3), (2, 5), (1, 5, 3), (30,)])
def test_out_must_have_the_shape_of_the_result(shape):
    seen = re.escape(f"out has shape {shape}, the result has (2, 5, 3)")
    refused(ValueError, seen, out=np.zeros(shape, F32))


def test_out_must_be_writeable():
    out = np.zeros((2, 5, 3), F32)
    out.setflags(write=False)
    refused(ValueError, "out is read-only", out=out)


@pytest.mark.parametrize("axis", range(3))
def test_elements_of_out_must_not_share_memory(axis):
    memory = np.zeros((2, 5, 3), F32)
    strides = [0 if i == axis else stride for i, stride in enumerate(memory.strides)]
    refused(
        ValueError, "share memory", out=np.lib.stride_tricks.as_strided(memory, strides=strides)
    )


# Memory


@pytest.mark.parametrize(
    "shapes",
    [
        ((2**50, 1), (1, 1), (1, 1)),
        ((2**40, 1), (1, 1), (1, 2**20)),
        ((2**25, 2**25, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
        ((2**25, 1, 1, 2**20, 1), (2**25, 1, 1, 1, 1), (1, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "return_lse": True}], ids=str)
def test_memory_that_cannot_be_had(shapes, options, monkeypatch):
    """Inputs of one element, broadcast; the result is more than any kernel would promise, and its
    plan, in vain, would take seconds."""
    monkeypatch.setattr(plan, "cut", None)
    q, k, v = (np.broadcast_to(F32(1), shape) for shape in shapes)
    with pytest.raises(MemoryError):
        attention(q, k, v, **options)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2**50, 1), (1, 1), (1, 2**20)),
        ((2**31, 1, 1, 1, 1), (2**31, 1, 1, 1), (1, 1)),
        ((1, 2**25), (1, 2**25), (1, 1)),
    ],
    ids=str,
)
def test_results_that_no_address_space_holds(shapes):
    q, k, v = (np.broadcast_to(F32(1), shape) for shape in shapes)
    seen = re.escape("got q {}, k {}, v {}".format(*shapes))
    with pytest.raises((ValueError, MemoryError), match=seen):
        attention(q, k, v)


def test_one_number_of_keys_for_a_large_batch_is_one_number():
    """No list of 2**40 lengths is made of it."""
    q = np.broadcast_to(F32(1), (2**40, 1, 0, 4))
    k = np.broadcast_to(F32(1), (2**40, 1, 7, 4))
    assert attention(q, k, k, kv_len=[5]).shape == (2**40, 1, 0, 4)


def test_an_empty_result_is_written_where_it_is_asked_for():
    for out in (np.empty((2, 0, 3), F32), np.empty((2, 0, 3), F32)[..., ::-1]):
        assert attention(Q[:, :0], K, V, out=out) is out


def test_a_refused_call_leaves_the_next_one_right():
    expected = attention(Q, K, V)
    refused(TypeError, "causal", causal=1)
    refused(ValueError, "kv_len", kv_len=8)
    np.testing.assert_array_equal(attention(Q, K, V), expected)


def test_a_scale_beyond_the_arithmetic():
    """float32 has no 1e39: it would be an infinity, and NaN where a score is 0."""
    refused(ValueError, "scale", scale=1e39)


def test_an_out_whose_elements_share_memory():
    memory = np.zeros(400, F32)
    out = np.lib.stride_tricks.as_strided(memory, (2, 5, 3), (60, 8, 4))
    with pytest.raises(ValueError, match="out may have elements that share memory"):
        attention(Q, K, V, out=out)


def test_an_empty_result_takes_no_memory_however_large_the_batch():
    q = np.broadcast_to(F32(1), (2**40, 1, 0, 4))
    k = v = np.broadcast_to(F32(1), (2**40, 1, 2, 4))
    assert attention(q, k, v).shape == (2**40, 1, 0, 4)


def test_broadcast_axes_are_not_repeated_by_a_copy():
    """A copy is needed for the last axis; 2**33 repetitions of it would not fit."""
    k = np.broadcast_to(np.ones((8, 7), F32).T, (2**33, 7, 8))
    q = np.broadcast_to(Q[0, :0], (2**33, 0, 8))
    assert attention(q, k, k).shape == (2**33, 0, 8)
