"""What the benchmarks share: cases and their inputs, the machine's limits, checking, timing, facts.

Nothing here compares anything; compare.py and tiles.py do.
"""

import argparse
import math
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import threadpoolctl

from flashcpu import _engine, machine
from flashcpu.reference import oracle, visible_keys

EPSILON = {"f64": 2**-52, "f32": 2**-23, "f16": 2**-10, "bf16": 2**-7}
# Either one alone makes NumPy's OpenBLAS take kernels or blocks of another CPU.
BLAS_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
# Scores (B * Hq * Lq * Lkv) up to which every row is checked, and the rows of a sample beyond that.
CHECKED_WHOLE = 1 << 21
SAMPLE = 50
# Largest error, in units of the dtype's epsilon times the largest expected element. Right answers,
# NumPy's too, show up to 20 on these inputs; one key of 2048 left out shows a million. Where 16
# bits are stored, rounding a right result is up to 0.5, and a P rounded to 16 bits some 2.
TOLERANCE = {"f64": 100, "f32": 100, "f16": 4, "bf16": 4}
# Seconds of products before a cold call, at least: a server of Ice Lake runs the first 60 to 100 us
# of them at 0.6 of its speed.
PRODUCTS = 2e-4


def positive(text):
    """For argparse: a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is needed, got {text!r}")
    return int(text)


def matching(pattern, named):
    """For argparse: of the (name, item) pairs, the items whose names the pattern matches."""
    try:
        found = [item for name, item in named if re.search(pattern, name)]
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from None
    if not found:
        names = "; ".join(sorted({name for name, _ in named}))
        raise argparse.ArgumentTypeError(f"{pattern!r} matches none of: {names}")
    return found


class Case(NamedTuple):
    """One problem: q is (B, Hq, Lq, D), k and v are (B, Hkv, Lkv, D)."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lkv: int
    D: int
    dtype: str = "f32"
    causal: bool = False

    @property
    def shape(self):
        """The lengths as the tables print them."""
        return " ".join(map(str, self[:6]))

    @property
    def flops(self):
        """Two for each multiply-add of q k^T and P v; under causal only the pairs that are seen."""
        pairs = self.Lq * self.Lkv
        if self.causal:
            pairs = int(np.count_nonzero(visible_keys(self.Lq, self.Lkv, causal=True)))
        return 4 * self.B * self.Hq * pairs * self.D

    @property
    def stored_bytes(self):
        """Bytes of K and V together."""
        return 2 * self.B * self.Hkv * self.Lkv * self.D * numpy_dtype(self.dtype).itemsize

    def inputs(self):
        """q, k, v: normal numbers, the same in every run; those of 16 bits are rounded float32."""
        rng = np.random.default_rng(0)
        stored = numpy_dtype(self.dtype)
        drawn = stored if stored.itemsize >= 4 else np.float32
        heads_and_lengths = ((self.Hq, self.Lq), (self.Hkv, self.Lkv), (self.Hkv, self.Lkv))
        return tuple(
            rng.standard_normal((self.B, H, L, self.D), drawn).astype(stored, copy=False)
            for H, L in heads_and_lengths
        )


def numpy_dtype(name):
    """f64, f32, f16, or bf16, for which ml_dtypes must be installed."""
    if name == "bf16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(name.replace("f", "float"))


def start_clean():
    """Start this process again without BLAS_VARIABLES, if it has any: they act when NumPy loads."""
    if any(name in os.environ for name in BLAS_VARIABLES):
        kept = {name: text for name, text in os.environ.items() if name not in BLAS_VARIABLES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept)


def expected_attention(case, q, k, v, q_start):
    """The float64 answer for the queries q, of which the first stands at q_start."""
    return oracle(q, k, v, causal=case.causal, q_start=q_start)[0]


