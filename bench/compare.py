"""flashcpu beside NumPy, beside two bare matmuls, beside other libraries: checked, then timed.

    python bench/compare.py                     every row but the two below: some minutes
    python bench/compare.py --rows small        the rows whose name or shape matches
    python bench/compare.py --rows curve        from 1 to 64 queries: only when PATTERN has the word
    python bench/compare.py --rows million      a million keys, 2 GB: likewise
    python bench/compare.py --peers torch,onnxruntime,openvino,llamacpp
    python bench/compare.py --json figures.json --markdown

It needs threadpoolctl, from `pip install '.[bench]'`, and ml_dtypes for the rows of bf16; peers are
left out where not installed.

"to reach" is the share of the limit, the speed-up or the time that flashcpu wants to have. Every
contender is first compared with float64; a peer that fails is left out of the row, with a line that
says so.
Then come rounds: each measures the machine's limit (a loop of nothing but FMAs, and where keys and
values come from memory a loop of nothing but reads, on as many threads) and every contender once,
in the same way, on every number of threads. A ratio is taken within its round, where the machine
was the same for both, and the median over the rounds is shown. Threads of all contenders are
limited by threadpoolctl. What NumPy needs beside its inputs is allocated before the clock starts;
flashcpu allocates its result in every call. Where keys and values come from memory, products run
just before each call, so that multipliers are awake. peers.py has the contenders, measure.py has
how a call is timed and checked.
"""

import argparse
import json
import sys
import time
from functools import cache
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
    find_truth,
    fma_rate,
    matching,
    positive,
    read_rate,
    seconds_per_call,
    seconds_per_cold_call,
    start_clean,
    worst_error,
)
from peers import CONTENDERS, PEERS, expected_products

from flashcpu import machine
from flashcpu import threads as cores

TARGETS = ("fraction", "scaling", "microseconds")
# Kinds of rows, the first words of their names, that run only where --rows has the word.
ON_DEMAND = ("curve", "million")


class Row(NamedTuple):
    """A line of the table and what it is to reach: of these three, those that apply."""

    name: str
    case: Case
    fraction: float | None = None  # of the limit, one thread
    scaling: float | None = None  # two threads over one
    microseconds: float | None = None  # of a call
    isa: str | None = None  # None: the one in use, and contenders beside it
    is_cold: bool = False  # K and V come from memory, and the limit may be to read them


def square(B, H, L, D, dtype="f32", causal=False):
    return Case(B, H, H, L, L, D, dtype, causal)


def cold_rows(kind, cases, fraction=None):
    return [Row(f"{kind} {case.dtype}", case, fraction, is_cold=True) for case in cases]


# Around the sizes at which the kernels' registers are full, and the first that are cut into parts.
FEW = (1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 24, 32, 33, 40, 47, 48, 49, 56, 64)

ROWS = (
    Row("prefill f32", square(1, 8, 2048, 64), 0.84, scaling=1.90),
    Row("prefill f32", square(1, 8, 2048, 128), 0.88, scaling=1.90),
    Row("prefill f32 avx2", square(1, 8, 2048, 64), 0.83, isa="avx2"),
    Row("prefill f32 avx2", square(1, 8, 2048, 128), 0.83, isa="avx2"),
    Row("prefill f64", square(1, 8, 2048, 64, "f64"), 0.80),
    Row("prefill f64", Case(4, 1, 1, 512, 1024, 128, "f64"), 0.80),
    Row("prefill bf16", square(1, 8, 2048, 64, "bf16"), 0.73),
    Row("prefill bf16", square(1, 8, 2048, 128, "bf16"), 0.79),
    Row("prefill f16", square(1, 8, 2048, 64, "f16"), 0.82),
    Row("prefill f16", square(1, 8, 2048, 128, "f16"), 0.82),
    Row("prefill bf16 avx2", square(1, 8, 2048, 64, "bf16"), 0.75, isa="avx2"),
    Row("prefill bf16 avx2", square(1, 8, 2048, 128, "bf16"), 0.75, isa="avx2"),
    Row("prefill f16 avx2", square(1, 8, 2048, 64, "f16"), 0.75, isa="avx2"),
    Row("prefill f16 avx2", square(1, 8, 2048, 128, "f16"), 0.75, isa="avx2"),
    Row("causal f32", square(1, 8, 1024, 64, causal=True), 0.80),
    Row("causal f32", square(1, 8, 2048, 64, causal=True), 0.80),
    Row("causal f32", square(1, 8, 2048, 128, causal=True), 0.80),
    Row("small f32", square(8, 12, 128, 64), 0.70),
    Row("small f32", square(1, 12, 197, 64), 0.65),
    Row("small f32", square(1, 12, 257, 64), 0.70),
    Row("small f32", square(16, 12, 64, 32), 0.55),
    Row("small f32", square(1, 8, 512, 64)),
    *cold_rows(
        "decode",
        [
            Case(B, Hq, Hkv, Lq, Lkv, D, dtype)
            for B, Hq, Hkv, Lkv, D, dtype in (
                (8, 8, 8, 4096, 128, "f32"),
                (1, 32, 8, 8192, 128, "f32"),
                (1, 32, 8, 8192, 128, "f16"),
                (1, 32, 8, 8192, 128, "bf16"),
                (1, 9, 3, 2048, 64, "f32"),
            )
            for Lq in (1, 4)
        ],
        0.80,
    ),
    Row("tiny call f32", Case(1, 1, 1, 1, 16, 16), microseconds=8),
    *cold_rows("curve", [Case(1, 8, 8, Lq, 4096, 64) for Lq in FEW]),
    *cold_rows("curve", [Case(1, 8, 8, Lq, 4096, 64, "bf16") for Lq in FEW]),
    *cold_rows("curve", [Case(1, 32, 8, Lq, 4096, 128) for Lq in FEW]),
    *cold_rows("million", [Case(1, 8, 8, 1, 1_000_000, 64, "bf16")], 0.80),
)

