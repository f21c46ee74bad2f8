"""KVCache: what was appended is what is attended, in the bits of one causal prefill."""

import copy
import doctest
import pickle

import numpy as np
import pytest
from checks import assert_same_bits, bits, normal
from numpy.lib.stride_tricks import as_strided

from flashcpu import attention, kvcache, plan, problem
from flashcpu.kvcache import KVCache

NAN = float("nan")
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
heads = pytest.mark.parametrize(("Hq", "Hkv"), [(2, 2), (6, 2)], ids=["MHA", "grouped"])
storage = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])


def stored_dtype(name):
    """The dtype of that name; bfloat16 needs ml_dtypes."""
    return np.dtype(
        pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else getattr(np, name)
    )


def sequence(rng, B, Hq, Hkv, L, D=16, Dv=9, dtype=np.float32):
    """q, k, v of L positions."""
    return normal(rng, (B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv), dtype=dtype)


def filled(k, v, **options):
    """A cache that holds k and v."""
    B, Hkv, _, D = k.shape
    cache = KVCache(B, Hkv, D, v.shape[3], **{"dtype": k.dtype, **options})
    cache.append(k, v)
    return cache


def content(cache):
    """All that a user can see of a cache: the held rows of each member, and the numbers."""
    rows = []
    for b, held in enumerate(cache.lengths - cache.start):
        rows += [bits(x[b, :, :held]).tobytes() for x in (cache.keys, cache.values)]
    return rows, cache.lengths.tolist(), cache.start.tolist(), cache.capacity


def poison(cache):
    """NaN wherever nothing is stored: all memory behind what each member holds."""
    for b, held in enumerate(cache.lengths - cache.start):
        cache._k[b, :, held:] = NAN
        cache._v[b, :, held:] = NAN


# One answer


@heads
@pytest.mark.parametrize("chunk", [1, 7, 48, 100])
def test_any_chunking_gives_the_bits_of_one_causal_prefill(chunk, Hq, Hkv, arithmetic, rng):
    L, dtype = 330, arithmetic  # more than a span of keys
    q, k, v = sequence(rng, 2, Hq, Hkv, L, dtype=dtype)
    cache, outs, lses = KVCache(2, Hkv, 16, 9, dtype=dtype), [], []
    for i in range(0, L, chunk):
        now = np.s_[:, :, i : i + chunk]
        cache.append(k[now], v[now])
        poison(cache)
        out, lse = cache.attend(q[now], return_lse=True)
        outs.append(out)
        lses.append(lse)
    expected, expected_lse = attention(q, k, v, causal=True, return_lse=True)
    assert_same_bits(np.concatenate(outs, axis=2), expected)
    assert_same_bits(np.concatenate(lses, axis=2), expected_lse)


@heads
def test_members_of_different_lengths_are_as_each_alone(Hq, Hkv, any_dtype, rng):
    """A ragged prefill in two padded chunks, then steps that not every member takes."""
    dtype = any_dtype
    q, k, v = sequence(rng, 4, Hq, Hkv, 400, dtype=dtype)
    cache = KVCache(4, Hkv, 16, 9, dtype=dtype)
    alone = attention(q, k, v, causal=True)
    for count in ([3, 0, 250, 64], [1, 48, 40, 0], *[[1, 1, 1, 1]] * 3, *[[1, 0, 1, 1]] * 3):
        n, before = max(count), cache.lengths
        padded = [np.full((*x.shape[:2], n, x.shape[3]), NAN, dtype) for x in (q, k, v)]
        for b, (at, real) in enumerate(zip(before, count, strict=True)):
            for new, x in zip(padded, (q, k, v), strict=True):
                new[b, :, :real] = x[b, :, at : at + real]
        cache.append(*padded[1:], count)
        poison(cache)
        out = cache.attend(padded[0], count=count)
        for b, (at, real) in enumerate(zip(before, count, strict=True)):
            assert_same_bits(out[b, :, :real], alone[b, :, at : at + real])
    assert cache.lengths.tolist() == [10, 51, 296, 70]


def test_queries_padded_in_front_need_no_count(rng):
    """The default: the last query stands at each member's last position."""
    q, k, v = sequence(rng, 2, 2, 2, 9)
    cache = KVCache(2, 2, 16, 9)
    cache.append(k, v, [9, 5])
    out = cache.attend(q[:, :, :4])
    for b, length in enumerate((9, 5)):
        member = (x[b : b + 1, :, :length] for x in (k, v))
        assert_same_bits(out[b : b + 1], attention(q[b : b + 1, :, :4], *member, causal=True))


def test_options_of_attend_are_those_of_attention(rng):
    q, k, v = sequence(rng, 2, 4, 2, 70)
    cache = filled(k, v)
    given = np.empty((2, 4, 70, 9), np.float32)
    assert cache.attend(q, causal=False, scale=0.5, out=given, threads=1, tiles=(48, 64)) is given
    assert_same_bits(given, attention(q, k, v, scale=0.5))
    assert_same_bits(cache.attend(list(q)), attention(q, k, v, causal=True))


