# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""THE loop: work items over threads, key tiles over each item, a few kernel calls a tile.

What is computed is in kernels/tile.inc, what is cut is in plan.py; here is the order. Memory
that moves, for one item of `rows` query rows (strips of up to 48 in f32 on AVX-512) and one tile
of `keys`:

    K, V     keys x D elements each from L2, L3 or memory once a tile, from L2 once a strip more
    Qt, O    D x rows, stay in L2; a strip's share (12 KiB each at D = 64) passes through L1
    S        keys x strip, written and read in L1 or L2, never leaves
    out      once a row

What is stored in 16 bits is widened once a tile, into scratch that is in L2; or, for one strip
alone, block by block into L1, between products (ring.inc).

With few query rows (decode.inc) a tile is several spans of keys; K and V come once an item, the
rest stays in L1 and L2. Where threads would have too few items or uneven ones, the keys of a row
are cut into several items, whole spans each. An item streams its spans from nothing, each on its
own, and their states wait for their turn: they are merged into the state of the row in the order of
the keys, whichever thread had them.

Scratch belongs to the call: one workspace a thread, and the states of rows that are cut, taken
before the loop. Nothing is static.
"""

from cython.parallel cimport prange, threadid
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memset
from cpython.ref cimport Py_INCREF
cimport numpy as cnp
cimport openmp

import os
import time

cnp.import_array()


cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **at, size_t alignment, size_t size)


cdef extern from "sched.h" nogil:
    int sched_yield()


cdef extern from *:
    """
    static inline int64_t fc_take(int64_t *next) {
        return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    }
    static inline int64_t fc_reached(const int64_t *reached) {
        return __atomic_load_n(reached, __ATOMIC_ACQUIRE);
    }
    static inline void fc_reach(int64_t *reached, int64_t key) {
        __atomic_store_n(reached, key, __ATOMIC_RELEASE);
    }
    """
    int64_t fc_take(int64_t *) nogil
    int64_t fc_reached(const int64_t *) nogil
    void fc_reach(int64_t *, int64_t) nogil


cdef extern from "cores.h" nogil:
    struct fc_cores:
        pass
    bint fc_shares_core(fc_cores *)
    int fc_runnable()
    bint fc_take_core(fc_cores *, int)
    void fc_pause()


cdef extern from "<fenv.h>" nogil:
    ctypedef struct fenv_t:
        pass
    const fenv_t *FE_DFL_ENV
    int fegetenv(fenv_t *)
    int fesetenv(const fenv_t *)


cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1


cdef extern from "numpy/arrayobject.h":
    object PyArray_Empty(int, cnp.npy_intp *, cnp.PyArray_Descr *, int)


cdef extern from "kernels/kernels.h" nogil:
    enum:
        FC_ONE_LOAD
        FC_PIPES
        FC_BLOCK
        FC_SPAN
        FC_NV
        FC_ALIGN
    Py_ssize_t FC_FEW_STRIDE(Py_ssize_t real_size)
    Py_ssize_t FC_FEW_COLUMNS(Py_ssize_t d)

    struct fc_strip:
        int nq, nv, d, dv, fresh, mixes, cold, one_load
        int64_t rows_left
        const void *next_k
        const void *next_v
        double scale
        void *qt
        void *m
        void *l
        void *o
        void *m0
        void *l0
        void *o0
        void *s
        void *alpha
        void *end
        const char *soon
        ptrdiff_t soon_stride
        int soon_rows, soon_bytes

    struct fc_storage:
        const char *isa
        int elem_size
        double few_shares[FC_PIPES][FC_NV + 1]
        void (*pack)(const fc_strip *, const void *const *) noexcept nogil
        void (*finish)(const fc_strip *, void *const *, void *const *) noexcept nogil
        void (*stage_rows)(void *, const void *, ptrdiff_t, int, int) noexcept nogil
        void (*stage_panels)(void *, const void *, ptrdiff_t, int, int) noexcept nogil
        int line, ring_k, ring_v
        void (*scores)(const fc_strip *, const void *, ptrdiff_t, int, int) noexcept nogil
        void (*accumulate)(const fc_strip *, const void *, ptrdiff_t, ptrdiff_t, int,
                           int) noexcept nogil
        void (*pack_few)(const fc_strip *, const void *const *) noexcept nogil
        void (*scores_few)(const fc_strip *, const void *, ptrdiff_t, int, int) noexcept nogil
        void (*accumulate_few)(const fc_strip *, const void *, ptrdiff_t, ptrdiff_t, int,
                               int) noexcept nogil
        void (*finish_few)(const fc_strip *, void *const *, void *const *) noexcept nogil

    struct fc_kernels:
        const char *dtype
        const char *isa
        int lanes, panel, step, real_size
        void (*start_span)(const fc_strip *) noexcept nogil
        void (*see)(const fc_strip *, const int64_t *, int64_t) noexcept nogil
        void (*scores)(const fc_strip *, const void *, ptrdiff_t, int, int) noexcept nogil
        void (*softmax)(const fc_strip *, int, int) noexcept nogil
        void (*accumulate)(const fc_strip *, const void *, ptrdiff_t, ptrdiff_t, int,
                           int) noexcept nogil
        void (*merge)(const fc_strip *) noexcept nogil
        void (*softmax_few)(const fc_strip *, int, int) noexcept nogil
        void (*merge_few)(const fc_strip *) noexcept nogil
        double (*fma_loop)(long) noexcept nogil
        double (*read_loop)(const void *, size_t, int) noexcept nogil
        void (*flush_loop)(const void *, size_t) noexcept nogil

    const char *const *fc_isas()
    int fc_pipes()
    int fc_mixes()
    const char *fc_fastest_isa()
    const fc_kernels *fc_find_kernels(const char *arithmetic, const char *isa)
    const fc_storage *fc_find_storage(const char *dtype, const char *arithmetic, const char *isa)


cdef extern from *:
    const char *__VERSION__

_version = __VERSION__.decode()
COMPILER = _version if "lang" in _version else f"gcc {_version}"
BLOCK = FC_BLOCK
SPAN = FC_SPAN
STRIP_VECTORS = FC_NV

# Columns of the plan's two tables (plan.py names them alike).
cdef enum:
    ITEM_MEMBER, ITEM_HEAD, ITEM_ROW0, ITEM_ROW1, ITEM_KEY0, ITEM_KEY1, ITEM_END, ITEM_CHAIN
    ITEM_COLUMNS
cdef enum:
    MEMBER_Q, MEMBER_K, MEMBER_V, MEMBER_OUT, MEMBER_KV_LEN, MEMBER_Q_START
    MEMBER_COLUMNS

# Seconds between two looks at whether a signal handler wants to end the call.
cdef double SIGNAL_PERIOD = 0.05
# Seconds for which a thread that has no item waits awake for others that have: a few times what it
# takes to wake one. Not at all where threads are told to sleep, OMP_WAIT_POLICY=passive. And looks
# before it asks for the time and whether others want a core: some us.
cdef double AWAKE = 0 if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else 0.0002
cdef enum:
    SOON = 100


# What the kernels must know of the CPU: the order in which K and V are fetched where memory is the
# limit (fetch.inc has the figures), and whether loads are (scores_in_blocks.inc).
cdef int MIXES = fc_mixes(), ONE_LOAD = fc_pipes() == FC_ONE_LOAD


cdef class Storage:
    """How one dtype is read and written for one arithmetic by one instruction set."""

    cdef const fc_storage *table
    cdef readonly tuple few_shares
    cdef readonly int line, ring_k, ring_v

    def __cinit__(self, str dtype, str arithmetic, str isa):
        self.table = fc_find_storage(dtype.encode(), arithmetic.encode(), isa.encode())
        if self.table is NULL:
            raise ValueError(f"no {dtype} storage for {arithmetic} on {isa!r}, or not on this CPU")
        self.few_shares = tuple([self.table.few_shares[fc_pipes()][i] for i in range(FC_NV + 1)])
        self.line = self.table.line
        self.ring_k, self.ring_v = self.table.ring_k, self.table.ring_v


cdef class Kernels:
    """One arithmetic of one instruction set."""

    cdef const fc_kernels *table
    cdef readonly str dtype
    cdef readonly int lanes, step

    def __cinit__(self, str dtype, str isa):
        self.table = fc_find_kernels(dtype.encode(), isa.encode())
        if self.table is NULL:
            raise ValueError(f"no {dtype} arithmetic on {isa!r}, or not on this CPU")
        self.dtype = dtype
        self.lanes, self.step = self.table.lanes, self.table.step

    def fma_rate(self, double seconds):
        """Flops a second of nothing but FMAs on one thread, over about `seconds`."""
        cdef long turns = 20000
        cdef double flops, start, took
        while True:
            start = time.perf_counter()
            with nogil:
                flops = self.table.fma_loop(turns)
            took = time.perf_counter() - start
            if took >= seconds:
                return flops / took
            turns = <long>(turns * min(10.0, 1.3 * seconds / max(took, 1e-6))) + 1

    def read_bytes(self, const unsigned char[::1] buffer, int threads):
        """Read the buffer once, in parts over `threads` threads."""
        cdef Py_ssize_t part = buffer.shape[0] // threads // FC_ALIGN * FC_ALIGN
        cdef int i
        for i in prange(threads, num_threads=threads, nogil=True):
            self.table.read_loop(&buffer[i * part], part, MIXES)

    def flush(self, const unsigned char[::1] buffer):
        """Let no cache of any core have the buffer; where the CPU cannot do that, do nothing."""
        if buffer.shape[0]:
            self.table.flush_loop(&buffer[0], buffer.shape[0])


cdef struct Steps:
    # The kernels of one call: of tile.inc for many query rows, or of ring.inc for one strip of
    # them; of decode.inc for few.
    void (*pack)(const fc_strip *, const void *const *) noexcept nogil
    void (*scores)(const fc_strip *, const void *, ptrdiff_t, int, int) noexcept nogil
    void (*softmax)(const fc_strip *, int, int) noexcept nogil
    void (*accumulate)(const fc_strip *, const void *, ptrdiff_t, ptrdiff_t, int,
                       int) noexcept nogil
    void (*merge)(const fc_strip *) noexcept nogil
    void (*finish)(const fc_strip *, void *const *, void *const *) noexcept nogil


cdef Steps steps_of(const fc_kernels *kernels, const fc_storage *rows, const fc_storage *stored,
                    bint few, bint ring_k, bint ring_v) noexcept nogil:
    cdef Steps steps
    if few:
        steps.pack, steps.finish = rows.pack_few, rows.finish_few
        steps.scores, steps.accumulate = stored.scores_few, stored.accumulate_few
        steps.softmax, steps.merge = kernels.softmax_few, kernels.merge_few
    else:
        steps.pack, steps.finish = rows.pack, rows.finish
        steps.scores, steps.accumulate = kernels.scores, kernels.accumulate
        steps.softmax, steps.merge = kernels.softmax, kernels.merge
        if ring_k:
            steps.scores = stored.scores
        if ring_v:
            steps.accumulate = stored.accumulate
    return steps


cdef struct Call:
    # What is the same for every item. Strides in bytes, leading dimensions of K and V in elements.
    const fc_kernels *kernels
    const fc_storage *rows  # how queries and results are stored
    const fc_storage *stored  # how keys and values are
    Steps steps
    int few  # most rows of an item, where lanes are keys; else 0
    const char *q
    const char *k
    const char *v
    char *out
    char *lse
    Py_ssize_t q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row, lse_head
    int64_t heads, group, lq
    int d, dv, keys, strips, spans, causal, stage_k, stage_v
    double scale
    # What differs from item to item: the plan's tables.
    const int64_t *items
    const int64_t *members
    int64_t n_items
    # Rows whose keys are cut: the state of each chain of items, and the key it has reached.
    char *chains
    int64_t *reached
    # Where its threads meet; stop is set when the call is to end early.
    int threads
    int64_t *next_item
    int *stop
    void *handler_error


cdef struct Workspace:
    # One thread's scratch. A state is m, l and o of every strip, one after the other.
    fc_strip *strips
    int64_t *row_end
    const void **q_rows
    void **out_rows
    void **lse_rows
    void *k
    void *v
    int next_rows  # of the next item's first tile
    char *merged  # the state of the rows
    char *spans  # those of spans that were streamed and not yet merged


cdef char *carve(char **at, Py_ssize_t size) noexcept nogil:
    cdef char *here = at[0]
    at[0] = here + (size + FC_ALIGN - 1) // FC_ALIGN * FC_ALIGN
    return here


cdef Py_ssize_t bytes_for(const Call *call, Py_ssize_t length) noexcept nogil:
    """`length` numbers for every row of a strip: transposed, or few rows one after the other."""
    cdef Py_ssize_t lanes = call.kernels.lanes, vectors = call.kernels.step * lanes
    if call.few:
        return call.few * ((length + vectors - 1) // vectors * vectors) * call.kernels.real_size
    return length * FC_NV * lanes * call.kernels.real_size


cdef void carve_state(const Call *call, char **at, void **m, void **l, void **o) noexcept nogil:
    """The state of one strip."""
    cdef Py_ssize_t rows = FC_NV * call.kernels.lanes * call.kernels.real_size
    m[0] = carve(at, rows)
    l[0] = carve(at, rows)
    o[0] = carve(at, bytes_for(call, call.dv))


cdef Py_ssize_t state_bytes(const Call *call) noexcept nogil:
    """The state of all strips of an item."""
    cdef char *at = NULL
    cdef void *unplaced
    carve_state(call, &at, &unplaced, &unplaced, &unplaced)
    return call.strips * (at - <char *>NULL)


cdef Py_ssize_t lay_out(const Call *call, char *base, Workspace *into) noexcept nogil:
    """Cut the workspace at `base` into its parts; with base NULL only count the bytes."""
    cdef const fc_kernels *kernels = call.kernels
    cdef Py_ssize_t real = kernels.real_size, step = kernels.step
    cdef Py_ssize_t lanes = FC_NV * kernels.lanes
    cdef Py_ssize_t blocks = (call.keys + FC_BLOCK - 1) // FC_BLOCK
    cdef Py_ssize_t spans = (call.keys + FC_SPAN - 1) // FC_SPAN
    cdef Py_ssize_t columns = FC_FEW_COLUMNS(call.d) if call.few else call.d
    cdef char *at = base
    cdef fc_strip strip
    cdef int i
    into.strips = <fc_strip *>carve(&at, call.strips * sizeof(fc_strip))
    into.row_end = <int64_t *>carve(&at, call.strips * lanes * sizeof(int64_t))
    into.q_rows = <const void **>carve(&at, lanes * sizeof(void *))
    into.out_rows = <void **>carve(&at, lanes * sizeof(void *))
    into.lse_rows = <void **>carve(&at, lanes * sizeof(void *))
    into.merged = carve(&at, state_bytes(call))
    into.spans = carve(&at, call.spans * state_bytes(call))
    memset(&strip, 0, sizeof(fc_strip))
    strip.d, strip.dv, strip.scale = call.d, call.dv, call.scale
    strip.mixes, strip.one_load = MIXES, ONE_LOAD
    if call.few:
        strip.s = carve(&at, spans * call.few * FC_FEW_STRIDE(real))
    else:
        strip.s = carve(&at, bytes_for(call, blocks * FC_BLOCK))
    strip.alpha = carve(&at, blocks * lanes * real)
    strip.end = carve(&at, lanes * real)
    for i in range(call.strips):
        strip.qt = carve(&at, bytes_for(call, (columns + step - 1) // step))
        if base is not NULL:
            into.strips[i] = strip
    if call.stage_k:
        into.k = carve(&at, (<Py_ssize_t>call.keys * call.d + call.keys) * real)
    if call.stage_v:
        into.v = carve(&at, (call.keys + step - 1) // step * (call.dv + kernels.panel) * real)
    return at - base


cdef int signal_arrived(void *handler_error) noexcept with gil:
    """Let Python run its signal handlers; keep what they raise for the end of the call."""
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<list>handler_error).append(error)
        return 1
    return 0


cdef void find_rows(const Call *call, const int64_t *item, const int64_t *member, int64_t row,
                    const fc_strip *strip, const Workspace *work, int64_t *ends) noexcept nogil:
    """Where the rows of a strip are read and written, and the first key that each does not see.

    Row r of a KV head is query r // G of its query head r % G. A lane without a row works on a copy
    of the last one, and nobody reads what it finds.
    """
    cdef int64_t query = row // call.group, head = row % call.group
    cdef int64_t first_head = item[ITEM_HEAD] * call.group
    cdef const char *q = call.q + member[MEMBER_Q] + first_head * call.q_head
    cdef char *out = call.out + member[MEMBER_OUT] + first_head * call.out_head
    cdef char *lse = call.lse
    cdef int lane
    if lse is not NULL:
        lse += (item[ITEM_MEMBER] * call.heads + first_head) * call.lse_head
    for lane in range(strip.nv * call.kernels.lanes):
        work.q_rows[lane] = q + head * call.q_head + query * call.q_row
        work.out_rows[lane] = out + head * call.out_head + query * call.out_row
        work.lse_rows[lane] = lse + head * call.lse_head + query * call.kernels.real_size
        ends[lane] = member[MEMBER_KV_LEN]
        if call.causal:
            ends[lane] = max(<int64_t>0, min(ends[lane], member[MEMBER_Q_START] + query + 1))
        if lane < strip.nq - 1:
            head += 1
            if head == call.group:
                head = 0
                query += 1


cdef int pack_rows(const Call *call, const int64_t *item, const int64_t *member,
                   const Workspace *work) noexcept nogil:
    """Pack the queries of an item, a strip at a time; return how many strips there are.

    Widths are 3, 3, ... vectors, but 2 + 2 rather than 3 + 1: one vector alone is slow.
    """
    cdef const fc_kernels *kernels = call.kernels
    cdef int64_t row = item[ITEM_ROW0]
    cdef int64_t *ends
    cdef int strips = 0, vectors, i
    cdef fc_strip *strip
    cdef fc_strip merged
    while row < item[ITEM_ROW1]:
        strip = work.strips + strips
        ends = work.row_end + strips * FC_NV * kernels.lanes
        if call.few:
            strip.nq = <int>(item[ITEM_ROW1] - row)
            strip.nv = (strip.nq + kernels.lanes - 1) // kernels.lanes
        else:
            vectors = <int>((item[ITEM_ROW1] - row + kernels.lanes - 1) // kernels.lanes)
            strip.nv = 2 if vectors == 4 else min(vectors, FC_NV)
            strip.nq = <int>min(<int64_t>strip.nv * kernels.lanes, item[ITEM_ROW1] - row)
        find_rows(call, item, member, row, strip, work, ends)
        call.steps.pack(strip, work.q_rows)
        row += strip.nq
        strips += 1
    place_states(call, work.merged, work, strips, True)
    if item[ITEM_KEY0] == 0:
        # Nothing seen so far, and nothing at all when the rows see no key.
        for i in range(strips):
            merged = work.strips[i]
            merged.m, merged.l = merged.m0, merged.l0
            kernels.start_span(&merged)
    return strips


cdef void place_states(const Call *call, char *at, const Workspace *work, int strips,
                       bint merged) noexcept nogil:
    """Let the strips have their state at `at`: the merged one, or that of the span at hand."""
    cdef int i
    for i in range(strips):
        if merged:
            carve_state(call, &at, &work.strips[i].m0, &work.strips[i].l0, &work.strips[i].o0)
        else:
            carve_state(call, &at, &work.strips[i].m, &work.strips[i].l, &work.strips[i].o)


cdef void finish_rows(const Call *call, const int64_t *item, const int64_t *member,
                      const Workspace *work, int strips) noexcept nogil:
    """Write the rows of an item."""
    cdef const fc_kernels *kernels = call.kernels
    cdef int64_t row = item[ITEM_ROW0]
    cdef fc_strip *strip
    cdef int i
    for i in range(strips):
        strip = work.strips + i
        find_rows(call, item, member, row, strip, work,
                  work.row_end + i * FC_NV * kernels.lanes)
        call.steps.finish(strip, work.out_rows, work.lse_rows if call.lse is not NULL else NULL)
        row += strip.nq


cdef bint merge_spans(const Call *call, const int64_t *item, const Workspace *work, int strips,
                      int64_t key, int waiting, bint last) noexcept nogil:
    """Merge the `waiting` spans before `key`, if those before them are: tells whether they are now.

    With `last` it waits for that; only the end of the call lets it go without.
    """
    cdef int64_t start = (key - 1) // FC_SPAN * FC_SPAN - <int64_t>(waiting - 1) * FC_SPAN
    cdef int looks = 0, span, i
    cdef Py_ssize_t size = state_bytes(call)
    cdef fc_strip *strip
    if item[ITEM_CHAIN] >= 0 and item[ITEM_KEY0] > 0:
        while fc_reached(&call.reached[item[ITEM_CHAIN]]) < item[ITEM_KEY0]:
            if not last or call.stop[0]:
                return False
            looks += 1
            if looks > 1000:
                sched_yield()
    for span in range(waiting):
        place_states(call, work.spans + span * size, work, strips, False)
        for i in range(strips):
            strip = work.strips + i
            if work.row_end[i * FC_NV * call.kernels.lanes + strip.nq - 1] > start:
                call.steps.merge(strip)
        start += FC_SPAN
    return True


cdef int64_t span_end(int64_t key) noexcept nogil:
    """Where the span of a key ends."""
    return (key // FC_SPAN + 1) * FC_SPAN


cdef int set_up_strip(const Call *call, const int64_t *item, const Workspace *work, int i,
                      int64_t tile, int64_t key, int nk, fc_strip *strip,
                      int *full) noexcept nogil:
    """Strip i as the kernels need it for nk keys of one span, from `key` on, in the tile at `tile`.

    Rows see the keys up to their ends, in ascending order. Returns how many of these keys are seen
    by any row of the strip; `full` of them by all.
    """
    cdef const int64_t *ends = work.row_end + i * FC_NV * call.kernels.lanes
    cdef int n
    strip[0] = work.strips[i]
    n = <int>min(<int64_t>nk, ends[strip.nq - 1] - key)
    full[0] = <int>max(<int64_t>0, min(<int64_t>n, ends[0] - key))
    if key < FC_SPAN:
        # The first span needs no merge: it streams into the merged state itself.
        strip.m, strip.l, strip.o = strip.m0, strip.l0, strip.o0
    # The scores of one span after the other, where a tile holds several.
    strip.s = <char *>strip.s + (key - tile) // FC_SPAN * call.few * FC_FEW_STRIDE(
        call.kernels.real_size)
    strip.fresh = key % FC_SPAN == 0
    if full[0] < n:
        call.kernels.see(strip, ends, key)
    strip.rows_left = item[ITEM_KEY1] - key
    strip.cold = strip.cold and key == item[ITEM_KEY0]
    return n


cdef void begin_span(const Call *call, const Workspace *work, int strips, int waiting,
                     int64_t key) noexcept nogil:
    """Where a span begins, the strips stream into a state of its own."""
    if key % FC_SPAN == 0 and key > 0:
        place_states(call, work.spans + waiting * state_bytes(call), work, strips, False)


cdef int end_span(const Call *call, const int64_t *item, const Workspace *work, int strips,
                  int waiting, int64_t key) noexcept nogil:
    """Where a span ends, its state is merged or waits: tells how many wait now."""
    cdef bint last = key == item[ITEM_KEY1]
    if key <= FC_SPAN or (key % FC_SPAN != 0 and not last):
        return waiting
    waiting += 1
    return 0 if merge_spans(call, item, work, strips, key, waiting, last) else waiting


cdef void fetch_during(fc_strip *strip, const void *rows, ptrdiff_t stride, int n,
                       ptrdiff_t row_bytes) noexcept nogil:
    """Have n rows, which are read next, fetched by the next kernel."""
    strip.soon, strip.soon_stride = <const char *>rows, stride
    strip.soon_rows, strip.soon_bytes = n, <int>row_bytes


cdef int attend_tile(const Call *call, const int64_t *item, const Workspace *work, int strips,
                     int waiting, const char *k, const char *v, int64_t key,
                     int64_t tile_end) noexcept nogil:
    """Stream the keys of one tile, inside a span, past all strips. Tells how many spans wait."""
    cdef const fc_kernels *kernels = call.kernels
    cdef const fc_storage *stored = call.stored
    cdef const void *k_tile = k + key * call.k_row
    cdef const void *v_tile = v + key * call.v_row
    cdef ptrdiff_t ldk = call.k_row // stored.elem_size, ldv = call.v_row // stored.elem_size
    cdef ptrdiff_t panel = kernels.panel
    cdef ptrdiff_t k_bytes = call.d * stored.elem_size, v_bytes = call.dv * stored.elem_size
    cdef int nk = <int>(tile_end - key), n, full, i
    # The tile that is read after this one, of the next item after the last.
    cdef const void *next_k = work.strips.next_k
    cdef const void *next_v = work.strips.next_v
    cdef int next_rows = work.next_rows
    cdef bint first = True
    cdef fc_strip strip
    if tile_end < item[ITEM_KEY1]:
        next_k, next_v = k + tile_end * call.k_row, v + tile_end * call.v_row
        next_rows = <int>min(<int64_t>nk, item[ITEM_KEY1] - tile_end)
    if call.stage_k:
        stored.stage_rows(work.k, k_tile, ldk, nk, call.d)
        k_tile, ldk = work.k, (call.d + kernels.step - 1) // kernels.step * kernels.step
    if call.stage_v:
        stored.stage_panels(work.v, v_tile, ldv, nk, call.dv)
        v_tile, ldv = work.v, kernels.panel
        panel = <ptrdiff_t>(nk + kernels.step - 1) // kernels.step * kernels.panel
    begin_span(call, work, strips, waiting, key)
    for i in range(strips):
        n = set_up_strip(call, item, work, i, key, key, nk, &strip, &full)
        if n <= 0:
            continue
        if strip.fresh:
            kernels.start_span(&strip)
        # The first strip that sees any fetches this tile's V, if it is read where it lies, the last
        # one what the next tile begins with.
        if first and not call.stage_v:
            fetch_during(&strip, v_tile, call.v_row, nk, v_bytes)
        elif call.stage_v and i == strips - 1:
            fetch_during(&strip, next_v, call.v_row, next_rows, v_bytes)
        first = False
        call.steps.scores(&strip, k_tile, ldk, n, full)
        call.steps.softmax(&strip, n, full)
        fetch_during(&strip, next_k, call.k_row, next_rows if i == strips - 1 else 0, k_bytes)
        call.steps.accumulate(&strip, v_tile, ldv, panel, n, full)
    return end_span(call, item, work, strips, waiting, tile_end)


cdef int attend_tile_few(const Call *call, const int64_t *item, const Workspace *work,
                         int waiting, const char *k, const char *v, int64_t key,
                         int64_t tile_end) noexcept nogil:
    """The same for few rows, and a tile of one or several spans.

    First the scores of all spans, then their values: two long streams, out of memory faster than
    short ones in turn.
    """
    cdef const fc_kernels *kernels = call.kernels
    cdef Py_ssize_t elem = call.stored.elem_size
    cdef int64_t at = key, end
    cdef int n, full
    cdef fc_strip strip
    while at < tile_end:
        end = min(span_end(at), tile_end)
        n = set_up_strip(call, item, work, 0, key, at, <int>(end - at), &strip, &full)
        if n > 0:
            call.steps.scores(&strip, k + at * call.k_row, call.k_row // elem, n, full)
        at = end
    at = key
    while at < tile_end:
        end = min(span_end(at), tile_end)
        begin_span(call, work, 1, waiting, at)
        n = set_up_strip(call, item, work, 0, key, at, <int>(end - at), &strip, &full)
        if n > 0:
            if strip.fresh:
                kernels.start_span(&strip)
            call.steps.softmax(&strip, n, full)
            call.steps.accumulate(&strip, v + at * call.v_row, call.v_row // elem, kernels.panel,
                                  n, full)
        waiting = end_span(call, item, work, 1, waiting, end)
        at = end
    return waiting


cdef const char *keys_of(const Call *call, const int64_t *item) noexcept nogil:
    """Where the keys of an item's member and head begin."""
    return (call.k + call.members[item[ITEM_MEMBER] * MEMBER_COLUMNS + MEMBER_K]
            + item[ITEM_HEAD] * call.k_head)


