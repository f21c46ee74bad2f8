"""How it is cut: tiles, work items, threads. Pure integers; knows neither arrays nor the extension.

A work item is a run of query rows of one KV head of one batch member, and the keys they see. Row r
of a KV head is query r // G of its query head r % G: grouped heads are more rows, and the rows of a
strip stand close together under the diagonal. Where threads would have too few items, or uneven
ones, an item is a run of their keys, whole spans, and the items of the same rows are a chain. No
choice made here can change a bit of the result. Next: _engine.pyx.
"""

from typing import NamedTuple

import numpy as np

# Columns of the two tables; _engine.pyx has the same enumerations.
MEMBER, HEAD, ROW0, ROW1, KEY0, KEY1, END, CHAIN = range(8)
Q, K, V, OUT, KV_LEN, Q_START = range(6)

# Largest tile: strips of query rows, and keys. Four strips share each K and V tile out of L2; two
# blocks of keys halve the traffic of O (python bench/tiles.py; 4 x 128 was best or within 1 % in
# f32 and f64 for D = 64 and 128). Pairs that are zipped block by block are 2 to 3 % faster in whole
# spans: 16 to 2048 rows, a strip at a time.
STRIPS = 4
KEYS = 128
# Most scores of a tile of few rows: as many spans as fit into L1 are read as one stream of K, then
# one of V. Out of memory one query is 2 to 6 % faster so on one thread than span by span (f32, f16,
# bf16; 8/8 and 32/8 heads; beside tiles=(1, 256)), two threads and four queries are not slower.
SCORES = 4096
# Work below which waking threads costs more than they save, 100 to 400 us: they sleep between calls
# (threads.waiting_asleep). Two virtual cores of a busy machine, us with one thread and two, 9 heads
# over 3, D = 64, after a product of NumPy, and after 1 ms of pause: 1024 keys (3 million) 160 and
# 143, 149 and 223; 2048 285 and 323, 316 and 465; 4096 524 and 751, 550 and 691; 12 heads of 197
# rows and keys (60 million) 1936 and 1820, 2394 and 2061. To wake one took 50 to 150 us there.
# Since a thread leaves a core that another one of the call has (cores.h; Zen 4): 2048 keys 102 and
# 140, 105 and 117; with 4 queries (9 million) 208 and 242, 211 and 171; 8192 keys 401 and 445, 408
# and 313. Beside threads of a BLAS that wait in a loop the second one has to share a core.
SMALL = 10_000_000
# Multiply-adds in the time that it takes to read a number out of memory.
READING = 8
# What it costs to bring a tile of K and V to the strips of an item, in the time of so many of its
# query rows, and to stage it besides, or to widen or to zip it block by block. 2048 rows strip by
# strip beside four at once, Zen 4, D = 64 and 128: f32 96 and 102, 105 and 106 GFLOP/s; f16 94 and
# 100, 99 and 103 (staged); bf16 in pairs 164 and 175, 178 and 191 (staged), block by block 1.02 and
# 1.01 times as fast as four at once, 1.04 and 1.05 on two threads. 48 rows of f16 out of L2, on
# Sapphire Rapids, widened block by block, take 1.04 times as long as the same in f32.
READ, STAGE, WIDEN, ZIP = 1, 4, 2, 0
# Items that a thread should have, so that the last one does not keep others waiting for long: two
# threads, f16, 80 rows of 9 heads strip by strip, of 8 heads both strips at once, 1.13 times as
# fast as 16 halves. Where keys are cut, beside 32 items, 6 of 3 KV heads (2048 keys, D = 64) 1.1 to
# 1.3 times as fast, 8 of 8 KV heads (1024 keys, D = 128) 1.2 to 1.4, of 8192 keys 1.0 to 1.06. And
# what it costs to begin one of these, of few rows and of many, in spans streamed: the states of its
# rows are made and handed on. (With few rows 0.02 to 1 cut nothing otherwise that was measured.)
EVEN = 3
BEGIN_FEW, BEGIN_MANY = 0.5, 0.1
# Nor do the last items keep others waiting where something else runs on a core: with few rows, and
# less than twice EVEN items a thread, one less of them than threads come in so many pieces, of two
# spans at least. 8 KV heads on two threads of a busy machine, time over that of whole ones (median
# of 70 pairs, three runs): 8192 keys, D = 128, 1 query of f16 0.95 to 0.97, of bf16 0.92, 4 queries
# of f32 0.92 and 0.95, of bf16 0.96 to 1.01; 2048 keys, D = 64, bf16 0.89. Two heads of them 0.93
# to 1.01, three 0.92 to 1.01; the last one of 12 and of 16 heads 1.0 and 1.01.
LAST_PIECES = 4
# Most spans in an item of a chain, times its strips: their states wait in the thread's scratch.
SPANS = 8
# Query rows (100 more for each KV head) up to which api.prepare_once remembers a call: where
# planning would be felt. So no more than about 256 plans of some 30 KB are kept.
REMEMBERED = 20_000
# And keys of all KV heads: the items of a chain grow with them.
REMEMBERED_KEYS = 1 << 20
# Keys from which K and V come out of memory rather than a cache. Nearer ones are faster by lanes of
# queries where rows fill more than this share of their vectors: 128 keys in L2, 16 rows of f32 take
# 1.1 times as long by lanes of keys, 48 rows in 16 bits 1.06 to 1.1 times, 512 keys 1.07 and up to
# 1.03 times.
LONG = 1024
NEAR_SHARE = 7 / 8
# The least share of rows that would come block by block if they were whole lines: staged, 16 rows
# in 16 bits take 1.1 to 1.3 times as long as by lanes of keys, 32 rows 0.9 to 1.1 times (Zen 4 0.9
# to 1.1 times, and 0.7 to 0.9 times).
STAGED_SHARE = 0.86
# Blocks of keys from which more than one vector of rows is few: 24 and 40 rows are faster so from
# 64 to 128 keys on.
MANY = 2
# A K row stride that is a multiple of a page puts all rows of a register tile into one L1 set.
PAGE = 4096