def test_an_empty_cache_is_seen_as_nothing(rng):
    q, _, _ = sequence(rng, 2, 2, 2, 3)
    out, lse = KVCache(2, 2, 16, 9).attend(q, causal=False, return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    assert KVCache(2, 2, 16, 9).attend(q[:, :, :0]).shape == (2, 2, 0, 9)


# Storage


@storage
def test_what_was_appended_is_what_is_held(dtype, rng):
    dtype = stored_dtype(dtype)
    _, k, v = (x.astype(dtype) for x in sequence(rng, 2, 2, 3, 50))
    cache = KVCache(2, 3, 16, 9, dtype=dtype)
    for i in range(0, 50, 7):
        cache.append(k[:, :, i : i + 7], v[:, :, i : i + 7])
    assert cache.dtype == cache.keys.dtype == cache.values.dtype == dtype
    assert_same_bits(cache.keys, k)
    assert_same_bits(cache.values, v)
    assert cache.nbytes == 2 * 3 * cache.capacity * (16 + 9) * dtype.itemsize


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_is_rounded_to_nearest_even_on_storing(dtype, rng):
    dtype = stored_dtype(dtype)
    ulp = 2.0**-10 if dtype == np.float16 else 2.0**-7
    x = np.float32([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.51 * ulp, -1 - ulp / 2, 0.0, np.inf, NAN])
    rounded = np.float32([1, 1 + 2 * ulp, 1 + ulp, -1, 0, np.inf, NAN])
    x = np.tile(x, (1, 2, 3, 1))
    cache = KVCache(1, 2, 7, dtype=dtype)
    cache.append(x, x.astype(dtype))  # each for itself
    for held in (cache.keys, cache.values):
        assert_same_bits(held.astype(np.float32), np.broadcast_to(rounded, x.shape).copy())


def test_a_16_bit_cache_takes_nothing_else():
    x = np.ones((1, 1, 1, 2), np.float32)
    cache = KVCache(1, 1, 2, dtype=np.float16, capacity=4)
    for dtype in (np.float64, np.int16, np.uint16):
        failing(cache, TypeError, "the cache stores float16", "append", x, x.astype(dtype))


def test_float32_beyond_float16_becomes_infinite_with_a_warning():
    x = np.full((1, 1, 1, 2), 1e6, np.float32)
    cache = KVCache(1, 1, 2, dtype=np.float16)
    with pytest.warns(RuntimeWarning, match="overflow"):
        cache.append(x, x)
    assert np.isinf(cache.keys).all()


def test_growth_keeps_the_content_and_is_rare(rng):
    _, k, v = sequence(rng, 2, 1, 2, 1000)
    cache = KVCache(2, 2, 16, 9)
    capacities = []
    for i in range(1000):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        capacities.append(cache.capacity)
    assert_same_bits(cache.keys, k)
    assert_same_bits(cache.values, v)
    assert len(set(capacities)) <= 5
    assert cache.capacity <= 2 * 1000


def test_growth_keeps_members_of_different_lengths(rng):
    _, k, v = sequence(rng, 3, 1, 2, 150)
    cache = KVCache(3, 2, 16, 9)
    cache.append(k[:, :, :60], v[:, :, :60], [60, 0, 7])
    cache.append(k, v, [150, 90, 1])
    assert cache.lengths.tolist() == [210, 90, 8]
    for held, x in ((cache.keys, k), (cache.values, v)):
        assert_same_bits(held[0], np.concatenate([x[0, :, :60], x[0]], axis=1))
        assert_same_bits(held[1, :, :90], x[1, :, :90])
        assert_same_bits(held[2, :, :8], np.concatenate([x[2, :, :7], x[2, :, :1]], axis=1))


@pytest.mark.parametrize("counts", [[2, 2], [3, 1]], ids=["alike", "different"])
def test_padding_is_not_rounded(counts, rng):
    """What it holds may be beyond float16, and is nobody's business."""
    k, v = normal(rng, *[(2, 2, 4, 16)] * 2)
    cache = KVCache(2, 2, 16, dtype=np.float16)
    for b, count in enumerate(counts):
        k[b, :, count:] = v[b, :, count:] = 1e30
    with np.errstate(all="raise"):
        cache.append(k, v, counts)
    for b, count in enumerate(counts):
        assert_same_bits(cache.keys[b, :, :count], k[b, :, :count].astype(np.float16))
        assert_same_bits(cache.values[b, :, :count], v[b, :, :count].astype(np.float16))


def test_members_may_come_to_one_length_by_different_counts(rng):
    _, k, v = sequence(rng, 2, 1, 2, 6)
    cache = KVCache(2, 2, 16, 9)
    cache.append(k, v, [5, 3])
    new = [np.stack([np.roll(x[b], -at, axis=1) for b, at in enumerate((5, 3))]) for x in (k, v)]
    cache.append(*new, [1, 3])
    assert_same_bits(cache.keys, k)
    assert_same_bits(cache.values, v)


def test_an_append_after_a_prefill_finds_room(rng):
    _, k, v = sequence(rng, 1, 1, 1, 500)
    cache = filled(k, v)
    memory = cache.keys.base
    cache.append(k[:, :, :400], v[:, :, :400])
    assert cache.keys.base is memory


def test_a_fixed_capacity_is_there_from_the_start_and_stays(rng):
    _, k, v = sequence(rng, 1, 1, 1, 20)
    cache = KVCache(1, 1, 16, 9, capacity=20)
    memory = cache.keys.base
    for i in range(20):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert cache.capacity == 20
    assert cache.keys.base is memory
    assert_same_bits(cache.keys, k)


def test_views_are_read_only_and_outlive_growth(rng):
    _, k, v = sequence(rng, 1, 1, 2, 60)
    cache = filled(k, v)
    for view in (cache.keys, cache.values):
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0, 0, 0] = 1
    keys, values = cache.keys, cache.values
    for _ in range(5):
        cache.append(k, v)
    assert_same_bits(keys, k)
    assert_same_bits(values, v)


