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
measure.py has how a call is timed and checked.
"""

import argparse
import json
import re
import time
from functools import partial
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

from flashcpu import attention, machine
from flashcpu import threads as cores
from flashcpu.reference import visible_keys

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

# Bytes of scores that NumPy's contenders hold at a time: as many heads as fit, at least one. The
# softmax and the second matmul then find them in a cache (the whole batch at once is 10 % slower).
NUMPY_SCORES = 1 << 20

# A contender is a function of (case, q, k, v, threads) that returns a call without arguments, which
# returns out (B, Hq, Lq, D); or None where it does not do such a case.


def flashcpu_attention(case, q, k, v, threads):
    return partial(attention, q, k, v, causal=case.causal, threads=threads)


def numpy_attention(case, q, k, v, threads):
    """Scores, softmax in place, matmul. Under causal the full square, with a mask added."""
    scale = q.dtype.type(case.D**-0.5)
    mask = None
    if case.causal:
        seen = visible_keys(case.Lq, case.Lkv, causal=True)
        mask = np.tile(np.where(seen, 0, -np.inf).astype(q.dtype), (case.Hq // case.Hkv, 1))

    def attend(q, k, v, s, out):
        np.matmul(q * scale, k.swapaxes(-1, -2), out=s)
        if mask is not None:
            s += mask
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        np.matmul(s, v, out=out)
        out /= s.sum(axis=-1, keepdims=True)

    return numpy_call(attend, case, q, k, v)


def bare_matmuls(case, q, k, v, threads):
    """The two matmuls with nothing between, which attention by NumPy could never beat.

    Not done under causal: the full square is not the same work.
    """

    def multiply(q, k, v, s, out):
        np.matmul(q, k.swapaxes(-1, -2), out=s)
        np.matmul(s, v, out=out)

    return None if case.causal else numpy_call(multiply, case, q, k, v)


def numpy_call(attend, case, q, k, v):
    """A call of attend(q, k, v, s, out) on as many KV heads at a time as NUMPY_SCORES allows."""
    heads, rows = case.B * case.Hkv, case.Hq // case.Hkv * case.Lq
    q = q.reshape(heads, rows, case.D)
    k, v = (x.reshape(heads, case.Lkv, case.D) for x in (k, v))
    step = min(heads, max(1, NUMPY_SCORES // (rows * case.Lkv * q.itemsize)))
    s, out = np.empty((step, rows, case.Lkv), q.dtype), np.empty_like(q)
    parts = [slice(head, head + step) for head in range(0, heads, step)]
    views = [(q[part], k[part], v[part], s[: len(q[part])], out[part]) for part in parts]
    result = out.reshape(case.B, case.Hq, case.Lq, -1)

    def call():
        for view in views:
            attend(*view)
        return result

    return call


def torch_attention(case, q, k, v, threads):
    import torch

    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    if case.causal and case.Lq != case.Lkv:
        return None  # its diagonal starts in the upper left corner

    def call():
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, is_causal=case.causal, enable_gqa=case.Hq != case.Hkv
            ).numpy()

    return call


def onnxruntime_attention(case, q, k, v, threads):
    """MultiHeadAttention on (B, L, Hq * D), its fastest; a model of one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    if case.dtype != "f32" or case.Hq != case.Hkv:
        return None
    feed = {
        name: x.swapaxes(1, 2).reshape(case.B, -1, case.Hq * case.D)
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=case.Hq,
        unidirectional=int(case.causal),
    )
    shapes = {**{name: x.shape for name, x in feed.items()}, "out": feed["q"].shape}
    q_info, k_info, v_info, out_info = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    graph = helper.make_graph([node], "attention", [q_info, k_info, v_info], [out_info])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def call():
        (out,) = session.run(None, feed)
        return out.reshape(case.B, case.Lq, case.Hq, case.D).swapaxes(1, 2)

    return call


def openvino_attention(case, q, k, v, threads):
    import openvino
    from openvino import opset13

    if case.dtype != "f32" or case.Hq != case.Hkv or (case.causal and case.Lq != case.Lkv):
        return None
    inputs = [opset13.parameter(x.shape, np.float32) for x in (q, k, v)]
    node = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(openvino.Model([node], inputs), "CPU", options)
    request = model.create_infer_request()
    for index, x in enumerate((q, k, v)):
        request.set_input_tensor(index, openvino.Tensor(x, shared_memory=True))

    def call():
        request.infer()
        return request.get_output_tensor().data

    return call


CONTENDERS = {
    "flashcpu": flashcpu_attention,
    "numpy": numpy_attention,
    "matmuls": bare_matmuls,
}
PEERS = {
    "torch": (torch_attention, ["torch"]),
    "onnxruntime": (onnxruntime_attention, ["onnxruntime", "onnx"]),
    "openvino": (openvino_attention, ["openvino"]),
}
# OpenBLAS's and OpenMP's threads wait for more work by spinning, for some 20 ms; where there may be
# any, a contender starts when those of the one before are asleep.
SETTLE = 0.03


def expected_products(case, q, k, v, q_start):
    """What bare_matmuls is to return."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, case.Hq // case.Hkv, axis=1) for x in (k, v))
    return q @ k.swapaxes(-1, -2) @ v


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
        beside = contenders if row.isa is None else {"flashcpu": flashcpu_attention}
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
