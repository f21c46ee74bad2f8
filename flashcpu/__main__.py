"""`python -m flashcpu`: what this machine gives you, checked and measured in about ten seconds."""

import argparse
import statistics
import time
import tracemalloc
from functools import partial

import numpy as np

from flashcpu import attention, machine, problem
from flashcpu.api import prepare
from flashcpu.reference import oracle
from flashcpu.threads import limit

HEADS, D = 8, 64
LENGTHS = (128, 512, 2048, 4096)


def numpy_attention(q, k, v):
    """Attention as one writes it with NumPy matmul: the matrix of scores in full."""
    s = q @ k.swapaxes(-1, -2)
    s *= 1 / np.sqrt(q.shape[-1], dtype=q.dtype)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


def operands(L, dtype):
    """q, k, v of shape (1, HEADS, L, D)."""
    rng = np.random.default_rng(L)
    return [rng.standard_normal((1, HEADS, L, D)).astype(dtype) for _ in range(3)]


def check():
    """Print the largest error on every instruction set, beside NumPy's; tell if all is right."""
    print("Right? Largest difference from float64 safe softmax, L = 300, causal and not")
    right = True
    for dtype in (np.float32, np.float64):
        q, k, v = operands(300, dtype)
        cells = []
        for isa in machine.ISAS:
            with machine.use_isa(isa):
                worst = max(
                    np.abs(
                        attention(q, k, v, causal=causal) - oracle(q, k, v, causal=causal)[0]
                    ).max()
                    for causal in (False, True)
                )
            right = right and worst < 30 * np.finfo(dtype).eps
            cells.append(f"{isa} {worst:.1e}")
        naive = np.abs(numpy_attention(q, k, v) - oracle(q, k, v)[0]).max()
        beside = f"   (NumPy {naive:.1e})" if dtype is np.float32 else ""
        print(f"  {dtype.__name__}   {'   '.join(cells)}{beside}")
    q, k, v = operands(300, np.float32)
    alone = attention(q[:, 3:4, 200:201], k[:, 3:4], v[:, 3:4], threads=1)
    same = np.array_equal(alone, attention(q, k, v)[:, 3:4, 200:201])
    right = right and same
    print(
        f"  one row alone and among all others: {'the same bits' if same else 'DIFFERENT BITS'}\n"
    )
    return right


def seconds_of(call):
    """Median time of a call, over about 0.4 s."""
    took, end = [], time.perf_counter() + 0.4
    while len(took) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def extra_bytes(call):
    """Peak of NumPy's memory during a call, its result not counted."""
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1] - result.nbytes
    tracemalloc.stop()
    return max(0, peak)


def scratch_bytes(q, k, v):
    """What the engine takes beside the result."""
    asked = problem.of(q, k, v)
    call = prepare(asked, q.strides, asked.Lkv, None, None, limit(None), machine.isa())
    return call.workspace_bytes * call.threads


def compare():
    """Print attention by flashcpu and by NumPy matmul, at a few lengths."""
    threads = limit(None)
    print(f"Fast? float32, {HEADS} heads, D = {D}, {threads} thread{'s' * (threads > 1)}; ", end="")
    print("percent of the FMA rate measured beside it")
    print("      L  |              flashcpu                    |           NumPy matmul")
    print(
        "         |      time  GFLOP/s             memory    |      time  GFLOP/s           memory"
    )
    for L in LENGTHS:
        q, k, v = operands(L, np.float32)
        peak = threads * machine.fma_rate("f32")
        line = f"  {L:5}  |"
        for call, memory in (
            (partial(attention, q, k, v), scratch_bytes(q, k, v)),
            (partial(numpy_attention, q, k, v), None),
        ):
            call()
            took = seconds_of(call)
            rate = 4 * HEADS * L * L * D / took
            share = rate / peak
            bar = ("#" * round(10 * share)).ljust(10, ".")
            memory = extra_bytes(call) if memory is None else memory
            line += f" {took * 1e3:6.2f} ms  {rate / 1e9:5.0f} {bar} {share:4.0%}"
            line += f" {machine.size_text(memory):>8} |"
        print(line.rstrip("|"), flush=True)
    print()


def main():
    machine.show_config()
    rates = [machine.fma_rate(dtype) / 1e9 for dtype in ("f32", "f64")]
    read = machine.read_bandwidth(limit(None)) / 1e9
    print(f"  measured   f32 {rates[0]:.0f}, f64 {rates[1]:.0f} GFLOP/s a thread; ", end="")
    print(f"reads {read:.0f} GB/s\n")
    right = check()
    compare()
    print("Next: python -m flashcpu.reference derives the method step by step;")
    print("      help(flashcpu.attention) tells what every argument means.")
    return 0 if right else 1


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m flashcpu", description=__doc__).parse_args()
    raise SystemExit(main())
