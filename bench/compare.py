"""flashcpu beside NumPy, beside two bare matmuls, beside other libraries: checked, then timed.

    python bench/compare.py                     every row, about three minutes
    python bench/compare.py --rows small        the rows whose name or shape matches
    python bench/compare.py --peers torch,onnxruntime,openvino
    python bench/compare.py --json figures.json --markdown

It needs threadpoolctl, from `pip install '.[bench]'`; peers are left out where not installed.

Rows and targets are those of the table "Where it has to get" of the design. Every contender is
first compared with float64. Then come rounds: each measures the machine's limit (a loop of
nothing but FMAs, on as many threads) and every contender once, on every number of threads. A ratio
is taken within its round, where the machine was the same for both, and the median over the rounds
is shown. Threads of all contenders are limited by threadpoolctl. What NumPy needs beside its
inputs is allocated before the clock starts; flashcpu allocates its result in every call.
peers.py has the contenders, measure.py how a call is timed and checked.
"""

import argparse
import json
import re
import time
from importlib.metadata import PackageNotFoundError, version
from operator import truediv
from statistics import median
from typing import NamedTuple

import numpy as np
import threadpoolctl
from measure import (
    Case,
    Table,
    expected_attention,
    facts,
    fma_rate,
    seconds_per_call,
    start_clean,
    worst_error,
)
from peers import CONTENDERS, PEERS, expected_products

from flashcpu import machine
from flashcpu import threads as cores

TARGETS = ("fraction", "scaling", "microseconds")


class Row(NamedTuple):
    """A line of the table and what it is to reach: of these three, those that apply."""

    name: str
    case: Case
    fraction: float | None = None  # of the FMA rate, one thread
    scaling: float | None = None  # two threads over one
    microseconds: float | None = None  # of a call
    isa: str | None = None  # None: the one in use, and contenders beside it


def square(B, H, L, D, dtype="f32", causal=False):
    return Case(B, H, H, L, L, D, dtype, causal)


ROWS = (
    Row("prefill f32", square(1, 8, 2048, 64), 0.84, scaling=1.90),
    Row("prefill f32", square(1, 8, 2048, 128), 0.88, scaling=1.90),
    Row("prefill f32 avx2", square(1, 8, 2048, 64), 0.83, isa="avx2"),
    Row("prefill f32 avx2", square(1, 8, 2048, 128), 0.83, isa="avx2"),
    Row("prefill f64", square(1, 8, 2048, 64, "f64"), 0.80),
    Row("prefill f64", Case(4, 1, 1, 512, 1024, 128, "f64"), 0.80),
    Row("causal f32", square(1, 8, 1024, 64, causal=True), 0.80),
    Row("causal f32", square(1, 8, 2048, 64, causal=True), 0.80),
    Row("causal f32", square(1, 8, 2048, 128, causal=True), 0.80),
    Row("small f32", square(8, 12, 128, 64), 0.70),
    Row("small f32", square(1, 12, 197, 64), 0.65),
    Row("small f32", square(1, 12, 257, 64), 0.70),
    Row("small f32", square(16, 12, 64, 32), 0.55),
    Row("small f32", square(1, 8, 512, 64)),
    Row("tiny call f32", Case(1, 1, 1, 1, 16, 16), microseconds=8),
)

# OpenBLAS's and OpenMP's threads wait for more work by spinning, for some 20 ms; where there may be
# any, a contender starts when those of the one before are asleep.
SETTLE = 0.03


def checked_calls(row, contenders, counts):
    """The calls of a row, {(name, threads): call}, after each gave a right answer."""
    arrays = row.case.inputs()
    calls = {}
    for name, contender in contenders.items():
        expected = expected_products if name == "matmuls" else expected_attention
        for count in counts:
            call = contender(row.case, *arrays, count)
            if call is None:
                continue
            error = worst_error(row.case, arrays, call(), expected)
            if not error <= 1:
                raise SystemExit(
                    f"{name} is wrong on {row.name} {row.case.shape}: "
                    f"{error:.3g} times the error allowed (measure.TOLERANCE)"
                )
            calls[name, count] = call
    return calls


def measured(row, contenders, counts, rounds, at_least):
    """Check and time a row; a summary for each number of threads."""
    isa = row.isa or machine.isa()
    with machine.use_isa(isa):
        calls = checked_calls(row, contenders, counts)
        fma = {count: [] for count in counts}
        seconds = {key: [] for key in calls}
        # After all libraries are loaded: it limits those that it finds.
        controller = threadpoolctl.ThreadpoolController()
        for _ in range(rounds):
            for count in counts:
                with controller.limit(limits=count):
                    fma[count].append(fma_rate(row.case.dtype, isa, count))
                    for name, number in calls:
                        if number == count:
                            time.sleep(SETTLE if max(counts) > 1 else 0)
                            took = seconds_per_call(calls[name, count], at_least)
                            seconds[name, count].append(took)
    for count in counts:
        yield summary(row, isa, count, fma[count], seconds)


def summary(row, isa, count, fma, seconds):
    """The figures of a row on `count` threads: of every round, and the medians of their ratios."""
    took = {name: times for (name, n), times in seconds.items() if n == count}
    ours = took["flashcpu"]
    result = {
        "row": row.name,
        "case": row.case._asdict(),
        "isa": isa,
        "threads": count,
        "flops": row.case.flops,
        "target": {name: getattr(row, name) for name in TARGETS if getattr(row, name)},
        "fma_rate": fma,
        "seconds": took,
        "fraction": median(row.case.flops / t / rate for t, rate in zip(ours, fma, strict=True)),
        "times_as_fast_as": {
            name: median(map(truediv, times, ours))
            for name, times in took.items()
            if name != "flashcpu"
        },
    }
    if count > 1 and ("flashcpu", 1) in seconds:
        result["scaling"] = median(map(truediv, seconds["flashcpu", 1], ours))
    return result


