"""The plan alone: integers in, integers out, without the extension.

problem.py and plan.py are loaded from their files, so that nothing else of the package is.
"""

import importlib.util
import itertools
import sys
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
    plan.Lanes(16, 3, 64, 256, 12, "f32", 1),
    plan.Lanes(2, 3, 64, 256, 6, "f32", 1),
    plan.Lanes(4, 2, 8, 192, 0, "f32", 1),
]
every_lanes = pytest.mark.parametrize("lanes", LANES, ids=["wide", "narrow", "small"])


def ask(q_shape, k_shape, v_shape=None, causal=False, strides=None):
    """The Problem of float32 arrays of these shapes, C order unless strides are given."""
    shapes = q_shape, k_shape, v_shape or k_shape
    strides = strides or tuple(c_strides(shape) for shape in shapes)
    return problem.describe((problem.F32,) * 3, shapes, strides, None, causal)


def c_strides(shape):
    return tuple(int(4 * np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def cut(asked, lanes, kv_len=None, q_start=None, tiles=None):
    strides = asked.result_strides(c_strides(asked.out_shape))
    return plan.cut(asked, lanes, strides, asked.Lkv if kv_len is None else kv_len, q_start, tiles)


PROBLEMS = [
    ((1, 1, 1, 8), (1, 1, 1, 8)),
    ((1, 2, 17, 8), (1, 2, 100, 8)),
    ((1, 1, 2000, 8), (1, 1, 300, 8)),
    ((3, 6, 49, 8), (3, 2, 70, 8)),
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
def test_every_row_is_in_exactly_one_item(lanes, causal):
    for asked, planned in every_plan(lanes, causal):
        rows = asked.Lq * asked.group
        seen = np.zeros((len(planned.members), asked.Hkv, rows), int)
        for member, head, row0, row1, *_ in planned.whole:
            assert 0 <= row0 < row1 <= rows
            seen[member, head, row0:row1] += 1
        assert len(planned.members) == np.prod(asked.lead, dtype=int)
        np.testing.assert_array_equal(seen, 1)


@every_lanes
def test_items_are_cut_evenly_in_whole_vectors_that_fit_the_strips(lanes):
    """An item of one vector where others have many would be slow; one that is longer than the
    workspace would be the end."""
    for asked, planned in every_plan(lanes):
        row0, row1 = planned.whole[:, plan.ROW0], planned.whole[:, plan.ROW1]
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
    for _, planned in every_plan(lanes):
        assert planned.strips >= 1
        assert planned.keys >= lanes.block
        assert planned.keys % lanes.block == 0
        assert planned.keys <= lanes.span


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
def test_key1_is_where_the_last_row_of_an_item_ends(lanes, kv_len, q_start):
    kv_len = np.array(kv_len) if isinstance(kv_len, list) else kv_len
    q_start = np.array(q_start) if isinstance(q_start, list) else q_start
    for causal in (False, True):
        asked = ask((3, 4, 75, 8), (3, 2, 33, 8), causal=causal)
        planned = cut(asked, lanes, kv_len, q_start, (1, 1))
        lens = np.broadcast_to(33 if kv_len is None else kv_len, 3)
        starts = lens - 75 if q_start is None else np.broadcast_to(q_start, 3)
        for member, _, _, row1, _, key1, end_of_row, _ in planned.whole:
            assert key1 == end_of_row
            end = int(lens[member])
            if causal:
                last_query = (int(row1) - 1) // asked.group
                end = min(max(int(starts[member]) + last_query + 1, 0), end)
            assert key1 == end


@every_lanes
def test_a_causal_head_begins_with_its_heaviest_item(lanes):
    asked = ask((2, 4, 3000, 8), (2, 2, 3000, 8), causal=True)
    planned = cut(asked, lanes, q_start=0)
    for member, head in np.ndindex(2, 2):
        of_head = (planned.whole[:, plan.MEMBER] == member) & (planned.whole[:, plan.HEAD] == head)
        keys = planned.whole[of_head, plan.KEY1]
        assert len(keys) > 1
        assert (np.diff(keys) < 0).all()


@every_lanes
def test_members_with_more_keys_come_first(lanes):
    asked = ask((5, 2, 20, 8), (5, 2, 300, 8))
    planned = cut(asked, lanes, kv_len=np.array([5, 300, 0, 300, 20]))
    members = planned.whole[:, plan.MEMBER].tolist()
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


def test_small_work_runs_without_threads():
    assert cut(ask((1, 4, 16, 8), (1, 4, 16, 8)), LANES[0]).threads == 1
    large = cut(ask((1, 4, 1000, 64), (1, 4, 1000, 64)), LANES[0])
    assert large.threads == len(large.items) > 1
    unseen = cut(ask((1, 4, 1000, 64), (1, 4, 1000, 64)), LANES[0], kv_len=0)
    assert unseen.threads == 1


@every_lanes
def test_there_are_items_for_many_threads_where_there_are_rows(lanes):
    planned = cut(ask((1, 1, 10_000, 8), (1, 1, 10_000, 8)), lanes)
    assert len(planned.items) >= plan.ITEMS


CHAINED = [
    # q, k, kv_len, causal
    ((1, 1, 1, 8), (1, 1, 20_000, 8), None, False),
    ((1, 9, 4, 8), (1, 3, 2048, 8), None, True),
    ((4, 2, 1, 8), (4, 2, 3000, 8), [0, 1, 255, 3000], False),
    ((1, 2, 60, 8), (1, 1, 100_000, 8), None, True),
    ((2, 1, 300, 8), (2, 1, 5000, 8), [5000, 4097], True),
]


@every_lanes
@pytest.mark.parametrize("problem", CHAINED, ids=str)
def test_links_of_a_chain_cover_its_keys_in_whole_spans_and_in_order(problem, lanes):
    q_shape, k_shape, kv_len, causal = problem
    asked = ask(q_shape, k_shape, causal=causal)
    planned = cut(asked, lanes, None if kv_len is None else np.array(kv_len))
    assert planned.chains in (0, len(planned.whole))
    if not planned.chains:
        np.testing.assert_array_equal(planned.items, planned.whole)
        return
    assert planned.spans * planned.strips <= max(plan.SPANS, planned.strips)
    for chain, whole in enumerate(planned.whole):
        links = planned.items[planned.items[:, plan.CHAIN] == chain]
        np.testing.assert_array_equal(links[:, : plan.KEY0], np.tile(whole[:4], (len(links), 1)))
        assert (links[:, plan.END] == whole[plan.END]).all()
        assert links[0, plan.KEY0] == 0
        assert links[-1, plan.KEY1] == whole[plan.END]
        np.testing.assert_array_equal(links[1:, plan.KEY0], links[:-1, plan.KEY1])
        assert (links[:, plan.KEY0] % lanes.span == 0).all()
        lengths = links[:, plan.KEY1] - links[:, plan.KEY0]
        assert (lengths <= planned.spans * lanes.span).all()
        assert (lengths[1:] > 0).all()


def test_keys_are_cut_where_there_are_too_few_items_and_nowhere_else():
    for lanes in LANES[:2]:
        few_heads = cut(ask((1, 1, 1, 8), (1, 1, 20_000, 8)), lanes)
        assert len(few_heads.items) >= plan.ITEMS
        assert (few_heads.whole[:, plan.CHAIN] == -1).all()
        many_heads = cut(ask((plan.ITEMS, 1, 1, 8), (plan.ITEMS, 1, 20_000, 8)), lanes)
        one_span = cut(ask((1, 1, 1, 8), (1, 1, lanes.span, 8)), lanes)
        for planned in (many_heads, one_span):
            assert planned.chains == 0
            assert planned.items is planned.whole


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


def test_the_same_question_has_the_same_plan():
    """Found again, not made again: a tiny call must not pay for it twice."""
    asked = ask((1, 2, 17, 8), (1, 2, 100, 8))
    assert ask((1, 2, 17, 8), (1, 2, 100, 8)) is asked
    assert cut(asked, LANES[0]) is cut(asked, LANES[0])
    assert cut(asked, LANES[0], tiles=(1, 1)) is not cut(asked, LANES[0])
    assert ask((1, 2, 17, 8), (1, 2, 100, 8), causal=True) is not asked