# OpenBLAS's threads wait for more work by spinning, for 0.1 s; those of others less long. After
# several threads were in use, the next contender starts when they are asleep.
SETTLE = 0.12


def checked_calls(row, arrays, contenders, counts):
    """The calls of a row, {(name, threads): call}, of those that gave a right answer.

    Stops where flashcpu did not.
    """

    @cache
    def truth(expected):
        return find_truth(row.case, *arrays, expected)

    calls = {}
    for name, contender in contenders.items():
        expected = expected_products if name == "matmuls" else expected_attention
        for count in counts:
            try:
                call = contender(row.case, *arrays, count)
                if call is None:
                    continue
                error = worst_error(row.case, truth(expected), call())
                if not error <= 1:
                    raise ArithmeticError(f"{error:.3g} times the error allowed in measure.py")
            except Exception as failure:
                if name == "flashcpu":
                    raise
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                remark(f"{row.name} {row.case.shape} x{count} without {name}: {reason}")
            else:
                calls[name, count] = call
    return calls


def remark(text):
    """Beside the table, not in it."""
    print(text, file=sys.stderr, flush=True)


def measured(row, contenders, counts, rounds, at_least):
    """Check and time a row; a summary for each number of threads."""
    isa = row.isa or machine.isa()
    with machine.use_isa(isa):
        arrays = row.case.inputs()
        calls = checked_calls(row, arrays, contenders, counts)

        def seconds_of(call, count):
            if not row.is_cold:
                return seconds_per_call(call, at_least)
            reads = getattr(call, "reads", arrays[1:])
            return seconds_per_cold_call(call, reads, count, at_least)

        fma = {count: [] for count in counts}
        read = {count: [] for count in counts}
        seconds = {key: [] for key in calls}
        # After all libraries are loaded: it limits those that it finds.
        controller = threadpoolctl.ThreadpoolController()
        time.sleep(SETTLE)
        for _ in range(rounds):
            for count in counts:
                with controller.limit(limits=count):
                    fma[count].append(fma_rate(row.case.dtype, isa, count, at_least))
                    if row.is_cold:
                        read[count].append(read_rate(arrays[1:], count, at_least))
                    for name, number in calls:
                        if number == count:
                            took = seconds_of(calls[name, count], count)
                            seconds[name, count].append(took)
                            time.sleep(SETTLE if count > 1 else 0)
    for count in counts:
        yield summary(row, isa, count, fma[count], read[count], seconds)