def test_the_numbers_given_out_are_copies(rng):
    _, k, v = sequence(rng, 2, 1, 1, 5)
    cache = filled(k, v)
    for numbers in (cache.lengths, cache.start):
        assert numbers.dtype == np.int64
        assert numbers.shape == (2,)
        numbers[:] = 99
    assert cache.lengths.tolist() == [5, 5]
    assert cache.start.tolist() == [0, 0]


@pytest.mark.parametrize("page", [1, kvcache.HUGE_PAGE], ids=["huge pages", "small"])
@pytest.mark.parametrize("view", [np.asarray, as_strided], ids=["own views", "another owner's"])
@pytest.mark.parametrize("crossed", [True, False], ids=["values as keys", "as they were"])
def test_a_cache_can_be_appended_to_itself(page, view, crossed, rng, monkeypatch):
    """Views of its own memory, whatever overlaps what; members exchanged."""
    monkeypatch.setattr(kvcache, "HUGE_PAGE", page)
    _, k, v = sequence(rng, 2, 1, 2, 40, D=9)
    cache = filled(k, v)
    keys, values = view(cache.keys), view(cache.values)
    cache.truncate(3)
    if crossed:
        keys, values, k, v = values, keys, v, k
    cache.append(keys[::-1], values[::-1], [40, 39])
    assert_same_bits(cache.keys[0, :, 3:], k[1])
    assert_same_bits(cache.values[0, :, 3:], v[1])
    assert_same_bits(cache.keys[1, :, 3:42], k[0, :, :39])
    assert_same_bits(cache.values[1, :, 3:42], v[0, :, :39])


def test_keys_and_values_begin_with_a_cache_line_or_a_huge_page():
    for capacity in [*range(1, 200, 7), 1 << 13]:
        cache = KVCache(1, 3, 64, 16, dtype=np.float16, capacity=capacity)
        assert cache.keys.ctypes.data % 64 == cache.values.ctypes.data % 64 == 0
    assert cache.keys.ctypes.data % kvcache.HUGE_PAGE == 0


def test_any_layout_can_be_appended(rng):
    _, k, v = sequence(rng, 2, 1, 2, 5)
    cache = KVCache(2, 2, 16, 9)
    cache.append(k.swapaxes(1, 2).copy().swapaxes(1, 2), v[..., ::-1].copy()[..., ::-1])
    cache.append(np.asfortranarray(k), v.astype(">f4"))
    assert_same_bits(cache.keys, np.concatenate([k, k], axis=2))
    assert_same_bits(cache.values, np.concatenate([v, v], axis=2))


def out_of_band(cache):
    """A copy by pickle whose numbers lie in memory that cannot be written."""
    buffers = []
    stream = pickle.dumps(cache, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(stream, buffers=[bytes(buffer) for buffer in buffers])


@storage
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), out_of_band],
    ids=["copy", "deepcopy", "pickle", "out of band"],
)
def test_a_copy_is_the_same_cache_with_memory_of_its_own(copied, dtype, rng):
    dtype = stored_dtype(dtype)
    q, k, v = (x.astype(dtype) for x in sequence(rng, 2, 2, 1, 50))
    cache = KVCache(2, 1, 16, 9, dtype=dtype, window=40)
    for _ in range(3):
        cache.append(k, v, [50, 20])
    assert cache.start.tolist() == [60, 0]
    before = content(cache)
    again = copied(cache)
    assert content(again) == before
    assert again.keys.dtype is cache.keys.dtype
    assert again.keys.ctypes.data % 64 == again.values.ctypes.data % 64 == 0
    assert_same_bits(again.attend(q[:, :, :20]), cache.attend(q[:, :, :20]))
    again.append(q[:, :1], v)
    assert content(cache) == before
    again = copied(cache)
    cache.append(q[:, :1], v)
    assert content(again) == before