class Lanes(NamedTuple):
    """What the plan must know of the kernels."""

    width: int  # query rows in a vector
    vectors: int  # vectors in a strip
    block: int  # keys between two rescales
    span: int  # keys between two merges
    few_shares: tuple  # of the lanes of 1, 2, ... vectors, of more: with so many rows they are keys
    line: int  # numbers: rows of whole lines can come block by block, kernels of ring.inc
    ring_k: int  # to a strip of at most so many vectors; 0: to none
    ring_v: int
    arithmetic: str  # f32, f64, or bf16: in pairs
    step: int  # numbers in a unit of that arithmetic


class Plan(NamedTuple):
    """Tiles, how many threads will run, and the two tables that the engine walks."""

    few: int  # most rows of an item where lanes are keys, the kernels of decode.inc; else 0
    strips: int
    keys: int
    spans: int  # of an item whose keys are cut, else 1
    stage_k: bool  # whether a tile of K, of V, is copied first
    stage_v: bool
    ring_k: bool  # or comes block by block
    ring_v: bool
    threads: int
    chains: int  # of items of the same rows, 0 where no keys are cut
    members: np.ndarray
    items: np.ndarray


def is_small(problem, longest):
    """Whether a plan is worth remembering: planning would be felt, and there is little to keep.

    longest: keys of the longest member."""
    heads = problem.members * problem.Hkv
    rows = heads * (problem.Lq * problem.group + 100)
    keys = heads * longest
    return rows < REMEMBERED and keys < REMEMBERED_KEYS


def is_worth_threads(problem, kv_len):
    """Whether threads save more than it costs to start them."""
    keys = kv_len * problem.members if isinstance(kv_len, int) else sum(kv_len)
    numbers = keys * problem.Hkv * (problem.D + problem.Dv)
    return numbers * max(problem.Lq * problem.group, READING) >= SMALL


def cut(problem, lanes, out_strides, kv_len, q_start, tiles, threads):
    """The plan of a call.

    out_strides are those of the result, (lead ..., head, row) in bytes; kv_len and q_start are ints
    or tuples of one a member (q_start may be None); tiles is None or (Tq, Tk). threads: at most so
    many will run.
    """
    members = _members(problem, out_strides, kv_len, q_start)
    rows = problem.Lq * problem.group
    few = _few(problem, lanes, rows, int(members[:, KV_LEN].max(initial=0)))
    stage_k = not few and _staged(problem, lanes, problem.k_strides[1], problem.D)
    stage_v = not few and (lanes.step > 1 or _staged(problem, lanes, problem.v_strides[1], 0))
    staging = STAGE * (stage_k or stage_v)
    strips, keys = _tile(problem, lanes, tiles, rows, few, staging, len(members), threads)
    ring_k = ring_v = False
    if strips == 1 and not few:
        ring_k, ring_v = _ring(problem, lanes, _vectors(lanes, rows))
    items = _items(problem, lanes, members, rows, strips, few)
    items, chains, spans = _chains(items, lanes.span, strips, few, threads)
    for table in (members, items):
        table.setflags(write=False)
    return Plan(
        few=int((items[:, ROW1] - items[:, ROW0]).max(initial=0)) if few else 0,
        strips=strips,
        keys=keys,
        spans=spans,
        stage_k=stage_k and not ring_k,
        stage_v=stage_v and not ring_v,
        ring_k=ring_k,
        ring_v=ring_v,
        threads=min(threads, max(1, len(items))),
        chains=chains,
        members=members,
        items=items,
    )