def find_truth(case, q, k, v, expected=expected_attention):
    """[(run of query rows, what is right there)]: all rows, or a sample where that is dear.

    Parameters
    ----------
    case : Case
    q, k, v : arrays of the case
    expected : function of (case, q, k, v, q_start)
        The truth in float64. Called with a KV head, for K and V widened to float64 may be four
        times as large as they are stored, and a run of query rows of its group: all of them where
        that is cheap, else SAMPLE at the start, in the middle and at the end.
    """
    group = case.Hq // case.Hkv
    if case.Lq <= SAMPLE or case.B * case.Hq * case.Lq * case.Lkv <= CHECKED_WHOLE:
        runs = [slice(0, case.Lq)]
    else:
        last = case.Lq - SAMPLE
        runs = [slice(start, start + SAMPLE) for start in (0, last // 2, last)]
    truth = []
    for run in runs:
        heads = [
            expected(
                case,
                q[:, head * group : (head + 1) * group, run],
                k[:, head : head + 1],
                v[:, head : head + 1],
                case.Lkv - case.Lq + run.start,
            )
            for head in range(case.Hkv)
        ]
        truth.append((run, np.concatenate(heads, axis=1)))
    return truth


def worst_error(case, truth, answer):
    """Largest error of an answer (B, Hq, Lq, D), relative to TOLERANCE: up to 1 it is right.

    truth is that of find_truth.
    """
    worst = 0.0
    for run, expected in truth:
        found = answer[:, :, run].astype(np.float64)
        allowed = TOLERANCE[case.dtype] * EPSILON[case.dtype] * np.abs(expected).max()
        worst = np.fmax(worst, np.abs(found - expected).max() / allowed)
        if not np.isfinite(found).all():
            worst = math.inf
    return float(worst)


def seconds_per_call(call, at_least):
    """Seconds of one call, measured over so many that they last at_least.

    A call that is long enough is taken as it comes; a short one first warms the caches.
    """
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            call()
        took = time.perf_counter() - start
        if took >= at_least:
            return took / count
        count = max(count + 1, math.ceil(count * min(100.0, 1.2 * at_least / took)))


def seconds_per_cold_call(call, arrays, threads, at_least):
    """Median seconds of single calls that find code and plans in the caches, but not the arrays.

    So it is in decoding, where between two calls for a layer the other layers' K and V pass through
    the caches. A CPU may let its multipliers sleep; a model's projections, and the loop of the FMA
    rate, leave them awake. So before each call `threads` threads multiply in registers, for
    PRODUCTS seconds or up to three times as long: with one the caller, else threads of their own,
    which need not run where those of the call do, and beside any that still wait in a loop. Five
    calls or more, which together last at_least.
    """
    isa = machine.isa()
    flush = machine.kernels("f32", "f32", isa)[0].flush
    call()
    took = []
    while len(took) < 5 or sum(took) < at_least:
        for array in arrays:
            flush(array.reshape(-1).view(np.uint8))
        fma_rate("f32", isa, threads, PRODUCTS)
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return median(took)


def fma_rate(dtype, isa, threads=1, seconds=0.02):
    """Measured flops a second of `threads` threads that do nothing but FMAs at the same time.

    One run of about `seconds`, not the best of several: what the machine gave, as for a call.
    """
    if threads == 1:  # where the calls run
        return machine.fma_rate(dtype, isa, seconds)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(machine.fma_rate, *([x] * threads for x in (dtype, isa, seconds))))


def read_rate(arrays, threads, at_least):
    """Measured bytes a second of reading as much as C-contiguous arrays hold from memory.

    Timed as a call is: in one parallel region, for which threads may have to be woken.
    """
    table = machine.kernels("f32", "f32", machine.isa())[0]
    buffer = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])
    took = seconds_per_cold_call(
        lambda: table.read_bytes(buffer, threads), [buffer], threads, at_least
    )
    return buffer.size / took


def facts(*packages):
    """What a reader of the figures must know: CPU, compiler, commit, date, versions."""
    blas = [
        {name: pool[name] for name in ("internal_api", "version", "architecture") if name in pool}
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    ]
    return {
        "cpu": machine.cpu_name(),
        "caches": machine.caches(),
        "isa": machine.isa(),
        "compiler": getattr(_engine, "COMPILER", None) or platform.python_compiler(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flashcpu", "numpy", *packages)},
        },
        "blas": blas,
    }


def _commit():
    """The commit, with -dirty where files differ from it; 'unknown' outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


class Table:
    """Lines of cells, aligned for a terminal or as Markdown; printed as they come."""

    def __init__(self, columns, markdown=False):
        self.widths, self.markdown = list(columns.values()), markdown
        self.line(columns)
        if markdown:
            # The first column is a name, all others are numbers.
            print("|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|")

    def line(self, cells):
        """Print one line; the first cell stands left, the others right."""
        if self.markdown:
            print("| " + " | ".join(cells) + " |", flush=True)
            return
        (first, width), *others = zip(cells, self.widths, strict=True)
        line = [f"{first:<{width}}", *(f"{cell:>{width}}" for cell, width in others)]
        print("  ".join(line), flush=True)