def test_a_copy_does_not_have_what_was_never_stored():
    assert len(pickle.dumps(KVCache(1, 8, 64, capacity=4096))) < 1000


# Going back


@pytest.mark.parametrize("back", ["truncate", "rewind"])
def test_what_was_forgotten_was_never_there(back, rng):
    """Speculative decoding: rejected positions leave no trace."""
    q, k, v = sequence(rng, 2, 4, 2, 300)
    wrong_k, wrong_v = normal(rng, (2, 2, 200, 16), (2, 2, 200, 9))
    cache, never = filled(k[:, :, :100], v[:, :, :100]), filled(k[:, :, :100], v[:, :, :100])
    cache.append(wrong_k, wrong_v)
    if back == "truncate":
        cache.truncate(100)
    else:
        cache.rewind(200)
    for each in (cache, never):
        each.append(k[:, :, 100:], v[:, :, 100:])
    assert content(cache)[:3] == content(never)[:3]
    assert_same_bits(cache.attend(q), never.attend(q))
    assert_same_bits(cache.attend(q), attention(q, k, v, causal=True))


def test_members_go_back_each_by_its_own(rng):
    q, k, v = sequence(rng, 3, 2, 2, 40)
    cache = filled(k, v)
    cache.rewind([0, 1, 40])
    assert cache.lengths.tolist() == [40, 39, 0]
    cache.truncate(np.array([10, 39, 0]))
    assert cache.lengths.tolist() == [10, 39, 0]
    cache.truncate([10, 10, 0])
    cache.append(k[:, :, 10:12], v[:, :, 10:12], [2, 2, 0])
    poison(cache)
    out = cache.attend(q[:, :, 10:12], count=[2, 2, 0])
    assert_same_bits(out[:2], attention(q, k, v, causal=True)[:2, :, 10:12])
    assert (out[2] == 0).all()
    cache.clear()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.keys.shape == (3, 2, 0, 16)


# Errors


def failing(cache, error, match, *call):
    """The call raises, and leaves the cache as it was."""
    before = content(cache)
    name, *arguments = call
    with pytest.raises(error, match=match):
        getattr(cache, name)(*arguments)
    assert content(cache) == before


def test_a_failed_append_changes_nothing(rng):
    _, k, v = sequence(rng, 2, 1, 2, 20)
    cache = KVCache(2, 2, 16, 9, capacity=30)
    cache.append(k, v, [20, 5])
    # NumPy 2's has no byte order.
    text = np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else np.dtype("U")
    for new_k, new_v, count, error, match in (
        (k, v, None, ValueError, r"member 0 has length 20 .* 40: .* beyond the capacity 30"),
        (k, v, [11, 0], ValueError, r"member 0 has length 20 .* 31: .* beyond the capacity 30"),
        (k, v, [10, 21], ValueError, "count must be between 0 and 20, got 21"),
        (k, v, -1, ValueError, "count must be between 0 and 20, got -1"),
        (k, v, [1, 2, 3], ValueError, r"count has shape \(3,\)"),
        (k, v, 1.5, TypeError, "count must be an int"),
        (k, v[:, :, :3], 1, ValueError, r"must be .* got k \(2, 2, 20, 16\), v \(2, 2, 3, 9\)"),
        (k[:1], v[:1], 1, ValueError, r"got k \(1, 2, 20, 16\)"),
        (k[:, :1], v[:, :1], 1, ValueError, r"got k \(2, 1, 20, 16\)"),
        (v, k, 1, ValueError, r"got k \(2, 2, 20, 9\)"),
        (k[:, :, 0], v[:, :, 0], 1, ValueError, r"got k \(2, 2, 16\)"),
        (k, v.astype(np.float64), 1, TypeError, "v has dtype float64, the cache stores float32"),
        (k.astype(np.float16), v, 1, TypeError, "k has dtype float16, the cache stores float32"),
        (k.astype(int), v, 1, TypeError, "k has dtype int64, the cache stores float32"),
        (k.astype(text), v, 1, TypeError, "k has dtype .*, the cache stores float32"),
        (np.ma.masked_array(k), v, 1, TypeError, "k is a masked array"),
        (k, [[1.0], [1.0, 2.0]], 1, ValueError, "v is not an array"),
        (k, v, np.ma.array([1, 3], mask=[0, 1]), TypeError, "count is a masked array"),
    ):
        failing(cache, error, match, "append", new_k, new_v, count)
    cache.append(k, v, [10, 20])  # what just fits
    failing(cache, ValueError, "capacity 30", "append", k[:, :, :1], v[:, :, :1], [1, 0])


