"""`KVCache`: keys and values of positions already seen, kept for the queries still to come.

Storage and no arithmetic: what is appended is laid down side by side, and `attention` reads it
where it lies. Next: api.py.
"""

import math
import operator

import numpy as np

from flashcpu import problem
from flashcpu.api import attention

STORED = ("float16", "bfloat16", "float32", "float64")
ROUNDED = ("float16", "bfloat16")
# Positions of the first memory: a block of the kernels. Short caches do not grow step by step.
LEAST = 64
HUGE_PAGE = 2 << 20
LINE = 64


class KVCache:
    """Keys and values of a batch of sequences, contiguous, each with a length of its own.

    ``cache.append(k, v)``, then ``out = cache.attend(q)``: the last query stands at the last key.
    However a sequence was cut into such steps, the bits are those of one causal prefill; where a
    window hides keys, those of `attention` over the window alone. Not safe to use from several
    threads at once while one of them changes it. Copies, by `copy` or pickle, have memory of their
    own.

    Parameters
    ----------
    batch : int
        B, the sequences.
    heads : int
        Hkv, the KV heads.
    depth : int
        D of the keys.
    value_depth : int, optional
        Dv of the values. Default: depth.
    dtype : dtype, default float32
        float32, float64, float16 or bfloat16 (``ml_dtypes.bfloat16``): how keys and values are
        stored. `attend` takes what `attention` takes: to 16 bits also queries in float32.
    capacity : int, optional
        Positions of a member for which there is memory, for good. Default: as many as come; the
        memory grows.
    window : int, optional
        A query sees at most the last `window` positions, its own the last of them; older ones are
        dropped once in a while. Memory for at most 2 * (window + n) positions, n those of the
        largest append (64 positions at least), and the old memory beside it while they are dropped.
        A capacity must then be at least twice the window, and capacity - window positions can be
        appended at once, however many were before.

    Raises
    ------
    ValueError
        For numbers below 1 and for a capacity below twice the window.
    TypeError
        For numbers that are no int, and for other dtypes.
    MemoryError
        If there is no memory for the capacity.

    Examples
    --------
    >>> import numpy as np
    >>> from flashcpu import attention
    >>> from flashcpu.kvcache import KVCache
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 6, 100, 64), np.float32)
    >>> k, v = rng.standard_normal((2, 1, 2, 100, 64), np.float32)  # 3 query heads share a KV head
    >>> cache = KVCache(batch=1, heads=2, depth=64)
    >>> cache.append(k[:, :, :98], v[:, :, :98])  # prefill
    >>> steps = [cache.attend(q[:, :, :98])]
    >>> for i in (98, 99):  # decode
    ...     cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    ...     steps.append(cache.attend(q[:, :, i : i + 1]))
    >>> cache
    KVCache(batch=1, heads=2, depth=64, value_depth=64, dtype=float32, lengths=[100], capacity=196)

    The bits are those of one causal prefill:

    >>> bool((np.concatenate(steps, axis=2) == attention(q, k, v, causal=True)).all())
    True
    """

    def __init__(
        self,
        batch,
        heads,
        depth,
        value_depth=None,
        *,
        dtype=np.float32,
        capacity=None,
        window=None,
    ):
        B, Hkv, D, Dv = (
            problem.at_least_one(value, name)
            for value, name in (
                (batch, "batch"),
                (heads, "heads"),
                (depth, "depth"),
                (depth if value_depth is None else value_depth, "value_depth"),
            )
        )
        dtype = _dtype_to_store(np.float32 if dtype is None else dtype)
        self._fixed = capacity is not None
        capacity = problem.at_least_one(capacity, "capacity") if self._fixed else 0
        self._window = None if window is None else problem.at_least_one(window, "window")
        # The last positions that a query can see; without a window, all.
        self._reach = problem.FARTHEST if window is None else self._window
        if self._fixed and window is not None and capacity < 2 * self._window:
            raise ValueError(
                f"capacity must be at least twice the window, or old positions would be dropped at "
                f"every append; got capacity {capacity}, window {self._window}"
            )
        # Lists: for the few members of a batch faster than arrays.
        self._lengths = [0] * B
        self._start = [0] * B
        self._k = _memory((B, Hkv, capacity, D), dtype)
        self._v = _memory((B, Hkv, capacity, Dv), dtype)

    def __getstate__(self):
        """For copies, also shallow ones, and pickles: all but the memory that holds nothing."""
        state = dict(self.__dict__)
        memory = state.pop("_k"), state.pop("_v")
        counts = list(map(operator.sub, state["_lengths"], state["_start"]))
        held = [[m[:, :n] for m, n in zip(x, counts, strict=True)] for x in memory]
        return state, [(x.shape, x.dtype.type) for x in memory], held

    def __setstate__(self, state):
        state, kinds, held = state
        self.__dict__.update(state)
        memory = [_memory(shape, _dtype_to_store(kind)) for shape, kind in kinds]
        for stored, members in zip(memory, held, strict=True):
            for member, rows in zip(stored, members, strict=True):
                member[:, : rows.shape[1]] = rows
        self._k, self._v = memory

    # What is there

    @property
    def lengths(self):
        """Positions of each member, int64 (B,), a copy. With a window, also those dropped."""
        return np.array(self._lengths, np.int64)

    @property
    def start(self):
        """The first position that each member still holds, int64 (B,), a copy. 0 if no window."""
        return np.array(self._start, np.int64)

    @property
    def keys(self):
        """Read-only view (B, Hkv, L, D), L = max(lengths - start): row i is position start + i.

        What stands behind a member's last position may be anything. The view stays valid when the
        cache grows, and is then no longer its memory.
        """
        return self._view(self._k)

    @property
    def values(self):
        """Read-only view (B, Hkv, L, Dv), like `keys`."""
        return self._view(self._v)

    @property
    def dtype(self):
        """How keys and values are stored."""
        return self._k.dtype

    @property
    def window(self):
        """The last positions that are attended, or None for all."""
        return self._window

    @property
    def capacity(self):
        """Positions of a member for which there is memory now."""
        return self._k.shape[2]

    @property
    def nbytes(self):
        """Bytes of that memory; what was never written is usually not resident, but for the rest of
        a huge page (2 MiB) of which some was."""
        return self._k.nbytes + self._v.nbytes

    def __repr__(self):
        B, Hkv, capacity, D = self._k.shape
        lengths = np.array2string(self.lengths, separator=", ", threshold=8, edgeitems=2)
        window = "" if self._window is None else f", window={self._window}"
        return (
            f"KVCache(batch={B}, heads={Hkv}, depth={D}, value_depth={self._v.shape[3]}, "
            f"dtype={self.dtype.name}, lengths={lengths}, capacity={capacity}{window})"
        )

    # What changes it

    def append(self, k, v, count=None):
        """Store new positions behind those of each member. A failed append changes nothing.

        Parameters
        ----------
        k : (B, Hkv, n, D) array
            Keys, in the dtype of the cache; a 16-bit cache also takes float32 and rounds it to
            nearest, ties to even (what is beyond float16 becomes infinite, with NumPy's warning).
        v : (B, Hkv, n, Dv) array
            Values, likewise.
        count : int or (B,) integers, default n
            How many of the n positions are real, for each member: the first ones. The others are
            padding and are not stored. `attend` needs the same count for queries padded alike.

        Raises
        ------
        ValueError
            For shapes that do not fit, a count outside 0 to n, and more positions than a fixed
            capacity holds.
        TypeError
            For other dtypes, for masked arrays, and for a count that is no integer.
        FloatingPointError
            For what is beyond float16, or too small for it, under ``np.errstate(all="raise")``.
        MemoryError
            If there is no memory to grow.
        """
        k, v = self._incoming(k, "k"), self._incoming(v, "v")
        B, Hkv, _, D = self._k.shape
        Dv = self._v.shape[3]
        n = k.shape[2] if k.ndim == 4 else -1
        if k.shape != (B, Hkv, n, D) or v.shape != (B, Hkv, n, Dv):
            raise ValueError(
                f"k and v must be (B, Hkv, n, D) = ({B}, {Hkv}, n, {D}) and (B, Hkv, n, Dv) = "
                f"({B}, {Hkv}, n, {Dv}); got k {k.shape}, v {v.shape}"
            )
        counts = self._per_member(count, "count", n, n)
        lengths = list(map(operator.add, self._lengths, counts))
        # What can fail comes before what changes: rounding may raise under np.errstate. And all
        # changes at once, at the end, for a signal handler may raise anywhere.
        k, v = self._to_store(k, counts), self._to_store(v, counts)
        memory, start = self._room_for(lengths)
        ends = list(map(operator.sub, lengths, start))
        for stored, new in zip(memory, (k, v), strict=True):
            if _alike(ends) and _alike(counts):
                stored[:, :, ends[0] - counts[0] : ends[0]] = new
            else:
                for b, (end, real) in enumerate(zip(ends, counts, strict=True)):
                    stored[b, :, end - real : end] = new[b]
        (self._k, self._v), self._start, self._lengths = memory, start, lengths

    def truncate(self, length):
        """Keep the first `length` positions of each member, and forget those behind.

        Parameters
        ----------
        length : int or (B,) integers
            At most what is there. With a window, 0 or such that the window before it is still
            held; what the last append added can always be forgotten.

        Raises
        ------
        ValueError
            For other lengths; the cache is unchanged.
        TypeError
            For what is no integer.
        """
        self._go_back(self._per_member(length, "length", max(self._lengths)))

    def rewind(self, count):
        """Forget the last `count` positions of each member, as after rejected speculation.

        Parameters
        ----------
        count : int or (B,) integers
            At most what is there; with a window, see `truncate`.

        Raises
        ------
        ValueError
            For other counts; the cache is unchanged.
        TypeError
            For what is no integer.
        """
        counts = self._per_member(count, "count", max(self._lengths))
        self._go_back(list(map(operator.sub, self._lengths, counts)))

    def clear(self):
        """Forget all positions, and keep the memory."""
        self._go_back([0] * len(self._lengths))

    # What it is for

    def attend(
        self,
        q,
        *,
        count=None,
        causal=True,
        scale=None,
        return_lse=False,
        out=None,
        threads=None,
        tiles=None,
    ):
        """`attention` of q and what is stored.

        Parameters
        ----------
        q : (B, Hq, Lq, D) array
            Queries; Hq a multiple of Hkv.
        count : int or (B,) integers, default Lq
            How many of the Lq queries are real, for each member: the first ones, as in `append`.
            The last real query stands at the member's last position. Rows behind are padding:
            they are written and mean nothing.
        causal : bool, default True
            A query sees the keys up to its position. False: all that are stored; with a window the
            last `window` of them, whichever the query.
        scale, return_lse, out, threads, tiles
            As in `attention`.

        Returns
        -------
        out : (B, Hq, Lq, Dv) array, of the dtype of q
        lse : (B, Hq, Lq) array
            Only with return_lse. Without causal a member that has no position gives out = 0 and
            lse = -inf, as in `attention`.

        Raises
        ------
        ValueError
            For shapes that do not fit, for a count outside 0 to Lq, and for real causal queries
            that would stand before a member's first position: append comes first. With a window,
            for queries before the last append, where what their windows begin with was dropped.
        TypeError
            For dtypes that `attention` does not take with those stored, for masked arrays, and for
            options of the wrong type.

        Notes
        -----
        Several causal queries of which a window hides keys see different keys, and cost a call of
        `attention` each.
        """
        q = problem.as_array(q, "q", "its data, and count")
        B, Hkv, _, D = self._k.shape
        if q.ndim != 4 or q.shape[0] != B or q.shape[1] % Hkv or q.shape[3] != D:
            raise ValueError(
                f"q must be (B, Hq, Lq, D) = ({B}, a multiple of {Hkv}, Lq, {D}), got {q.shape}"
            )
        Lq = q.shape[2]
        causal = problem.flag(causal, "causal")
        counts = self._per_member(count, "count", Lq, Lq)
        seen = [min(length, self._reach) for length in self._lengths]
        before = list(map(operator.sub, self._lengths, counts))
        if causal and min(before) < 0:
            b = before.index(min(before))
            raise ValueError(
                f"member {b} has {self._lengths[b]} positions, fewer than its {counts[b]} causal "
                f"queries: append their keys first (and pass count where some are padding)"
            )
        # Rows before those that are seen; without a window there are none.
        hidden = list(map(operator.sub, self._held(), seen))
        options = {"causal": causal, "scale": scale, "threads": threads, "tiles": tiles}
        if _alike(hidden) and (Lq == 1 or not causal or seen == self._lengths):
            before = list(map(operator.sub, seen, counts))
            # All the memory and kv_len, not a view of what is held: without hidden rows the same
            # shapes at every step, for which `attention` remembers what it checked. Tuples, for
            # what it remembers must stay what it is.
            return attention(
                q,
                self._k[:, :, hidden[0] :],
                self._v[:, :, hidden[0] :],
                kv_len=seen[0] if _alike(seen) else tuple(seen),
                q_start=before[0] if _alike(before) else tuple(before),
                return_lse=return_lse,
                out=out,
                **options,
            )
        # Queries that see different windows, a call each: attention hides keys only at the end.
        q = problem.readable(problem.operand(q, "q"))
        asked = problem.of(q, self._k, self._v, problem.scale_factor(scale), causal)
        # What a call looks at, also if there will be none.
        return_lse = problem.flag(return_lse, "return_lse")
        problem.thread_count(threads)
        problem.tile_sizes(tiles)
        if out is not None:
            problem.output(out, asked, q.dtype)
        result = np.zeros(asked.out_shape, q.dtype)
        lse = np.full(asked.lse_shape, -np.inf, asked.lse_dtype)
        for member, queries, keys in self._windows(before, counts, Lq, causal):
            result[member, :, queries], lse[member, :, queries] = attention(
                q[member, :, queries],
                self._k[member, :, keys],
                self._v[member, :, keys],
                return_lse=True,
                **options,
            )
        if out is not None:
            out[...] = result
            result = out
        return (result, lse) if return_lse else result

    def _windows(self, before, counts, Lq, causal):
        """(member, queries, rows of memory) that see each other and no others, as slices."""
        windows = []
        for b, (length, start) in enumerate(zip(self._lengths, self._start, strict=True)):
            ends = {length: slice(0, Lq)}
            if causal and Lq > 1:
                # The first ones see all there is, the others each its own; padding sees nothing.
                whole = min(max(self._reach - before[b], 0), counts[b])
                ends = {before[b] + i + 1: slice(i, i + 1) for i in range(whole, counts[b])}
                if whole:
                    ends[before[b] + whole] = slice(0, whole)
            for end, queries in ends.items():
                first = max(0, end - self._reach)
                if first < start:
                    raise ValueError(
                        f"member {b}: the window of the query at position {end - 1} begins at "
                        f"{first}, and what is before {start} was dropped"
                    )
                windows.append((slice(b, b + 1), queries, slice(first - start, end - start)))
        return windows

    def _incoming(self, array, name):
        """An array to store: checked for its dtype, and apart from the cache's own memory."""
        array = problem.as_array(array, name, "its data, and count")
        if array.dtype != self.dtype:
            found, stored = array.dtype.name, self.dtype.name  # of any byte order
            if found != stored and not (found == "float32" and stored in ROUNDED):
                raise TypeError(f"{name} has dtype {array.dtype}, the cache stores {self.dtype}")
        return array.copy() if self._may_share(array) else array

    def _may_share(self, array):
        """Whether an array may lie in the memory of the cache. Nearly always its owner tells that,
        which takes 2 us when the CPU's caches hold something else; addresses take 20."""
        owner = _owner(array)
        if type(owner) is np.ndarray and owner.base is None and owner.flags.owndata:
            return owner is _owner(self._k) or owner is _owner(self._v)
        return np.may_share_memory(array, self._k) or np.may_share_memory(array, self._v)

    def _to_store(self, new, counts):
        """The real ones of the new positions in the dtype of the cache: an array, or a list of one
        for each member."""
        if not _alike(counts):
            return [
                x[:, :n].astype(self.dtype, copy=False) for x, n in zip(new, counts, strict=True)
            ]
        if new.shape[2] > counts[0]:
            new = new[:, :, : counts[0]]
        return new if new.dtype == self.dtype else new.astype(self.dtype)

    def _held(self):
        """Rows of memory that hold a position, of each member."""
        return list(map(operator.sub, self._lengths, self._start))

    def _room_for(self, lengths):
        """Memory for these lengths, and the first position of each member in it: what there is, or
        new, with everything that is to be kept.

        Old memory is never moved in, so that views of it stay what they were. New memory is for
        twice what is needed: over all growth less than one copy a position, and an append after a
        prefill finds room; the spare half is usually not resident before it is written, but for the
        rest of huge pages. The same rule makes a window's trimming rare: once in as many positions
        as it keeps.
        """
        if max(map(operator.sub, lengths, self._start)) <= self.capacity:
            return (self._k, self._v), self._start
        # The window as it was before this append: its first new query sees that, and so all of the
        # append can be rewound.
        start = [max(s, n - self._reach) for s, n in zip(self._start, self._lengths, strict=True)]
        needs = list(map(operator.sub, lengths, start))
        need = max(needs)
        if self._fixed and need > self.capacity:
            b = needs.index(need)
            hint = ""
            if self._window is not None:
                free = self.capacity - self._window
                hint = f"; {free} at once always fit beside the window of {self._window}"
            raise ValueError(
                f"member {b} has length {self._lengths[b]} and would have {lengths[b]}: {need} "
                f"positions to hold, beyond the capacity {self.capacity}{hint}"
            )
        B, Hkv, _, D = self._k.shape
        capacity = self.capacity if self._fixed else max(LEAST, 2 * need)
        k = _memory((B, Hkv, capacity, D), self.dtype)
        v = _memory((B, Hkv, capacity, self._v.shape[3]), self.dtype)
        for new, old in ((k, self._k), (v, self._v)):
            for b, (kept, held, length) in enumerate(
                zip(start, self._start, self._lengths, strict=True)
            ):
                new[b, :, : length - kept] = old[b, :, kept - held : length - held]
        return (k, v), start

    def _go_back(self, lengths):
        """Set the lengths to smaller ones, if all that their windows see is there."""
        for b, (length, now, start) in enumerate(
            zip(lengths, self._lengths, self._start, strict=True)
        ):
            if not 0 <= length <= now:
                raise ValueError(f"member {b} has {now} positions, it cannot go back to {length}")
            first = max(0, length - self._reach)
            if length and first < start:
                raise ValueError(
                    f"member {b} cannot go back to {length} positions: the window before them "
                    f"begins at {first}, and what is before {start} was dropped"
                )
        self._start = [s if length else 0 for s, length in zip(self._start, lengths, strict=True)]
        self._lengths = lengths

    def _per_member(self, value, name, most, default=None):
        """value as a list of one int a member."""
        B = len(self._lengths)
        if value is None:
            if default is None:
                raise TypeError(f"{name} must be an int or integers, one a batch member, got None")
            return [default] * B
        value = problem.per_member(value, name, (B,), default, 0, most)
        return [value] * B if isinstance(value, int) else list(value)

    def _view(self, stored):
        view = stored[:, :, : max(self._held())]
        view.flags.writeable = False
        return view


