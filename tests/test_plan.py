"""The plan alone: integers in, integers out, without the extension.

problem.py and plan.py are loaded from their files, so that nothing else of the package is.
"""

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).parents[1] / "flashcpu"


def load(name):
    spec = importlib.util.spec_from_file_location(f"alone_{name}", PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


problem, plan = load("problem"), load("plan")

# What AVX-512 has in f32, NEON and scalar in f64; and small numbers that make many cuts.
LANES = [
    plan.Lanes(16, 3, 64, 256, (1.0, 0.85, 0.75, 0.85), 0, 0, 0, "f32", 1),
    plan.Lanes(2, 3, 64, 256, (0.875, 0.6, 0.6, 0.0), 0, 0, 0, "f64", 1),
    plan.Lanes(4, 2, 8, 192, (0.0, 0.0, 0.0), 0, 0, 0, "f32", 1),
]
every_lanes = pytest.mark.parametrize("lanes", LANES, ids=["wide", "narrow", "small"])


def ask(q_shape, k_shape, v_shape=None, causal=False, strides=None):
    """The Problem of float32 arrays of these shapes, C order unless strides are given."""
    shapes = q_shape, k_shape, v_shape or k_shape
    strides = strides or tuple(c_strides(shape) for shape in shapes)
    return problem.describe((problem.F32,) * 3, shapes, strides, None, causal)


def c_strides(shape):
    return tuple(int(4 * np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def cut(asked, lanes, kv_len=None, q_start=None, tiles=None, threads=64):
    strides = asked.result_strides(c_strides(asked.out_shape))
    kv_len = asked.Lkv if kv_len is None else kv_len
    return plan.cut(asked, lanes, strides, kv_len, q_start, tiles, threads)


PROBLEMS = [
    ((1, 1, 1, 8), (1, 1, 1, 8)),
    ((1, 2, 17, 8), (1, 2, 100, 8)),
    ((1, 1, 2000, 8), (1, 1, 300, 8)),
    ((3, 6, 49, 8), (3, 2, 70, 8)),
    ((1, 2, 53, 8), (1, 2, 300, 8)),
    ((2, 12, 1, 8), (2, 4, 600, 8)),
    ((40, 2, 197, 8), (40, 1, 197, 8)),
    ((2, 3, 4, 70, 8), (1, 3, 2, 33, 8)),
    ((5, 8), (7, 8)),
    ((3, 5, 8), (7, 8)),
]
TILES = [None, (1, 1), (50, 100), (10**9, 10**9)]


def every_plan(lanes, causal=False):
    for (q_shape, k_shape), tiles in itertools.product(PROBLEMS, TILES):
        asked = ask(q_shape, k_shape, causal=causal)
        yield asked, cut(asked, lanes, tiles=tiles)


@every_lanes
@pytest.mark.parametrize("causal", [False, True])
def test_every_row_is_finished_by_exactly_one_item(lanes, causal):
    for asked, planned in every_plan(lanes, causal):
        rows = asked.Lq * asked.group
        seen = np.zeros((len(planned.members), asked.Hkv, rows), int)
        for member, head, row0, row1, _, key1, end, _ in planned.items:
            assert 0 <= row0 < row1 <= rows
            seen[member, head, row0:row1] += key1 == end  # where its keys are cut, in the last
        assert len(planned.members) == np.prod(asked.lead, dtype=int)
        np.testing.assert_array_equal(seen, 1)


@every_lanes
def test_items_are_cut_evenly_in_whole_vectors_that_fit_the_strips(lanes):
    """An item of one vector where others have many would be slow; one that is longer than the
    workspace would be the end."""
    for asked, planned in every_plan(lanes):
        row0, row1 = planned.items[:, plan.ROW0], planned.items[:, plan.ROW1]
        if not planned.few:
            assert (row0 % lanes.width == 0).all()
            ends = row1[row1 < asked.Lq * asked.group]
            assert (ends % lanes.width == 0).all()
        vectors = -(-(row1 - row0) // lanes.width)
        assert vectors.max() <= planned.strips * lanes.vectors
        assert vectors.max() - vectors.min() <= 1
        if vectors.max() > lanes.vectors:
            assert vectors.min() > 1


@every_lanes
def test_no_item_is_larger_than_the_tile_that_was_asked_for(lanes):
    strip = lanes.width * lanes.vectors
    for (q_shape, k_shape), tiles in itertools.product(PROBLEMS, TILES[1:]):
        asked = ask(q_shape, k_shape)
        planned = cut(asked, lanes, tiles=tiles)
        rows = (planned.items[:, plan.ROW1] - planned.items[:, plan.ROW0]).max()
        assert rows <= -(-tiles[0] // strip) * strip
        assert planned.keys <= max(-(-tiles[1] // lanes.block) * lanes.block, lanes.block)


@every_lanes
def test_tiles_are_whole_strips_and_whole_blocks_inside_a_span(lanes):
    """But with few rows, where they may be several spans, and with the last keys a part of one."""
    for asked, planned in every_plan(lanes):
        assert planned.strips >= 1
        assert planned.keys >= lanes.block
        assert planned.keys % lanes.block == 0
        if planned.few and planned.keys > lanes.span:
            all_keys = -(-asked.Lkv // lanes.block) * lanes.block
            assert planned.keys % lanes.span == 0 or planned.keys == all_keys
        else:
            assert planned.keys <= lanes.span


@every_lanes
def test_tiles_of_few_rows_are_spans_whose_scores_fit_into_l1(lanes):
    for rows in (1, 2, 3, 5, 16):
        most = max(plan.SCORES // rows, lanes.span)
        for tiles, keys in ((None, most), ((1, 900), min(900, most)), ((10**9, 10**9), most)):
            planned = cut(ask((1, 1, rows, 64), (1, 1, 10**5, 64)), lanes, tiles=tiles)
            if planned.few:
                assert planned.keys == keys // lanes.span * lanes.span


@every_lanes
def test_asked_tiles_are_rounded_up(lanes):
    asked = ask((1, 1, 10**4, 8), (1, 1, 10**4, 8))
    strip = lanes.width * lanes.vectors
    for rows, keys in [(1, 1), (strip, lanes.block), (strip + 1, lanes.block + 1)]:
        planned = cut(asked, lanes, tiles=(rows, keys))
        assert planned.strips == -(-rows // strip)
        assert planned.keys == -(-keys // lanes.block) * lanes.block


@every_lanes
@pytest.mark.parametrize("kv_len", [None, 0, 5, [7, 0, 33]])
@pytest.mark.parametrize("q_start", [None, 0, -60, 20, -(2**60), 2**60, [-80, 3, 2**60]])
def test_an_item_ends_where_its_last_row_does(lanes, kv_len, q_start):
    kv_len = np.array(kv_len) if isinstance(kv_len, list) else kv_len
    q_start = np.array(q_start) if isinstance(q_start, list) else q_start
    for causal in (False, True):
        asked = ask((3, 4, 75, 8), (3, 2, 33, 8), causal=causal)
        planned = cut(asked, lanes, kv_len, q_start, (1, 1))
        lens = np.broadcast_to(33 if kv_len is None else kv_len, 3)
        starts = lens - 75 if q_start is None else np.broadcast_to(q_start, 3)
        for member, _, _, row1, _, _, end, _ in planned.items:
            keys = int(lens[member])
            if causal:
                last_query = (int(row1) - 1) // asked.group
                keys = min(max(int(starts[member]) + last_query + 1, 0), keys)
            assert end == keys


@every_lanes
def test_a_causal_head_begins_with_its_heaviest_item(lanes):
    asked = ask((2, 4, 3000, 8), (2, 2, 3000, 8), causal=True)
    planned = cut(asked, lanes, q_start=0)
    for member, head in np.ndindex(2, 2):
        of_head = (planned.items[:, plan.MEMBER] == member) & (planned.items[:, plan.HEAD] == head)
        keys = planned.items[of_head & (planned.items[:, plan.KEY0] == 0), plan.END]
        assert len(keys) > 1
        assert (np.diff(keys) < 0).all()


@every_lanes
def test_members_with_more_keys_come_first(lanes):
    asked = ask((5, 2, 20, 8), (5, 2, 300, 8))
    planned = cut(asked, lanes, kv_len=np.array([5, 300, 0, 300, 20]))
    members = planned.items[:, plan.MEMBER].tolist()
    assert list(dict.fromkeys(members)) == [1, 3, 4, 0, 2]


def test_members_have_the_offsets_of_their_arrays():
    asked = ask((2, 1, 4, 5, 8), (3, 2, 7, 8), (2, 1, 2, 7, 3))
    planned = cut(asked, LANES[0], kv_len=np.arange(6), q_start=np.arange(6) - 9)
    q, k, v = (c_strides(shape) for shape in ((2, 1, 4, 5, 8), (3, 2, 7, 8), (2, 1, 2, 7, 3)))
    out = c_strides(asked.out_shape)
    assert asked.out_shape == (2, 3, 4, 5, 3)
    for row, (a, b) in zip(planned.members, np.ndindex(2, 3), strict=True):
        member = 3 * a + b
        offsets = a * q[0], b * k[0], a * v[0], a * out[0] + b * out[1]
        assert row.tolist() == [*offsets, member, member - 9]


# Q and K shapes, kv_len: one row and a long cache; few rows, members of very different lengths; few
# in two parts; more rows than the kernels for few take; several strips; rows that end in different
# spans.
LONG = [
    ((1, 1, 1, 8), (1, 1, 20_000, 8), None),
    ((1, 12, 1, 8), (1, 1, 20_001, 8), None),
    ((4, 6, 2, 8), (4, 2, 20_000, 8), [0, 1, 20_000, 255]),
    ((3, 4, 4, 8), (3, 1, 3000, 8), [0, 3000, 0]),
    ((1, 1, 53, 8), (1, 1, 20_000, 8), None),
    ((1, 1, 60, 8), (1, 1, 20_000, 8), None),
    ((2, 1, 700, 8), (2, 1, 9000, 8), [9000, 600]),
    ((1, 1, 7, 8), (1, 1, 600, 8), None),
]


def every_long_plan(lanes):
    for (q_shape, k_shape, kv_len), tiles, causal in itertools.product(LONG, TILES, (False, True)):
        asked = ask(q_shape, k_shape, causal=causal)
        kv_len = np.array(kv_len) if isinstance(kv_len, list) else kv_len
        for threads in (1, 2, 64):
            yield asked, cut(asked, lanes, kv_len, None, tiles, threads)


@every_lanes
def test_the_links_of_a_chain_are_the_keys_of_its_rows_once_in_order(lanes):
    """Whole spans each but the last, and no more than the workspace has room for. In the order of
    the items too: an item waits for those before it, and threads take them in that order."""
    cuts = 0
    for _, planned in every_long_plan(lanes):
        rows = set()
        for chain in range(planned.chains):
            links = planned.items[planned.items[:, plan.CHAIN] == chain]
            key0, key1, end = links[:, plan.KEY0], links[:, plan.KEY1], links[0, plan.END]
            whose = [plan.MEMBER, plan.HEAD, plan.ROW0, plan.ROW1, plan.END]
            assert (links[:, whose] == links[0, whose]).all()
            assert key0[0] == 0
            assert key1[-1] == end
            np.testing.assert_array_equal(key0[1:], key1[:-1])
            assert (key0 % lanes.span == 0).all()
            assert (key1 - key0 <= planned.spans * lanes.span).all()
            assert (key0 < key1).all()
            assert len(links) > 1
            rows.add(tuple(links[0, whose[:4]]))
            cuts += 1
        assert len(rows) == planned.chains
        assert (planned.items[:, plan.CHAIN] < planned.chains).all()
    assert cuts > 50


@every_lanes
def test_items_that_are_not_cut_are_no_chain(lanes):
    """They have no state to hand on."""
    whole = beside = 0
    for _, planned in itertools.chain(every_plan(lanes), every_long_plan(lanes)):
        uncut = planned.items[planned.items[:, plan.CHAIN] == -1]
        assert (uncut[:, plan.KEY0] == 0).all()
        np.testing.assert_array_equal(uncut[:, plan.KEY1], uncut[:, plan.END])
        if planned.chains == 0:
            whole += 1
            assert len(uncut) == len(planned.items)
            assert planned.spans == 1
        else:
            beside += len(uncut) > 0
    assert whole > 10
    assert beside > 0


@every_lanes
def test_the_states_that_wait_are_few(lanes):
    """One a span and strip: scratch that does not grow with the number of keys."""
    for _, planned in every_long_plan(lanes):
        assert planned.spans == 1 or planned.spans * planned.strips <= plan.SPANS
    for keys in (10**5, 10**6, 10**7):
        planned = cut(ask((1, 1, 1, 8), (1, 1, keys, 8)), lanes)
        assert planned.spans == plan.SPANS
        assert planned.chains == planned.strips == 1


@every_lanes
def test_keys_are_cut_where_threads_would_have_too_few_items_or_uneven_shares(lanes):
    def planned(heads, spans, threads):
        return cut(ask((1, heads, 1, 8), (1, heads, spans * lanes.span, 8)), lanes, threads=threads)

    #                            items            each thread has
    for heads, spans, threads, links in [
        (1, 6, 2, 6),  #         1 span           3
        (1, 64, 2, 8),  #        8 spans, no more 4
        (3, 8, 2, 2),  #         4 spans          3
        (5, 16, 2, 2),  #        8 spans          5, uncut 3 or 2
        (12, 32, 2, 1),  #       uncut            6
        (8, 32, 8, 4),  #        8 spans          4, uncut 1: one held up doubles the time
        (96, 9, 64, 2),  #       uncut 2 or 1
    ]:
        found = planned(heads, spans, threads)
        assert len(found.items) == heads * links
        assert found.chains == (heads if links > 1 else 0)
        assert found.threads == min(threads, len(found.items))
        lengths = found.items[:, plan.KEY1] - found.items[:, plan.KEY0]
        assert np.ptp(lengths) <= lanes.span, "links of a chain differ by a span at most"
    for heads, spans, threads in [(3, 50, 1), (1, 1, 64), (31, 1, 64), (3, 0, 64)]:
        found = planned(heads, spans, threads)
        assert len(found.items) == heads
        assert found.chains == 0
        assert found.threads == min(threads, heads)


@pytest.mark.parametrize("lanes", LANES[:2], ids=["wide", "narrow"])  # the small one has no few
def test_last_items_come_in_pieces_where_threads_have_few(lanes):
    """So that one that is held up does not keep the others waiting."""
    for heads, spans, threads, pieces in [
        (6, 8, 2, 4),  #    2 spans
        (8, 32, 2, 4),  #   8 spans
        (8, 80, 2, 10),  #  8 spans, no more
        (10, 9, 2, 4),
        (16, 40, 4, 5),  #  the last three of them
        (8, 7, 2, 1),  #    pieces would be of one span
        (12, 32, 2, 1),  #  threads have enough
    ]:
        asked = ask((1, heads, 1, 8), (1, heads, spans * lanes.span, 8))
        planned = cut(asked, lanes, threads=threads)
        last = threads - 1 if pieces > 1 else 0
        assert planned.chains == last
        assert len(planned.items) == heads + last * (pieces - 1)
        whole = planned.items[: heads - last]
        assert (whole[:, plan.CHAIN] == -1).all()
        assert whole[:, plan.HEAD].tolist() == list(range(heads - last))
    # More rows gain nothing.
    many = ask((1, 8, 3 * lanes.width, 8), (1, 8, 32 * lanes.span, 8))
    assert cut(many, lanes, threads=2).chains == 0
    # Lengths that differ: what comes last is the shortest, and cut only if it is long enough.
    for shortest, chains in ((8, 1), (7, 0)):
        kv_len = lanes.span * np.array([shortest, 33, 31, 30, 32, 29, 30, 31])
        asked = ask((8, 1, 1, 8), (8, 1, 33 * lanes.span, 8))
        assert cut(asked, lanes, kv_len=kv_len, threads=2).chains == chains


@every_lanes
def test_one_long_member_among_short_ones_is_cut(lanes):
    """The mean item says nothing of when the longest ends."""
    asked = ask((32, 1, 1, 8), (32, 1, 512 * lanes.span, 8))
    for long in (1, 9):  # 9: two of them on one thread
        kv_len = np.full(32, 64)
        kv_len[:long] *= 512 * lanes.span // 64
        planned = cut(asked, lanes, kv_len=kv_len, threads=8)
        lengths = planned.items[:, plan.KEY1] - planned.items[:, plan.KEY0]
        assert planned.chains == long
        assert lengths.max() <= plan.SPANS * lanes.span
        assert lengths.sum() == kv_len.sum()


@every_lanes
def test_rows_that_see_no_key_have_an_item_beside_long_ones(lanes):
    """Somebody must write their zeros."""
    asked = ask((3, 2, 2, 8), (3, 2, 9000, 8))
    planned = cut(asked, lanes, kv_len=np.array([0, 9000, 0]))
    assert planned.chains == 2
    empty = planned.items[planned.items[:, plan.END] == 0]
    assert sorted(empty[:, plan.MEMBER].tolist()) == [0, 0, 2, 2]
    assert (empty[:, [plan.KEY0, plan.KEY1]] == 0).all()
    # Also the first ones under the diagonal, beside others of their head.
    asked = ask((1, 1, 200, 8), (1, 1, 9000, 8), causal=True)
    planned = cut(asked, lanes, q_start=-150, tiles=(1, 1))
    assert (planned.items[:, plan.END] == 0).any()
    assert (planned.items[:, plan.END] == 50).any()


def test_small_work_is_not_worth_threads():
    assert not plan.is_worth_threads(ask((1, 4, 16, 8), (1, 4, 16, 8)), 16)
    large = ask((2, 4, 1000, 64), (2, 4, 1000, 64))
    assert plan.is_worth_threads(large, 1000)
    assert plan.is_worth_threads(large, np.array([0, 1000]))
    assert not plan.is_worth_threads(large, np.array([0, 1]))
    assert not plan.is_worth_threads(large, 0)


@pytest.mark.parametrize(
    ("heads", "strips", "threads", "stored", "shared"),
    [
        (8, 2, 1, "f32", 2),
        (1, 2, 1, "f16", 2),  # a thread alone needs no more than one item
        (1, 2, 2, "f16", 1),
        (8, 2, 2, "f16", 2),  # four items each
        (9, 2, 2, "f16", 1),  # 9 halves each, where 5 and 4 would be uneven
        (8, 2, 3, "f16", 1),
        (1, 8, 2, "f32", 1),  # else two items each
        (8, 8, 2, "f32", 4),
        (3, 9, 2, "f32", 1),  # 14 and 13; two at once would be 8 and 7 of these
        (3, 9, 2, "f16", 2),  # but then K and V are widened half as often
        (1, 43, 2, "f32", 2),  # 22 items, of four strips each 11
        (1, 200, 64, "f32", 1),
    ],
)
def test_strips_share_tiles_where_threads_still_have_enough_to_do(
    heads, strips, threads, stored, shared
):
    rows = strips * 48
    asked = replace(ask((1, heads, rows, 8), (1, heads, 100, 8)), stored=stored, rows=stored)
    planned = cut(asked, LANES[0], threads=threads)
    assert planned.strips == shared
    assert len(planned.items) == heads * -(-strips // shared)


@pytest.mark.parametrize(("stride", "staged"), [(4096, True), (-8192, True), (4128, False)])
def test_rows_a_page_apart_are_staged(stride, staged):
    """A stride that is a multiple of a page puts all rows into one set of the L1 cache."""
    dense = c_strides((1, 1, 100, 8))
    apart = (*dense[:2], stride, 4)
    shapes = ((1, 1, 100, 8),) * 2
    of_k = cut(ask(*shapes, strides=(dense, apart, dense)), LANES[0])
    assert (of_k.stage_k, of_k.stage_v) == (staged, False)
    of_v = cut(ask(*shapes, strides=(dense, dense, apart)), LANES[0])
    assert (of_v.stage_k, of_v.stage_v) == (False, staged)


@pytest.mark.parametrize(
    ("stored", "arithmetic", "step", "D", "staged"),
    [
        ("f32", "f32", 1, 7, (False, False)),
        ("f16", "f32", 1, 8, (True, True)),  # widened
        ("bf16", "f32", 1, 8, (True, True)),
        ("bf16", "bf16", 2, 8, (False, True)),  # rows of V in pairs
        ("bf16", "bf16", 2, 7, (True, True)),  # rows of K filled up to whole pairs
    ],
)
def test_what_the_arithmetic_does_not_take_is_staged_but_not_for_few_rows(
    stored, arithmetic, step, D, staged
):
    lanes = LANES[0]._replace(arithmetic=arithmetic, step=step)
    asked = replace(ask((1, 1, 100, D), (1, 1, 100, D)), rows=stored, stored=stored)
    planned = cut(asked, lanes)
    assert not planned.few
    assert (planned.stage_k, planned.stage_v) == staged
    few = replace(ask((1, 1, lanes.width // 2, D), (1, 1, 100, D)), rows=stored, stored=stored)
    planned = cut(few, lanes)
    assert planned.few
    assert (planned.stage_k, planned.stage_v) == (False, False)


@pytest.mark.parametrize(
    ("rows", "D", "Dv", "widest", "staged"),
    [
        (48, 64, 96, 3, (False, False)),
        (48, 48, 64, 3, (True, False)),
        (48, 64, 80, 3, (False, True)),
        (48, 16, 16, 3, (True, True)),
        (48, 64, 0, 3, (False, True)),
        (16, 64, 64, 1, (False, False)),
        (17, 64, 64, 1, (True, True)),
        (49, 64, 64, 3, (True, True)),  # two strips share a tile
    ],
)
def test_whole_lines_come_block_by_block_to_a_strip_alone(rows, D, Dv, widest, staged):
    lanes = LANES[0]._replace(line=32, ring_k=widest, ring_v=widest, few_shares=(0.0,) * 4)
    asked = ask((1, 1, rows, D), (1, 1, 100, D), (1, 1, 100, Dv))
    planned = cut(replace(asked, rows="f16", stored="f16"), lanes, threads=1)
    assert not planned.few
    assert (planned.stage_k, planned.stage_v) == staged
    assert (planned.ring_k, planned.ring_v) == (not staged[0], not staged[1])


def test_what_needs_no_staging_can_come_block_by_block_too():
    lanes = LANES[0]._replace(line=16, ring_k=1, few_shares=(0.5,) * 4)
    for rows, D, ring_k in ((8, 32, False), (9, 32, True), (9, 24, False), (32, 32, False)):
        planned = cut(ask((1, 1, rows, D), (1, 1, 5000, D)), lanes)
        assert bool(planned.few) == (rows == 8)
        assert (planned.stage_k, planned.stage_v) == (False, False)
        assert (planned.ring_k, planned.ring_v) == (ring_k, False)


def test_pairs_come_block_by_block():
    """V, which is zipped, to any strip alone, K, which is only moved, to one of one vector."""
    lanes = LANES[0]._replace(
        line=32, ring_k=1, ring_v=3, few_shares=(0.0,) * 4, arithmetic="bf16", step=2
    )
    for rows, alone in ((16, True), (17, False), (48, False)):
        asked = replace(ask((1, 1, rows, 64), (1, 1, 100, 64)), rows="bf16", stored="bf16")
        planned = cut(asked, lanes, threads=1)
        assert (planned.stage_k, planned.stage_v) == (False, False)
        assert (planned.ring_k, planned.ring_v) == (alone, True)


@pytest.mark.parametrize(("D", "streams"), [(64, True), (24, False)])
def test_zipping_costs_strips_alone_nothing(D, streams):
    """So they share no tile, and take whole spans; what is widened is dearer."""
    pairs = LANES[0]._replace(ring_k=1, ring_v=3, arithmetic="bf16", step=2)
    wide = LANES[0]._replace(ring_k=3, ring_v=3)
    for lanes, stored, alone in ((pairs, "bf16", True), (wide, "f16", False)):
        lanes = lanes._replace(line=32, few_shares=(0.0,) * 4)
        asked = replace(ask((1, 8, 960, D), (1, 8, 1000, D)), rows=stored, stored=stored)
        planned = cut(asked, lanes, threads=1)
        alone = alone and streams
        assert (planned.strips == 1) == alone
        assert planned.keys == (256 if alone else plan.KEYS)


def test_to_many_rows_strip_by_strip_too():
    """Where the strips of a head are items of their own."""
    lanes = LANES[0]._replace(line=32, ring_k=3, ring_v=3, few_shares=(0.0,) * 4)
    asked = replace(ask((1, 1, 90, 64), (1, 1, 100, 64)), rows="f16", stored="f16")
    for threads, alone in ((1, False), (2, True)):
        planned = cut(asked, lanes, threads=threads)
        assert (planned.strips == 1) == alone
        assert (planned.stage_k, planned.stage_v) == (not alone, not alone)


def test_lanes_are_keys_where_rows_would_leave_too_many_empty():
    """Up to a share of the lanes of their vectors, and of one vector where keys are few: those that
    are there, however many there is memory for."""
    many = 2 * LANES[0].block

    def few_rows(keys, lanes=LANES[0]):
        def planned(rows):
            few = cut(ask((1, 1, rows, 8), (1, 1, 5000, 8)), lanes, kv_len=keys).few
            parts = -(-rows // 48)
            assert few in (0, -(-rows // parts)), "rows of an item, in equal parts"
            return few

        return {rows for rows in range(1, 401) if planned(rows)}

    def up_to(share, vectors):
        return {rows for n in vectors for rows in range(16 * n - 15, int(share * 16 * n) + 1)}

    beyond = range(4, 26)
    assert few_rows(many - 1) == up_to(7 / 8, [1])
    assert few_rows(many) == up_to(7 / 8, [1]) | up_to(0.75, [3]) | up_to(0.85, [2, *beyond])
    assert few_rows(1023) == few_rows(many)
    assert few_rows(1024) == few_rows(many) | {15, 16}  # out of memory
    half = LANES[0]._replace(few_shares=(1.0, 1.0, 1.0, 0.95))
    assert few_rows(1023, half) == up_to(7 / 8, [1, 2, 3, *beyond])
    assert few_rows(1024, half) == up_to(1, [1, 2, 3]) | up_to(0.95, beyond)
    assert max(few_rows(1024, half)) == 273  # of 18 vectors
    lines = half._replace(few_shares=(0.5, 0.5, 0.5, 0.5), line=8, ring_k=2, ring_v=2)
    assert few_rows(1024, lines) == up_to(0.5, [1, 2, 3, *beyond])
    staged = lines._replace(line=16)  # rows are half a line
    least = plan.STAGED_SHARE
    assert few_rows(1024, staged) == up_to(least, [1, 2]) | up_to(0.5, [3, *beyond])
    only_v = lines._replace(ring_k=1, ring_v=3)  # K of two vectors is read where it lies
    assert few_rows(1024, only_v) == up_to(0.5, [1, 2, 3, *beyond])
    widened = only_v._replace(arithmetic="f64")  # or staged
    assert few_rows(1024, widened) == up_to(0.5, [1, *beyond]) | up_to(least, [2, 3])


@every_lanes
def test_few_rows_of_several_strips_are_items_of_equal_parts(lanes):
    asked = ask((2, 3, 2 * lanes.width * lanes.vectors + 1, 8), (2, 3, 9000, 8))
    planned = cut(asked, lanes._replace(few_shares=(1.0,) * (lanes.vectors + 1)))
    rows = planned.items[:, plan.ROW1] - planned.items[:, plan.ROW0]
    assert planned.strips == 1
    assert planned.few == rows.max() <= lanes.width * lanes.vectors
    assert rows.min() >= rows.max() - 1


def test_few_rows_count_what_reading_costs_when_threads_are_chosen():
    """One row against so many keys is little to multiply, and much to read."""
    D = 64
    few = plan.SMALL // (2 * D * plan.READING)
    for keys, many in ((few, False), (few * plan.READING // 2, True)):
        assert 2 * D * keys < plan.SMALL
        assert plan.is_worth_threads(ask((1, 1, 1, D), (1, 1, keys, D)), keys) == many


def test_empty_problems_have_no_items():
    for q_shape, k_shape in [
        ((0, 2, 5, 8), (0, 2, 7, 8)),
        ((2, 0, 5, 8), (2, 0, 7, 8)),
        ((2, 0, 5, 8), (2, 3, 7, 8)),
        ((2, 2, 0, 8), (2, 2, 7, 8)),
    ]:
        for causal in (False, True):
            planned = cut(ask(q_shape, k_shape, causal=causal), LANES[0])
            assert len(planned.items) == 0
            assert planned.threads == 1
    no_keys = cut(ask((2, 2, 5, 8), (2, 2, 0, 8), causal=True), LANES[0])
    assert (no_keys.items[:, plan.KEY1] == 0).all()
    assert len(no_keys.items) == 4


def test_the_same_question_is_the_same_problem():
    """Found again, not described again: a tiny call must not pay for it twice."""
    asked = ask((1, 2, 17, 8), (1, 2, 100, 8))
    assert ask((1, 2, 17, 8), (1, 2, 100, 8)) is asked
    assert ask((1, 2, 17, 8), (1, 2, 100, 8), causal=True) is not asked