@pytest.mark.parametrize("n", [2**54, 2**58], ids=["no memory", "no address"])
def test_an_append_without_memory_changes_nothing(n, rng):
    _, k, v = sequence(rng, 1, 1, 1, 20, D=4, Dv=2)
    cache = filled(k, v)
    endless = np.broadcast_to(np.float32(0), (1, 1, n, 4))
    failing(cache, MemoryError, f"{2 * (n + 20)}", "append", endless, endless[..., :2])
    cache.append(k, v)
    assert_same_bits(cache.keys, np.concatenate([k, k], axis=2))


def test_an_append_without_memory_for_the_values_alone_changes_nothing(rng, monkeypatch):
    _, k, v = sequence(rng, 1, 1, 1, 70)
    cache = filled(k, v)

    memory, sizes = np.empty, []

    def no_values(size, dtype):
        sizes.append(size)
        if len(sizes) == 2:
            raise MemoryError
        return memory(size, dtype)

    monkeypatch.setattr(kvcache.np, "empty", no_values)
    failing(
        cache, MemoryError, "no memory for a KV cache", "append", *[x.repeat(2, 2) for x in (k, v)]
    )


def test_an_interrupted_append_changes_nothing(rng, monkeypatch):
    """A signal handler may raise anywhere, also between new memory and what is to be in it."""
    _, k, v = sequence(rng, 2, 1, 1, 32)
    alike = kvcache._alike
    for calls in range(20):
        cache = filled(k, v, window=4)
        cache.append(k, v)
        left = iter(range(calls))

        def interrupted(numbers, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return alike(numbers)

        before = content(cache)
        with monkeypatch.context() as patch:
            patch.setattr(kvcache, "_alike", interrupted)
            try:
                cache.append(k, v, [32, 31])
                break
            except KeyboardInterrupt:
                assert content(cache) == before
        cache.rewind(32)
    assert calls >= 4
    assert cache.lengths.tolist() == [96, 95]


def test_a_float_that_cannot_be_stored_changes_nothing():
    """Whoever asked NumPy to raise on overflow gets the error and an unchanged cache."""
    x = np.float32([[[[1, 2], [3, 1e6]]]])
    cache = KVCache(1, 1, 2, dtype=np.float16, capacity=4)
    cache.append(x[:, :, :1], x[:, :, :1])
    with np.errstate(over="raise"):
        failing(cache, FloatingPointError, "overflow", "append", x, x)


def test_going_back_too_far_changes_nothing(rng):
    _, k, v = sequence(rng, 2, 1, 1, 20)
    cache = KVCache(2, 1, 16, 9)
    cache.append(k, v, [20, 5])
    failing(cache, ValueError, "member 1 has 5 positions, it cannot go back to -1", "rewind", 6)
    failing(cache, ValueError, "member 1 has 5 positions, .* to 6", "truncate", [20, 6])
    failing(cache, ValueError, "between 0 and 20, got 21", "truncate", 21)
    failing(cache, ValueError, "between 0 and 20, got -1", "truncate", -1)
    failing(cache, ValueError, "shape", "truncate", [1, 2, 3])
    failing(cache, TypeError, "length", "truncate", 1.0)
    failing(cache, TypeError, "length", "truncate", None)
    failing(cache, TypeError, "count", "rewind", True)


def test_attend_needs_queries_that_fit(rng):
    q, k, v = sequence(rng, 2, 4, 2, 20)
    cache = KVCache(2, 2, 16, 9)
    cache.append(k, v, [20, 5])
    with pytest.raises(ValueError, match="member 1 has 5 positions, fewer than its 20 causal"):
        cache.attend(q)
    for wrong in (q[:1], q[..., :9], q[0]):
        with pytest.raises(ValueError, match=r"q must be .* = \(2, a multiple of 2, Lq, 16\), got"):
            cache.attend(wrong)
    with pytest.raises(ValueError, match=r"a multiple of 2, .* got \(2, 3, 20, 16\)"):
        cache.attend(q[:, :3], count=[20, 5])
    with pytest.raises(TypeError):
        cache.attend(q.astype(np.float64), count=[20, 5])
    with pytest.raises(TypeError, match="q is a masked array; pass its data, and count"):
        cache.attend(np.ma.masked_array(q), count=[20, 5])
    with pytest.raises(ValueError, match="q is not an array"):
        cache.attend([[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="count must be between 0 and 20"):
        cache.attend(q, count=21)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0, 1, 8), {}, ValueError, "batch must be at least 1"),
        ((1, 0, 8), {}, ValueError, "heads must be at least 1"),
        ((1, 1, 0), {}, ValueError, "depth must be at least 1"),
        ((1, 1, 8, 0), {}, ValueError, "value_depth must be at least 1"),
        ((1, 1, 8.0), {}, TypeError, "depth must be an int"),
        ((1, True, 8), {}, TypeError, "heads must be an int"),
        ((1, 1, 8), {"capacity": 0}, ValueError, "capacity must be at least 1"),
        ((1, 1, 8), {"window": 0}, ValueError, "window must be at least 1"),
        ((1, 1, 8), {"window": 5, "capacity": 9}, ValueError, "capacity 9, window 5"),
        ((1, 1, 8), {"dtype": np.int8}, TypeError, "dtype must be one of .* got .*int8"),
        ((1, 1, 8), {"dtype": "c8"}, TypeError, "dtype must be one of .* got 'c8'"),
        ((1, 1, 8), {"dtype": "fp16"}, TypeError, "dtype must be one of .* got 'fp16'"),
        ((1, 1, 8), {"dtype": 5}, TypeError, "dtype must be one of .* got 5"),
        ((1, 1, 8), {"capacity": 2**58}, MemoryError, "no memory"),
    ],
)
def test_a_cache_that_cannot_be(arguments, options, error, match):
    with pytest.raises(error, match=match):
        KVCache(*arguments, **options)


