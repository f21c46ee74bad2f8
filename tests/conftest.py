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


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once on every instruction set; `usefixtures("isa")` does so for a whole file."""
    with machine.use_isa(request.param):
        yield request.param


@pytest.fixture
def rng():
    """The same random numbers in every run, and on every instruction set."""
    return np.random.default_rng(20240229)