def _vectors(lanes, rows):
    """How many vectors the rows of an item of one strip fill, at most."""
    vectors = -(-rows // lanes.width)
    return -(-vectors // max(1, -(-vectors // lanes.vectors)))


def _few(problem, lanes, rows, keys):
    """Whether lanes are better keys than query rows; keys are those of the longest member."""
    vectors = -(-rows // lanes.width)
    share = lanes.few_shares[min(max(vectors, 1), lanes.vectors + 1) - 1]
    if vectors <= lanes.ring_v and not _streams(problem, lanes, vectors):
        share = max(share, STAGED_SHARE)
    if keys < LONG:
        share = min(share, NEAR_SHARE)
    enough = vectors == 1 or keys >= MANY * lanes.block
    return enough and 0 < rows <= share * vectors * lanes.width


def _staged(problem, lanes, row_stride, length):
    """Whether tiles of K or V are copied.

    Numbers that are not those of the arithmetic are widened, aliasing rows moved apart, and rows
    that are not whole units filled up.
    """
    return (
        problem.stored != lanes.arithmetic
        or (row_stride % PAGE == 0 and problem.Lkv > 1)
        or length % lanes.step > 0
    )


def _ring(problem, lanes, vectors):
    """Whether K and V can come block by block, to a strip alone of so many vectors."""

    def can(widest, length):
        return 0 < vectors <= widest and length > 0 and length % lanes.line == 0

    return can(lanes.ring_k, problem.D), can(lanes.ring_v, problem.Dv)


def _streams(problem, lanes, vectors):
    """Whether a strip alone of so many vectors needs no tile widened, or zipped, before it."""
    ring_k, ring_v = _ring(problem, lanes, vectors)
    return ring_v and (ring_k or problem.stored == lanes.arithmetic)


def _members(problem, out_strides, kv_len, q_start):
    """Byte offsets and lengths of every member of the batch."""
    table = np.zeros((problem.members, 6), np.int64)
    leads = (problem.q_lead, problem.k_lead, problem.v_lead, out_strides[: len(problem.lead)])
    for column, strides in enumerate(leads):
        offsets = np.zeros(1, np.int64)
        for n, stride in zip(problem.lead, strides, strict=True):
            offsets = (offsets[:, None] + np.arange(n) * stride).ravel()
        table[:, column] = offsets
    table[:, KV_LEN] = kv_len
    table[:, Q_START] = table[:, KV_LEN] - problem.Lq if q_start is None else q_start
    return table


def _row_end(problem, members, row):
    """How many keys a row sees, for every member; _engine.pyx has the same rule row by row."""
    end = members[:, KV_LEN]
    if problem.causal and problem.group:
        end = np.clip(members[:, Q_START] + row // problem.group + 1, 0, end)
    return end


def _tile(problem, lanes, tiles, rows, few, staging, count, threads):
    """(strips, keys) of a cache tile: keys of one span, or with few rows of several whole ones."""
    strip_rows = lanes.width * lanes.vectors
    all_strips = max(1, -(-rows // strip_rows))
    all_keys = max(1, -(-problem.Lkv // lanes.block)) * lanes.block
    if few:
        strips, keys = 1, tiles[1] if tiles else all_keys
    elif tiles:
        strips, keys = min(-(-tiles[0] // strip_rows), all_strips), tiles[1]
    else:
        streams = _streams(problem, lanes, lanes.vectors)
        zips = streams and lanes.step > 1
        alone = ZIP if zips else min(staging, WIDEN) if streams else staging
        strips = _strips(rows, all_strips, problem.Hkv * count, alone, staging, threads)
        keys = lanes.span if zips and strips == 1 else KEYS
    keys = -(-keys // lanes.block) * lanes.block
    if keys > lanes.span:
        most = max(SCORES // rows, lanes.span) if few else lanes.span
        keys = min(keys, most) // lanes.span * lanes.span
    return strips, min(keys, all_keys)


def _strips(rows, all_strips, heads, alone, staging, threads):
    """How many strips share a tile of K and V: threads are to have enough items, and end soon.

    alone and staging: what it costs to widen or stage a tile for one strip, and for several.
    """

    def cost(strips):
        parts = -(-all_strips // strips)
        items = heads * parts
        heaped = -(-items // threads) * (rows / parts + READ + (staging if strips > 1 else alone))
        return items < EVEN * threads and threads > 1, heaped

    return min(range(1, min(STRIPS, all_strips) + 1), key=cost)


def _items(problem, lanes, members, rows, strips, few):
    """Items in the order in which threads take them.

    Members with more keys first; a member's heads in turn, so that threads share K and V in L3;
    under causal a head's last rows first, so that the light items end the call.
    """
    parts = -(-rows // (strips * lanes.vectors * lanes.width))
    # Evenly, in whole vectors if they hold rows: a last item of one vector would be slow.
    unit = 1 if few else lanes.width
    edges = np.minimum(np.arange(parts + 1) * -(-rows // unit) // max(parts, 1) * unit, rows)
    if problem.causal:
        edges = edges[::-1]
    row0, row1 = (edges[1:], edges[:-1]) if problem.causal else (edges[:-1], edges[1:])
    order = np.argsort(-members[:, KV_LEN], kind="stable")
    shape = (len(order), problem.Hkv, parts)
    items = np.zeros((*shape, 8), np.int64)
    items[..., CHAIN] = -1
    items[..., MEMBER] = order[:, None, None]
    items[..., HEAD] = np.arange(problem.Hkv)[:, None]
    items[..., ROW0] = row0
    items[..., ROW1] = row1
    for part in range(parts):
        end = _row_end(problem, members[order], row1[part] - 1)[:, None]
        items[..., part, KEY1] = items[..., part, END] = end
    return items.reshape(-1, 8)


def _chains(items, span, strips, few, threads):
    """The items with their keys cut if threads end sooner so, the chains, room for their spans.

    Links in turn: by the time that an item has streamed its spans, those before it are most often
    merged already.
    """
    spans = -(-items[:, END] // span)
    total = int(spans.sum())
    if threads == 1 or total <= len(items):
        return items, 0, 1
    begin = BEGIN_FEW if few else BEGIN_MANY
    room = max(1, SPANS // strips)
    uncut = np.ones_like(spans)
    cuts = [np.maximum(1, -(-spans // most)) for most in range(room, 0, -1)]
    equal = spans.min() == spans.max()

    def cost(links):
        count = int(links.sum())
        # No thread ends before its share of all, nor, m items on one of them, before m of the size
        # of the smallest of the m * threads - threads + 1 largest.
        heaps = -(-count // threads)
        if equal:
            heaped = heaps * (total / count + begin)
        else:
            sizes = np.sort(np.repeat(spans / links, links))[::-1][::threads] + begin
            heaped = (np.arange(1, heaps + 1) * sizes).max()
        return count < EVEN * threads, max(total / threads + count / threads * begin, heaped)

    links = min([uncut, *cuts], key=cost)
    if links is uncut and few and len(items) < 2 * EVEN * threads:
        last = spans[1 - threads :]
        pieces = np.maximum(-(-last // room), LAST_PIECES)
        links[1 - threads :] = np.where(last >= 2 * pieces, pieces, 1)
    if links.max() == 1:
        return items, 0, 1
    # What is not cut has no state to hand on, and is no chain.
    items[:, CHAIN] = np.where(links > 1, np.cumsum(links > 1) - 1, -1)
    whole = np.repeat(np.arange(len(items)), links)
    link = np.arange(len(whole)) - np.repeat(np.cumsum(links) - links, links)
    order = np.argsort(link, kind="stable")
    whole, link = whole[order], link[order]
    cut = items[whole]
    cut[:, KEY0] = link * spans[whole] // links[whole] * span
    cut[:, KEY1] = np.minimum((link + 1) * spans[whole] // links[whole] * span, cut[:, END])
    return cut, int(np.count_nonzero(links > 1)), room