def test_the_dtype_of_a_cache_may_be_named_in_any_way():
    for name in ("half", "f2", ">f2", np.float16, np.dtype(np.float16)):
        assert KVCache(1, 1, 8, dtype=name).dtype == np.float16
    assert KVCache(1, 1, 8, dtype=None).dtype == KVCache(1, 1, 8).dtype == np.float32


# Window


def windowed(x, length, window):
    """The last `window` of `length` positions."""
    return x[:, :, max(0, length - window) : length]


@pytest.mark.usefixtures("isa")
@both_dtypes
@heads
@pytest.mark.parametrize("window", [1, 5, 64, 100])
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
def test_a_window_sees_its_last_positions_and_no_others(fixed, window, Hq, Hkv, dtype, rng):
    q, k, v = sequence(rng, 2, Hq, Hkv, 350, dtype=dtype)
    capacity = 2 * window if fixed else None
    cache = KVCache(2, Hkv, 16, 9, dtype=dtype, window=window, capacity=capacity)
    for i in range(350):
        now = np.s_[:, :, i : i + 1]
        cache.append(k[now], v[now])
        poison(cache)
        seen = (windowed(x, i + 1, window) for x in (k, v))
        assert_same_bits(cache.attend(q[now]), attention(q[now], *seen, causal=True))
    assert cache.lengths.tolist() == [350, 350]
    assert (cache.start > 0).all()
    assert cache.capacity == capacity if fixed else cache.capacity <= max(64, 2 * (window + 1))
    start = cache.start[0]
    assert start <= 350 - window
    assert_same_bits(cache.keys, k[:, :, start:350])
    assert_same_bits(cache.values, v[:, :, start:350])


@pytest.mark.usefixtures("isa")
def test_a_window_of_members_of_different_lengths(rng):
    """Windows that begin at different rows: each member is as if it were alone."""
    q, k, v = sequence(rng, 3, 4, 2, 500)
    cache = KVCache(3, 2, 16, 9, window=30)
    out, trimmed = np.empty((3, 4, 1, 9), np.float32), 0
    cache.append(k[:, :, :200], v[:, :, :200], [200, 3, 40])
    for _ in range(250):
        at = cache.lengths
        new = [np.stack([x[b, :, i : i + 1] for b, i in enumerate(at)]) for x in (q, k, v)]
        start = cache.start
        cache.append(*new[1:])
        trimmed += (cache.start != start).any()
        poison(cache)
        given, lse = cache.attend(new[0], out=out, return_lse=True)
        assert given is out
        for b, i in enumerate(at):
            seen = (windowed(x[b : b + 1], i + 1, 30) for x in (k, v))
            alone, alone_lse = attention(new[0][b : b + 1], *seen, return_lse=True)
            assert_same_bits(out[b : b + 1], alone)
            assert_same_bits(lse[b : b + 1], alone_lse)
        assert_same_bits(cache.attend(new[0]), out)
    assert 0 < trimmed < 10


def test_the_result_of_different_windows_may_overlap_the_queries(rng):
    q, k, v = sequence(rng, 2, 2, 2, 20, Dv=16)
    cache = KVCache(2, 2, 16, window=4)
    cache.append(k, v, [20, 15])
    query = q[:, :, :1].copy()
    expected = cache.attend(query)
    crossed = query[::-1]
    cache.attend(query, out=crossed)
    assert_same_bits(crossed, expected)
    with pytest.raises(ValueError, match="shape"):
        cache.attend(query, out=np.empty((2, 2, 2, 16), np.float32))
    with pytest.raises(TypeError):
        cache.attend(query, out=np.empty((2, 2, 1, 16), np.float64))


