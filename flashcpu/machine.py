"""What this CPU is: its name, instruction sets, caches, and the limits one can measure."""

import contextlib
import math
import os
import platform
import time
from functools import cache
from pathlib import Path

import numpy as np

from flashcpu import _engine
from flashcpu.plan import Lanes
from flashcpu.threads import limit, usable_cores

ISAS = tuple(_engine.isas())
READ = 256 << 20  # bytes that are read to measure how fast that is


def _chosen_isa():
    name = os.environ.get("FLASHCPU_ISA", "").strip().lower()
    if name and name not in ISAS:
        raise ImportError(f"FLASHCPU_ISA={name!r}, but this CPU and build have {', '.join(ISAS)}")
    return name or _engine.fastest_isa()


_isa = _chosen_isa()


def isa():
    """The instruction set in use: the fastest there is, FLASHCPU_ISA, or that of `use_isa`."""
    return _isa


@contextlib.contextmanager
def use_isa(name):
    """Use another instruction set inside a with block, in every thread of the process.

    For tests and benchmarks: blocks of several threads must not overlap.
    """
    global _isa
    if name not in ISAS:
        raise ValueError(f"no instruction set {name!r}, this CPU and build have {', '.join(ISAS)}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


def kernels(rows, stored, isa_name):
    """The arithmetic for queries and keys in these dtypes, and what the plan must know of it."""
    return _kernels(arithmetic(rows, stored, isa_name), stored, isa_name)


@cache
def arithmetic(rows, stored, isa_name):
    """f32 or f64; or bf16, products in pairs, where all numbers are bf16 and the CPU has it."""
    if rows == stored == "bf16":
        with contextlib.suppress(ValueError):
            return _engine.Kernels("bf16", isa_name).dtype
    return "f64" if rows == "f64" else "f32"


@cache
def _kernels(name, stored, isa_name):
    table, store = _engine.Kernels(name, isa_name), storage(stored, name, isa_name)
    return table, Lanes(
        width=table.lanes,
        vectors=_engine.STRIP_VECTORS,
        block=_engine.BLOCK,
        span=_engine.SPAN,
        few_shares=store.few_shares,
        line=store.line,
        ring_k=store.ring_k,
        ring_v=store.ring_v,
        arithmetic=name,
        step=table.step,
    )


@cache
def storage(dtype, arithmetic, isa_name):
    """How one dtype is read and written for one arithmetic by one instruction set."""
    return _engine.Storage(dtype, arithmetic, isa_name)


def cpu_name():
    """The CPU's name as the operating system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def caches():
    """Bytes of the data caches of the first core, such as {"L1": 32768, "L2": 1048576}."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                level = "L" + (index / "level").read_text().strip()
                text = (index / "size").read_text().strip()
                sizes[level] = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(
                    text[-1], 0
                )
    return sizes


def show_config() -> dict:
    """Print what this machine gives flashcpu, and return the same facts as a dict.

    Returns
    -------
    dict
        version, numpy, cpu, isa (in use), isas (all there are), caches (bytes), cores (usable by
        this process), threads (of a call now), compiler.

    Examples
    --------
    >>> import flashcpu
    >>> facts = flashcpu.show_config()  # doctest: +ELLIPSIS
    flashcpu ...
    >>> facts["isa"] in facts["isas"]
    True
    """
    from flashcpu import __version__  # not at import: the package imports this module

    facts = {
        "version": __version__,
        "numpy": np.__version__,
        "cpu": cpu_name(),
        "isa": isa(),
        "isas": ISAS,
        "caches": caches(),
        "cores": usable_cores(),
        "threads": limit(None),
        "compiler": _engine.COMPILER,
    }
    sizes = ", ".join(f"{level} {size_text(size)}" for level, size in facts["caches"].items())
    print(f"flashcpu {facts['version']}, NumPy {facts['numpy']}")
    print(f"  CPU        {facts['cpu']}")
    print(f"  kernels    {facts['isa']} (of {', '.join(ISAS)}; FLASHCPU_ISA chooses)")
    print(f"  caches     {sizes or 'unknown'}")
    print(f"  threads    {facts['threads']} (of {facts['cores']} usable cores)")
    print(f"  compiler   {facts['compiler']}")
    return facts


def size_text(size):
    """Bytes for people: 786432 -> '768 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024


def fma_rate(dtype="f32", isa_name=None, seconds=0.1):
    """Measured flops a second of one thread that does nothing but FMAs (2 flops each).

    Of the arithmetic for numbers of that dtype: f16 is computed in f32; so is bf16, or in products
    of pairs (4 flops each).
    """
    return kernels(dtype, dtype, isa_name or isa())[0].fma_rate(seconds)


def read_bandwidth(threads=1):
    """Measured bytes a second of reading 256 MiB from memory.

    The best of three: whatever disturbs it can only make it slower. The buffer is flushed from the
    caches before each, for they may be larger.
    """
    buffer = np.ones(READ, np.uint8)
    table, _ = kernels("f32", "f32", isa())
    shortest = math.inf
    for _ in range(3):
        table.flush(buffer)
        start = time.perf_counter()
        table.read_bytes(buffer, threads)
        shortest = min(shortest, time.perf_counter() - start)
    return buffer.size / shortest