def columns(names):
    """Headings of the table and their widths."""
    return {
        "row": 16,
        "B Hq Hkv Lq Lkv D": 21,
        "threads": 7,
        "time": 8,
        "GFLOP/s": 7,
        "of limit": 8,
        "x 1 thread": 10,
        "to reach": 8,
        **{f"x {name}": len(name) + 2 for name in names},
    }


def cells(result, names):
    """A result as the table prints it; '-' where there is nothing to tell."""
    case, target, count = Case(**result["case"]), result["target"], result["threads"]
    seconds = median(result["seconds"]["flashcpu"])
    is_tiny = "microseconds" in target
    if is_tiny:
        reach = f"{target['microseconds']:g} us"
    elif count == 1 and "fraction" in target:
        reach = f"{target['fraction']:.2f}"
    elif count == 2 and "scaling" in target:
        reach = f"{target['scaling']:.2f} x"
    else:
        reach = "-"
    beside = result["times_as_fast_as"]
    return [
        result["row"],
        case.shape,
        str(count),
        f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms",
        "-" if is_tiny else f"{case.flops / seconds / 1e9:.1f}",
        "-" if is_tiny else f"{result['fraction']:.3f}",
        f"{result['scaling']:.2f}" if "scaling" in result else "-",
        reach,
        *(f"{beside[name]:.2f}" if name in beside else "-" for name in names),
    ]


NOTES = """\
of limit    flops a second over those of a loop of nothing but FMAs, on as many threads (f32 avx2:
            256-bit FMAs); "to reach" is the design's target for it, on one thread
x 1 thread  speed over that of one thread; a "to reach" such as 1.90 x is for this
x numpy     scores, softmax in place, matmul; under causal the full square, with a mask
x matmuls   NumPy's two matmuls alone, no softmax
causal      flops count the pairs that are seen, for everyone"""


def limits(results, counts):
    """The machine's limits in this run: FMA flops a second of each type, and bytes a second."""
    rates = {}
    for result in results:
        key = result["case"]["dtype"], result["isa"], result["threads"]
        rates.setdefault(key, []).extend(result["fma_rate"])
    fma = [
        {"dtype": dtype, "isa": isa, "threads": count, "flops_per_second": median(rate)}
        for (dtype, isa, count), rate in rates.items()
    ]
    read = [
        {"threads": count, "bytes_per_second": machine.read_bandwidth(count)} for count in counts
    ]
    return {"fma": fma, "read": read}


def limit_lines(found):
    for one in found["fma"]:
        rate = one["flops_per_second"] / 1e9
        yield f"FMA {one['dtype']} {one['isa']} x{one['threads']}: {rate:.1f} GFLOP/s"
    for one in found["read"]:
        yield f"read x{one['threads']}: {one['bytes_per_second'] / 1e9:.1f} GB/s"


def missing(packages):
    """The first package that is not installed, or None."""
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            return name
    return None


def arguments():
    most = cores.usable_cores()
    usable = "1,2" if most > 1 else "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", metavar="PATTERN", help="regular expression")
    parser.add_argument("--threads", default=usable, help=f"numbers of threads ({usable})")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default="", help=f"of {','.join(PEERS)}")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    parser.add_argument("--quick", action="store_true", help="two rounds, and shorter ones")
    parser.add_argument("--markdown", action="store_true", help="the table for the README")
    asked = parser.parse_args()
    asked.threads = [int(count) for count in asked.threads.split(",")]
    asked.peers = [name for name in asked.peers.split(",") if name]
    if not all(1 <= count <= most for count in asked.threads):
        parser.error(f"--threads: this process has {most} cores")
    for name in set(asked.peers) - set(PEERS):
        parser.error(f"--peers: no {name!r}, there are {', '.join(PEERS)}")
    return asked


def main():
    start_clean()
    asked = arguments()
    rounds, at_least = (2, 0.005) if asked.quick else (asked.rounds, 0.02)

    contenders, packages = dict(CONTENDERS), []
    for name in asked.peers:
        contender, needs = PEERS[name]
        if gone := missing(needs):
            print(f"{name} is left out: {gone} is not installed")
        else:
            contenders[name] = contender
            packages += needs
    names = list(contenders)[1:]

    found = facts("threadpoolctl", *packages)
    blas = " ".join(found["blas"][0].values()) if found["blas"] else "no BLAS known"
    print(f"{found['cpu']}, {found['isa']}, compiler {found['compiler']}, commit {found['commit']}")
    print(f"NumPy {np.__version__} with {blas}; median of {rounds} rounds\n")
    table, results = Table(columns(names), asked.markdown), []
    for row in ROWS:
        if not re.search(asked.rows, f"{row.name} {row.case.shape}"):
            continue
        if row.isa and (row.isa == machine.isa() or row.isa not in machine.ISAS):
            continue
        beside = contenders if row.isa is None else {"flashcpu": CONTENDERS["flashcpu"]}
        counts = asked.threads if row.microseconds is None else asked.threads[:1]
        for result in measured(row, beside, counts, rounds, at_least):
            results.append(result)
            table.line(cells(result, names))
    found["limits"] = limits(results, asked.threads)
    print("", *limit_lines(found["limits"]), "", NOTES, sep="\n")
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump({**found, "rounds": rounds, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