def test_a_window_within_which_all_lies_hides_nothing(rng):
    q, k, v = sequence(rng, 1, 2, 2, 100)
    cache = filled(k, v, window=100)
    assert_same_bits(cache.attend(q), attention(q, k, v, causal=True))


def test_without_causal_all_queries_see_the_window(rng):
    q, k, v = sequence(rng, 1, 2, 2, 100)
    cache = filled(k, v, window=30)
    seen = (windowed(x, 100, 30) for x in (k, v))
    assert_same_bits(cache.attend(q, causal=False), attention(q, *seen))


@pytest.mark.parametrize("n", [2, 29, 31, 70])
def test_several_causal_queries_see_each_its_window(n, rng):
    """As one at a time would, in every chunk and across the position where the window begins."""
    q, k, v = sequence(rng, 1, 6, 2, 210)
    cache = KVCache(1, 2, 16, 9, window=30)
    for i in range(0, 210, n):
        chunk = np.s_[:, :, i : i + n]
        cache.append(k[chunk], v[chunk])
        poison(cache)
        out, lse = cache.attend(q[chunk], return_lse=True)
        for row, end in enumerate(range(i + 1, min(i + n, 210) + 1)):
            query = q[:, :, end - 1 : end]
            alone = attention(query, *(windowed(x, end, 30) for x in (k, v)), return_lse=True)
            assert_same_bits(out[:, :, row : row + 1], alone[0])
            assert_same_bits(lse[:, :, row : row + 1], alone[1])
    assert cache.start[0] > 0


def test_several_causal_queries_of_members_of_different_lengths(rng):
    q, k, v = sequence(rng, 3, 4, 2, 50)
    cache = KVCache(3, 2, 16, 9, window=8)
    cache.append(k[:, :, :40], v[:, :, :40], [40, 3, 20])
    counts = [5, 9, 0]
    cache.append(k[:, :, 40:], v[:, :, 40:], counts)
    out = np.full((3, 4, 10, 9), 7, np.float32)
    _, lse = cache.attend(q[:, :, 40:], count=counts, out=out, return_lse=True)
    for b, before in enumerate([40, 3, 20]):
        seen = [np.concatenate([x[b : b + 1, :, :before], x[b : b + 1, :, 40:]], 2) for x in (k, v)]
        for i in range(counts[b]):
            query = q[b : b + 1, :, 40 + i : 41 + i]
            alone = (windowed(x, before + i + 1, 8) for x in seen)
            alone, alone_lse = attention(query, *alone, return_lse=True)
            assert_same_bits(out[b : b + 1, :, i : i + 1], alone)
            assert_same_bits(lse[b : b + 1, :, i : i + 1], alone_lse)
    # Bad options change nothing of out.
    before = out.copy()
    with pytest.raises(TypeError, match="threads"):
        cache.attend(q[:, :, 40:], count=counts, out=out, threads="2")
    with pytest.raises(ValueError, match="share memory"):
        cache.attend(
            q[:, :, 40:],
            count=counts,
            out=np.lib.stride_tricks.as_strided(out, out.shape, (0,) * 4),
        )
    assert_same_bits(out, before)