cdef const char *values_of(const Call *call, const int64_t *item) noexcept nogil:
    return (call.v + call.members[item[ITEM_MEMBER] * MEMBER_COLUMNS + MEMBER_V]
            + item[ITEM_HEAD] * call.v_head)


cdef void expect(const Call *call, const int64_t *item, Workspace *work) noexcept nogil:
    """Have the first rows of an item fetched while the last ones of another are read."""
    work.strips.next_k = keys_of(call, item) + item[ITEM_KEY0] * call.k_row
    work.strips.next_v = values_of(call, item) + item[ITEM_KEY0] * call.v_row
    work.next_rows = <int>min(<int64_t>call.keys, item[ITEM_KEY1] - item[ITEM_KEY0])


cdef void attend_item(const Call *call, int64_t number, bint expected, char *scratch,
                      double *looked) noexcept nogil:
    """Stream the keys of one item past its query rows; it was expected, or nothing of it is there.

    The last step of the ladder, flash_attention_algorithmic, on strips; spans of keys are joined as
    in flash_attention.
    """
    cdef const int64_t *item = call.items + number * ITEM_COLUMNS
    cdef const int64_t *member = call.members + item[ITEM_MEMBER] * MEMBER_COLUMNS
    cdef const char *k = keys_of(call, item)
    cdef const char *v = values_of(call, item)
    cdef int64_t key = item[ITEM_KEY0], tile_end
    cdef int strips, waiting = 0
    cdef Workspace work

    lay_out(call, scratch, &work)
    work.strips.cold, work.next_rows = not expected, 0
    if number + call.threads < call.n_items:
        expect(call, item + call.threads * ITEM_COLUMNS, &work)
    if item[ITEM_CHAIN] >= 0:
        work.merged = call.chains + item[ITEM_CHAIN] * state_bytes(call)
    strips = pack_rows(call, item, member, &work)
    while key < item[ITEM_KEY1]:
        tile_end = min(key + call.keys, item[ITEM_KEY1])
        if call.keys <= FC_SPAN:
            tile_end = min(tile_end, span_end(key))
        if call.few:
            waiting = attend_tile_few(call, item, &work, waiting, k, v, key, tile_end)
        else:
            waiting = attend_tile(call, item, &work, strips, waiting, k, v, key, tile_end)
        key = tile_end

        if call.stop[0]:
            return
        if looked is not NULL and openmp.omp_get_wtime() - looked[0] > SIGNAL_PERIOD:
            looked[0] = openmp.omp_get_wtime()
            if signal_arrived(call.handler_error):
                call.stop[0] = 1
                return
    if item[ITEM_CHAIN] >= 0:
        fc_reach(&call.reached[item[ITEM_CHAIN]], item[ITEM_KEY1])
    if item[ITEM_KEY1] == item[ITEM_END]:
        finish_rows(call, item, member, &work, strips)


