"""Attention for a grid of cache tiles: the command to which STRIPS and KEYS of plan.py refer.

    python bench/tiles.py                       every case, about four minutes
    python bench/tiles.py --cases "f32.*64$"    the cases that match, such as f32 1 4 4 2048 2048 64
    python bench/tiles.py --strips 2 3 4 --keys 64 128

On one thread. A figure is flops a second as a fraction of the FMA rate of the same round, median
over the rounds; in a round every tile has its turn. Tiles change no bit of the result, which is
checked before anything is timed.
"""

import argparse
from functools import partial
from statistics import median

import numpy as np
from measure import (
    Case,
    Table,
    facts,
    find_truth,
    fma_rate,
    matching,
    positive,
    seconds_per_call,
    worst_error,
)

from flashcpu import attention, machine, plan, problem

STRIPS = (1, 2, 3, 4, 6, 8)
KEYS = (64, 128, 256, 512)
CASES = tuple(
    Case(1, H, H, L, L, D, dtype)
    for dtype in ("f32", "f64")
    for D in (64, 128)
    for H, L in ((16, 512), (4, 2048), (1, 8192))
)


def plans_own(q, k, v):
    """The plan's tile where nobody asks for one, as (strips, keys), and the rows of a strip."""
    asked = problem.of(q, k, v)
    _, lanes = machine.kernels(asked.rows, asked.stored, machine.isa())
    cut = plan.cut(asked, lanes, asked.result_strides(q.strides), asked.Lkv, None, None, 1)
    return (cut.strips, cut.keys), lanes.width * lanes.vectors


def check(case, arrays, tiles, strip_rows):
    """Stop unless the first tile is right and all others give the same bits."""
    first = None
    for strips, keys in tiles:
        out = attention(*arrays, threads=1, tiles=(strips * strip_rows, keys))
        if first is None:
            first = out
            if not worst_error(case, find_truth(case, *arrays), out) <= 1:
                raise SystemExit(f"flashcpu is wrong on {case}")
        elif not np.array_equal(out, first):
            raise SystemExit(f"tiles of {strips} strips x {keys} keys change bits on {case}")


def fractions(case, arrays, tiles, strip_rows, rounds):
    """{(strips, keys): fraction of the FMA rate}."""
    found = {tile: [] for tile in tiles}
    for _ in range(rounds):
        for strips, keys in tiles:
            if keys == tiles[0][1]:  # once a line of the table
                limit = fma_rate(case.dtype, machine.isa())
            call = partial(attention, *arrays, threads=1, tiles=(strips * strip_rows, keys))
            found[strips, keys].append(case.flops / seconds_per_call(call, 0.02) / limit)
    return {tile: median(each) for tile, each in found.items()}


def show(case, all_strips, all_keys, rounds):
    """Measure the grid, with the plan's own tile in it, and print a line for each Tq."""
    arrays = case.inputs()
    own, strip_rows = plans_own(*arrays)
    all_strips, all_keys = sorted({*all_strips, own[0]}), sorted({*all_keys, own[1]})
    tiles = [(strips, keys) for strips in all_strips for keys in all_keys]
    check(case, arrays, tiles, strip_rows)
    found = fractions(case, arrays, tiles, strip_rows, rounds)
    best = max(found, key=found.get)

    print(f"\n{case.dtype} {case.shape}: a strip is {strip_rows} query rows")
    table = Table({"strips x rows": 13, **{f"{keys} keys": 16 for keys in all_keys}})
    for strips in all_strips:
        cells = [f"{strips} = {strips * strip_rows}"]
        for keys in all_keys:
            tile = strips, keys
            marks = " best" * (tile == best) + " plan" * (tile == own)
            cells.append(f"{found[tile]:.3f}{marks:<11}")
        table.line(cells)


def cases_matching(pattern):
    return matching(pattern, [(f"{case.dtype} {case.shape}", case) for case in CASES])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", type=cases_matching, default="", metavar="PATTERN", help="regular expression")
    add("--strips", type=positive, nargs="+", default=STRIPS, help="Tq, in strips")
    add("--keys", type=positive, nargs="+", default=KEYS, help="Tk")
    add("--rounds", type=positive, default=3)
    asked = parser.parse_args()

    found = facts()
    print(f"{found['cpu']}, {found['isa']}, compiler {found['compiler']}, commit {found['commit']}")
    for case in asked.cases:
        show(case, asked.strips, asked.keys, asked.rounds)


if __name__ == "__main__":
    main()