@pytest.mark.parametrize("count", [None, 0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": -1}, ValueError),
        ({"scale": "a"}, TypeError),
        ({"tiles": 3}, TypeError),
        ({"causal": "yes"}, TypeError),
        ({"return_lse": 1}, TypeError),
        ({"out": np.zeros((2, 1, 3, 9))}, TypeError),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind_whatever_is_left_to_do(window, count, options, error, rng):
    q, k, v = sequence(rng, 2, 1, 1, 10)
    cache = filled(k, v, window=window)
    with pytest.raises(error, match=next(iter(options))):
        cache.attend(q[:, :, :3], count=count, **options)


@pytest.mark.parametrize("window", [None, 4])
def test_queries_in_the_other_byte_order(window, rng):
    q, k, v = sequence(rng, 2, 1, 1, 10)
    cache = KVCache(2, 1, 16, 9, window=window)
    cache.append(k, v, [10, 9])
    expected = cache.attend(q[:, :, :3])
    swapped = q[:, :, :3].astype(">f4")
    assert cache.attend(swapped).dtype == np.float32
    out = np.empty_like(expected)
    assert cache.attend(swapped, out=out) is out
    assert_same_bits(out, expected)
    with pytest.raises(TypeError, match="out has dtype >f4"):
        cache.attend(swapped, out=out.astype(">f4"))


def test_members_of_different_lengths_are_checked_and_planned_once(rng, monkeypatch):
    """For all layers of a model: each asks what the one before it asked."""
    q, k, v = sequence(rng, 3, 2, 1, 20)
    layers = [filled(k, v) for _ in range(4)]
    made = []
    for module, name in ((plan, "cut"), (problem, "of")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, f=original: made.append(f.__name__) or f(*args)
        )
    for _ in range(2):
        made.clear()
        for layer in layers:
            layer.append(k[:, :, :2], v[:, :, :2], [2, 1, 0])
            layer.attend(q[:, :, :2], count=[2, 1, 0])
        assert sorted(made) == ["cut", "of"]


def test_queries_whose_window_was_dropped_are_an_error(rng):
    q, k, v = sequence(rng, 1, 2, 2, 300)
    cache = KVCache(1, 2, 16, 9, window=30)
    for i in range(300):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    start = int(cache.start[0])
    assert start > 0
    held = 300 - 29 - start  # queries whose windows are held
    assert cache.attend(q[:, :, 300 - held :]).shape == (1, 2, held, 9)
    with pytest.raises(ValueError, match=rf"member 0: .* begins at {start - 1}, .* before {start}"):
        cache.attend(q[:, :, 299 - held :])


def test_the_last_append_can_always_be_rewound(rng):
    """Whenever old positions were dropped, the window before the last append is still there."""
    window = 20
    q, k, v = sequence(rng, 1, 2, 2, 400)
    cache, length = KVCache(1, 2, 16, 9, window=window), 0
    while length < 300:
        n = int(rng.integers(1, 40))
        now = np.s_[:, :, length : length + n]
        cache.append(k[now], v[now])
        keep = int(rng.integers(0, n + 1))
        cache.rewind(n - keep)
        length += keep
        poison(cache)
        if length:
            query = q[:, :, length - 1 : length]
            seen = (windowed(x, length, window) for x in (k, v))
            assert_same_bits(cache.attend(query), attention(query, *seen))
    assert cache.start[0] > 0


def test_going_back_beyond_what_was_dropped_changes_nothing(rng):
    q, k, v = sequence(rng, 2, 2, 2, 200)
    cache = KVCache(2, 2, 16, 9, window=20, capacity=50)
    for i in range(200):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1], [1, i < 10])
    least = int(cache.start[0]) + 20
    failing(cache, ValueError, "member 0 cannot go back to 50 positions", "truncate", [50, 5])
    failing(cache, ValueError, f"to {least - 1} positions", "truncate", [least - 1, 5])
    failing(cache, ValueError, "to 3 positions: the window .* begins at 0, ", "truncate", [3, 3])
    cache.truncate([least, 5])
    cache.truncate([0, 5])  # a member starts anew
    assert cache.start.tolist() == [0, 0]
    cache.append(k[:, :, :3], v[:, :, :3], [3, 0])
    out = cache.attend(q[:, :, :3], count=[3, 0])
    assert_same_bits(out[:1], attention(*(x[:1, :, :3] for x in (q, k, v)), causal=True))


def test_a_long_append_is_held_whole_and_given_back_later(rng):
    _, k, v = sequence(rng, 1, 1, 1, 1000)
    cache = KVCache(1, 1, 16, 9, window=10)
    cache.append(k, v)
    assert cache.keys.shape[2] == 1000
    while cache.start[0] == 0:
        cache.append(k[:, :, :100], v[:, :, :100])
    assert cache.capacity == 2 * (10 + 100)
    fixed = KVCache(1, 1, 16, 9, window=10, capacity=100)
    fixed.append(k[:, :, :90], v[:, :, :90])
    failing(
        fixed,
        ValueError,
        "101 positions to hold, beyond the capacity 100; 90 at once always fit",
        "append",
        k[:, :, :91],
        v[:, :, :91],
    )
    fixed.append(k[:, :, :90], v[:, :, :90])
    assert fixed.start.tolist() == [80]


# What it says of itself


def test_repr_has_all_that_matters(rng):
    cache = KVCache(2, 3, 8, 4, dtype=np.float64, capacity=10, window=5)
    assert repr(cache) == (
        "KVCache(batch=2, heads=3, depth=8, value_depth=4, dtype=float64, lengths=[0, 0], "
        "capacity=10, window=5)"
    )
    assert len(repr(KVCache(1000, 1, 1))) < 150


def test_the_examples_hold():
    results = doctest.testmod(kvcache)
    assert results.attempted > 5
    assert results.failed == 0


def test_large_caches_begin_with_a_huge_page():
    """Only such arrays get any; small ones take no more memory than they need."""
    large = KVCache(1, 3, 64, dtype=np.float32, capacity=2048)
    assert large.keys.ctypes.data % (2 << 20) == large.values.ctypes.data % (2 << 20) == 0
    assert large.nbytes == 2 * 3 * 2048 * 64 * 4
    # NumPy asks the system for huge pages from 4 MiB on.
    for positions, has_huge_pages in ((1 << 12, True), ((1 << 12) - 1, False)):
        around = KVCache(1, 1, 64, dtype=np.float32, capacity=positions)  # 1 MiB and less
        assert (around.keys.base.nbytes >= 4 << 20) == has_huge_pages
    assert large.keys.base.nbytes >= 4 << 20