cdef void attend_some(const Call *call, char *scratch, double *looked) noexcept nogil:
    """Take items in their order until there are none, or the call is to end.

    In their order, whatever the threads do: who waits for its turn waits for an item that somebody
    has taken. In the default floating-point environment, whatever the thread has: libraries may
    have set it to round otherwise or to flush subnormals, and the bits must not depend on that.
    """
    cdef int64_t i = fc_take(call.next_item), expected = -1
    cdef const int64_t *item
    cdef fenv_t found
    fegetenv(&found)
    fesetenv(FE_DFL_ENV)
    while i < call.n_items and call.stop[0] == 0:
        attend_item(call, i, i == expected, scratch, looked)
        # Threads mostly take items in turn, so this one's next is as many further. Of that a short
        # item does not reach all the first rows.
        item = call.items + i * ITEM_COLUMNS
        expected = i + call.threads if item[ITEM_KEY1] - item[ITEM_KEY0] >= FC_SPAN else -1
        i = fc_take(call.next_item)
    fesetenv(&found)


cdef void wait_for_others(const Call *call, bint caller) noexcept nogil:
    """Wait until none of the threads has an item, awake for a while.

    In OpenMP's barrier they sleep soon (threads.waiting_asleep), and who comes last has to wake the
    others: 16 rows against 1024 keys of 8 heads 267 us, so 224 (358 with one thread). Each has
    taken an item in vain when it comes here. The caller gives way to whoever wants its core, for
    that may be one of them. Another one would have it back some ms later, and the caller would wait
    for it: it goes to the barrier where somebody else may want a core.
    """
    cdef int looks = 0, threads = openmp.omp_get_num_threads()
    cdef double begin = openmp.omp_get_wtime()
    while fc_reached(call.next_item) < call.n_items + threads and call.stop[0] == 0:
        fc_pause()
        looks += 1
        if looks < SOON:
            continue
        if openmp.omp_get_wtime() - begin > AWAKE:
            return
        if caller:
            sched_yield()
        elif looks == SOON and fc_runnable() > threads:
            return


