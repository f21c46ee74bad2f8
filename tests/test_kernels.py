"""The kernels without Python: kernels/kernels_test.c built and run, here and for aarch64."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "kernels"
CC = shlex.split(os.environ.get("CC", "gcc"))
# Where a build has left the objects of flashcpu/kernels; else they are compiled, once more.
OBJECTS = os.environ.get("FLASHCPU_TEST_OBJECTS", "")
SKIPPED = 77  # the exit status of aarch64.sh where its tools are missing

pytestmark = pytest.mark.skipif(
    not CC or shutil.which(CC[0]) is None, reason="no C compiler (CC, or gcc)"
)


@pytest.fixture(scope="module")
def kernels_test(tmp_path_factory):
    """The test program."""
    program = tmp_path_factory.mktemp("kernels") / "kernels_test"
    subprocess.run([HERE / "build.sh", shlex.join(CC), program, OBJECTS], check=True)
    return program


@pytest.fixture(scope="module")
def report(kernels_test):
    """What the program says of all instruction sets of this machine."""
    return subprocess.run([kernels_test, "--bits"], capture_output=True, text=True)


def test_kernels_on_every_instruction_set(report):
    assert report.returncode == 0, report.stderr
    passed, failed = report.stdout.splitlines()[-1].split(", ")
    assert failed == "0 failed"
    assert int(passed.removesuffix(" passed")) > 0


def test_bits_agree_between_instruction_sets_with_fma(report):
    bits = {}
    for line in report.stdout.splitlines():
        if line.startswith("bits "):
            _, dtype, isa, hashed = line.split()
            bits.setdefault(dtype, {})[isa] = hashed
    bits.pop("bf16_bf16", None)  # the CPU's own dot products, of one class of CPU
    assert sorted(bits) == ["bf16_f32", "f16_f32", "f32_f32", "f64_f64"]
    for dtype, hashes in bits.items():
        assert len({h for isa, h in hashes.items() if isa != "scalar"}) <= 1, (dtype, hashes)


def test_an_absent_instruction_set_is_an_error(kernels_test):
    """What this machine does not have is an error, never a silent pass."""
    asked = subprocess.run([kernels_test, "no-such-isa"], capture_output=True, text=True)
    assert asked.returncode == 2
    assert "no-such-isa" in asked.stderr


def test_aarch64_and_its_bits(kernels_test):
    command = [HERE / "aarch64.sh", "--native", kernels_test]
    crossed = subprocess.run(command, capture_output=True, text=True)
    if crossed.returncode == SKIPPED:
        pytest.skip(crossed.stderr.strip())
    assert crossed.returncode == 0, crossed.stdout + crossed.stderr
    assert ", 0 failed\n" in crossed.stdout
