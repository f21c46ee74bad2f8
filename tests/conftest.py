"""Fixtures of all tests. What "right" and "the same bits" mean is in checks.py."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flashcpu import machine

# Test files import checks.py and rules.py; pytest's importlib mode has no path of its own for them.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("checks", "rules")

# Every instruction set of this machine; with FLASHCPU_ISA only that one.
ISAS = (machine.isa(),) if os.environ.get("FLASHCPU_ISA", "").strip() else machine.ISAS


# Of these, the ones with kernels of their own for other numbers than bfloat16.
PLAIN_ISAS = tuple(name for name in ISAS if not name.endswith("_bf16")) or ISAS


@pytest.fixture(params=PLAIN_ISAS)
def isa(request):
    """Runs a test once on every instruction set; `usefixtures("isa")` does so for a whole file."""
    with machine.use_isa(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa_of_bf16(request):
    """The same for tests that compute with bfloat16, which some instruction sets multiply in pairs.

    After the fixture `dtype`, if there is one: other dtypes have nothing of their own there.
    """
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else None
    if request.param not in PLAIN_ISAS and dtype is not None and dtype.name != "bfloat16":
        pytest.skip("the kernels of the next instruction set")
    with machine.use_isa(request.param):
        yield request.param


@pytest.fixture
def rng():
    """The same random numbers in every run, and on every instruction set."""
    return np.random.default_rng(20240229)