cdef void attend_share(const Call *call, int thread, char *scratch, double *looked,
                       fc_cores *cores) noexcept nogil:
    """What one of several threads does. With cores, each is to have one of its own.

    A thread that stands in for one that OpenMP did not give has taken its core before.
    """
    cdef bint caller = threadid() == 0, has_core = False
    if cores is not NULL:
        has_core = caller or (thread == threadid() and fc_take_core(cores, call.threads))
    attend_some(call, scratch, looked if caller else NULL)
    if has_core:
        wait_for_others(call, caller)


cdef void attend_items(const Call *call, char *scratch, Py_ssize_t scratch_size) noexcept nogil:
    """Items to whichever thread is free; the calling thread looks for signals.

    One thread needs no parallel region, and does not start one. More threads than there are cores
    would be in each other's way if they waited awake.
    """
    cdef double looked = openmp.omp_get_wtime()
    cdef int threads = call.threads, thread
    cdef fc_cores cores
    cdef fc_cores *shared = NULL
    if threads == 1:
        attend_some(call, scratch, &looked)
        return
    if AWAKE > 0 and threads <= openmp.omp_get_num_procs():
        memset(&cores, 0, sizeof(cores))
        fc_shares_core(&cores)
        shared = &cores
    for thread in prange(threads, schedule="static", chunksize=1, num_threads=threads):
        attend_share(call, thread, scratch + thread * scratch_size, &looked, shared)