def _dtype_to_store(dtype):
    """The one dtype object of that type, in the byte order of this machine: `attention` knows an
    array again by it."""
    try:
        found = np.dtype(np.dtype(dtype).type)
    except TypeError:
        found = None
    if found is None or found.name not in STORED:
        raise TypeError(
            f"dtype must be one of {', '.join(STORED)}, the second one as ml_dtypes.bfloat16; "
            f"got {dtype!r}"
        )
    return found


def _memory(shape, dtype):
    """An array that begins with a cache line, from half a huge page on with one of those.

    So a vector lies in one line, not in two (Ice Lake, float32 out of L2, D = 64, 1 and 12 query
    rows a KV head: 0.86 and 0.93 of the time). In huge pages reading is up to a third faster: from
    4 MiB on NumPy asks the system for them, and an array gets them where it begins with one. A page
    is resident as a whole, so an array of half a page may take twice its memory.
    """
    size = math.prod(shape) * dtype.itemsize
    page = HUGE_PAGE if size >= HUGE_PAGE // 2 else LINE
    try:
        memory = np.empty(max(size, page) + page, np.uint8)
        start = -memory.ctypes.data % page
        return memory[start : start + size].view(dtype).reshape(shape)
    except (MemoryError, ValueError):  # ValueError: larger than an address
        raise MemoryError(f"no memory for a KV cache of shape {shape}, {dtype}") from None


def _owner(array):
    return array if array.base is None else array.base


def _alike(numbers):
    return min(numbers) == max(numbers)
