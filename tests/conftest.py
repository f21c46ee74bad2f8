"""Fixtures of all tests. What "right" and "the same bits" mean is in checks.py."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flashcpu import api, machine, plan

# Test files import checks.py and rules.py; pytest's importlib mode has no path of its own for them.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("checks", "rules")

# Every instruction set of this machine; with FLASHCPU_ISA only that one.
ANY_ISA = (machine.isa(),) if os.environ.get("FLASHCPU_ISA", "").strip() else machine.ISAS
# avx512_bf16 has the kernels of avx512 for all but bfloat16, and neon_bf16 those of neon: they need
# not be tested twice.
ISAS = tuple(name for name in ANY_ISA if not name.endswith("_bf16")) or ANY_ISA
# (instruction set, dtype): all that have kernels of their own.
COMPUTED = [(isa, name) for isa in ISAS for name in ("float32", "float64", "float16")]
COMPUTED += [(isa, "bfloat16") for isa in ANY_ISA]
HALVES = [(isa, name) for isa, name in COMPUTED if name in ("float16", "bfloat16")]
IN_PAIRS = [pair for pair in HALVES if pair[0].endswith("_bf16") and pair[1] == "bfloat16"]
REALS = [(isa, name) for isa, name in COMPUTED if (isa, name) not in HALVES]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once on every instruction set; `usefixtures("isa")` does so for a whole file."""
    with machine.use_isa(request.param):
        yield request.param


@pytest.fixture
def always_threads(monkeypatch):
    """Threads take part in the smallest calls too, which are not worth waking them for."""
    monkeypatch.setattr(plan, "SMALL", 1)
    monkeypatch.setattr(api, "_known", ())  # what is known of a call tells whether it was worth it


def dtypes(doc, params):
    """A fixture of dtypes, each on every instruction set that computes in it on its own."""

    def dtype(request):
        isa, name = request.param
        if name == "bfloat16":
            dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
        else:
            dtype = np.dtype(name)
        with machine.use_isa(isa):
            yield dtype

    dtype.__doc__ = doc
    return pytest.fixture(params=params, ids="-".join)(dtype)


any_dtype = dtypes("float32, float64, float16 and bfloat16.", COMPUTED)
half = dtypes("float16 and bfloat16.", HALVES)
half_in_float32 = dtypes(
    "Those of 16 bits that are computed with in float32.",
    [pair for pair in HALVES if pair not in IN_PAIRS],
)
bfloat16 = dtypes("bfloat16.", [(isa, name) for isa, name in HALVES if name == "bfloat16"])
bfloat16_in_pairs = dtypes("bfloat16 where its products are taken in pairs.", IN_PAIRS)
arithmetic = dtypes("A dtype for each arithmetic: float32, float64, bfloat16.", REALS + IN_PAIRS)


@pytest.fixture
def rng():
    """The same random numbers in every run, and on every instruction set."""
    return np.random.default_rng(20240229)