cdef class Prepared:
    """A call but for where its arrays lie: made once for the same question, run many times.

    strides: bytes of (q head, q row, k head, k row, v head, v row, out head, out row). shape:
    (Hq, G, Lq, D, Dv). plan: plan.Plan. out_shape: that of a result that is made here. Everything
    was checked in problem.py.
    """

    cdef Call call
    cdef const int64_t[:, ::1] members, items
    cdef cnp.npy_intp out_lengths[cnp.NPY_MAXDIMS]
    cdef int out_axes
    cdef readonly Py_ssize_t chains  # of items that hand on a state
    cdef readonly int threads  # so many will run
    cdef readonly Py_ssize_t workspace_bytes  # scratch of one thread

    def __cinit__(self, Kernels kernels, Storage rows, Storage stored, strides, shape, plan,
                  double scale, bint causal, tuple out_shape):
        cdef Workspace unplaced
        cdef int axis
        cdef Call *call = &self.call
        (call.few, call.strips, call.keys, call.spans, call.stage_k, call.stage_v, ring_k, ring_v,
         self.threads, self.chains, self.members, self.items) = plan
        call.items, call.n_items = &self.items[0, 0], self.items.shape[0]
        call.members, call.threads = &self.members[0, 0], self.threads
        call.kernels, call.rows, call.stored = kernels.table, rows.table, stored.table
        call.steps = steps_of(call.kernels, call.rows, call.stored, call.few, ring_k, ring_v)
        (call.q_head, call.q_row, call.k_head, call.k_row, call.v_head, call.v_row,
         call.out_head, call.out_row) = strides
        call.heads, call.group, call.lq, call.d, call.dv = shape
        call.lse_head = call.lq * call.kernels.real_size
        call.scale, call.causal = scale, causal
        self.workspace_bytes = lay_out(call, NULL, &unplaced)
        self.out_axes = <int>len(out_shape)
        for axis in range(self.out_axes):
            self.out_lengths[axis] = out_shape[axis]

    def attend(self, cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
               cnp.ndarray out=None, cnp.ndarray lse=None, int[::1] stop=None):
        """out, or a new array of q's dtype, and lse (or None) <- attention of every item.

        stop: one flag that ends the call early when another thread sets it. Returns out.
        """
        cdef Call call = self.call
        cdef Py_ssize_t scratch_size = self.workspace_bytes * self.threads
        cdef Py_ssize_t state = state_bytes(&call)
        cdef Py_ssize_t chained = self.chains * (state + <Py_ssize_t>sizeof(int64_t))
        cdef int own_stop = 0
        cdef int64_t next_item = 0
        cdef list handler_error = []
        cdef char *scratch = NULL

        if out is None:
            Py_INCREF(<object>cnp.PyArray_DESCR(q))  # PyArray_Empty takes one
            out = PyArray_Empty(self.out_axes, self.out_lengths, cnp.PyArray_DESCR(q), 0)
        call.q, call.k, call.v = cnp.PyArray_BYTES(q), cnp.PyArray_BYTES(k), cnp.PyArray_BYTES(v)
        call.out = cnp.PyArray_BYTES(out)
        call.lse = NULL if lse is None else cnp.PyArray_BYTES(lse)
        call.stop = &own_stop if stop is None else &stop[0]
        call.next_item = &next_item
        call.handler_error = <void *>handler_error
        if posix_memalign(<void **>&scratch, FC_ALIGN, scratch_size + chained):
            raise MemoryError(
                f"no memory for {self.threads} workspaces of {self.workspace_bytes} bytes"
            )
        call.chains = scratch + scratch_size
        call.reached = <int64_t *>(call.chains + self.chains * state)
        memset(call.chains, 0, chained)
        try:
            with nogil:
                attend_items(&call, scratch, self.workspace_bytes)
        finally:
            free(scratch)
        if handler_error:
            raise handler_error[0]
        return out


def isas():
    """Instruction sets of this build that this CPU has, the largest first."""
    cdef const char *const *name = fc_isas()
    names = []
    while name[0] is not NULL:
        names.append(name[0].decode())
        name += 1
    return names


def fastest_isa():
    """The one of them to use unless another is asked for."""
    return fc_fastest_isa().decode()


def omp_threads():
    """Threads that a parallel region started here would get."""
    return openmp.omp_get_max_threads()


def in_parallel():
    """Whether the caller runs inside a parallel region of OpenMP."""
    return bool(openmp.omp_in_parallel())