def summary(row, isa, count, fma, read, seconds):
    """The figures of a row on `count` threads: of every round, and the medians of their ratios.

    The limit, in flops a second, is the FMA rate; of a cold row also that of the flops for which K
    and V can be read in a second.
    """
    took = {name: times for (name, n), times in seconds.items() if n == count}
    ours = took["flashcpu"]
    flops_per_byte = row.case.flops / row.case.stored_bytes
    limit = fma
    if read:
        limit = [min(f, r * flops_per_byte) for f, r in zip(fma, read, strict=True)]
    result = {
        "row": row.name,
        "case": row.case._asdict(),
        "isa": isa,
        "threads": count,
        "flops": row.case.flops,
        "stored_bytes": row.case.stored_bytes,
        "target": {name: getattr(row, name) for name in TARGETS if getattr(row, name)},
        "fma_rate": fma,
        "read_rate": read,
        "bound": "read" if median(limit) < median(fma) else "fma",
        "seconds": took,
        "fraction": median(row.case.flops / t / rate for t, rate in zip(ours, limit, strict=True)),
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
        "row": 17,
        "B Hq Hkv Lq Lkv D": 21,
        "threads": 7,
        "time": 8,
        "GFLOP/s": 7,
        "of limit": 10,
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
    bound = f" {result['bound']}" if result["read_rate"] else ""
    beside = result["times_as_fast_as"]
    return [
        result["row"],
        case.shape,
        str(count),
        f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms",
        "-" if is_tiny else f"{case.flops / seconds / 1e9:.1f}",
        "-" if is_tiny else f"{result['fraction']:.3f}{bound}",
        f"{result['scaling']:.2f}" if "scaling" in result else "-",
        reach,
        *(f"{beside[name]:.2f}" if name in beside else "-" for name in names),
    ]


NOTES = """\
of limit    flops a second over those of a loop of nothing but FMAs, on as many threads (avx2:
            256-bit FMAs; bf16: products in pairs where the CPU has them; f16: FMAs of f32); "to
            reach" is our target for it, on one thread
... read    of the flops for which K and V can be read in a second: the lower limit of the two where
            they come from memory, as in decode, curve and million; else "... fma" is said there.
            There K and V are flushed, and products run, before each call and each read
x 1 thread  speed over that of one thread; a "to reach" such as 1.90 x is for this
x numpy     scores, softmax in place, matmul; under causal the full square, with a mask; 16 bits
            are widened to float32 first
x matmuls   NumPy's two matmuls alone, no softmax
causal      flops count the pairs that are seen, for everyone"""


def limits(results, counts):
    """The machine's limits: FMA flops a second of each type in this run, and bytes a second of a
    read at its end."""
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
        yield f"read 256 MiB x{one['threads']}: {one['bytes_per_second'] / 1e9:.1f} GB/s"


def missing(packages):
    """The first package that is not installed, or None."""
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            return name
    return None


def rows_matching(pattern):
    unasked = tuple(kind for kind in ON_DEMAND if kind not in pattern)
    rows = matching(pattern, [(f"{row.name} {row.case.shape}", row) for row in ROWS])
    rows = [row for row in rows if not row.name.startswith(unasked)]
    if not rows:
        raise argparse.ArgumentTypeError(f"{pattern!r} needs the word: {', '.join(unasked)}")
    return rows


def thread_counts(text):
    return [positive(each) for each in text.split(",")]


def arguments():
    most = cores.usable_cores()
    usable = "1,2" if most > 1 else "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", type=rows_matching, default="", metavar="PATTERN", help="regular expression")
    add("--threads", type=thread_counts, default=usable, help=f"numbers of threads ({usable})")
    add("--rounds", type=positive, default=7)
    add("--peers", default="", help=f"of {','.join(PEERS)}")
    add("--json", metavar="FILE", help="write every figure of every round")
    add("--quick", action="store_true", help="two rounds, and shorter ones")
    add("--markdown", action="store_true", help="the table for the README")
    asked = parser.parse_args()
    asked.peers = [name for name in asked.peers.split(",") if name]
    if max(asked.threads) > most:
        parser.error(f"--threads: this process has {most} cores")
    for name in set(asked.peers) - set(PEERS):
        parser.error(f"--peers: no {name!r}, there are {', '.join(PEERS)}")
    return asked


def main():
    start_clean()
    asked = arguments()
    rounds, at_least = (2, 0.005) if asked.quick else (asked.rounds, 0.02)

    contenders = dict(CONTENDERS)
    packages = [] if missing(["ml_dtypes"]) else ["ml_dtypes"]
    for name in asked.peers:
        contender, needs = PEERS[name]
        if gone := missing(needs):
            remark(f"{name} is left out: {gone} is not installed")
        else:
            contenders[name] = contender
            packages += needs
    names = list(contenders)[1:]

    found = facts("threadpoolctl", *packages)
    blas = " ".join(found["blas"][0].values()) if found["blas"] else "no BLAS known"
    print(f"{found['cpu']}, {found['isa']}, compiler {found['compiler']}, commit {found['commit']}")
    print(f"NumPy {np.__version__} with {blas}; median of {rounds} rounds\n")
    table, results = Table(columns(names), asked.markdown), []
    for row in asked.rows:
        if row.isa and (row.isa == machine.isa() or row.isa not in machine.ISAS):
            continue
        if row.case.dtype == "bf16" and missing(["ml_dtypes"]):
            remark(f"{row.name} {row.case.shape} is left out: ml_dtypes is not installed")
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
