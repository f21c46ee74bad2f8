"""The rules of the rooms: who may import whom, and what the kernels do without.

They are read from the sources; nothing is run but the examples of the docstrings.
"""

import ast
import doctest
import re
import sys
from pathlib import Path

import pytest

import flashcpu.api

PACKAGE = Path(__file__).parents[1] / "flashcpu"
KERNELS = [
    path for path in sorted((PACKAGE / "kernels").rglob("*")) if path.suffix in (".c", ".h", ".inc")
]
INWARD = [path for path in sorted(PACKAGE.rglob("*.py")) if "contrib" not in path.parts]


def imports(path, top_level_only=False):
    """Full names of the modules that a file imports: `from .x import y` gives package.x and
    package.x.y."""
    tree = ast.parse(path.read_text())
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names(path):
    return path.relative_to(PACKAGE).as_posix()


def test_the_sources_are_where_these_tests_look():
    assert {"tile.inc", "vec.h", "exp2.h", "cpu.c", "dispatch.c", "f32_scalar.c"} <= {
        path.name for path in KERNELS
    }
    assert {"api.py", "plan.py", "problem.py", "state.py"} <= {path.name for path in INWARD}
    assert "flashcpu._engine" in set(imports(PACKAGE / "api.py"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=names)
def test_the_reference_needs_only_numpy(path):
    """Its __main__ may show the product beside the ladder, when it runs."""
    lazily = path.name == "__main__.py"
    for name in imports(path, top_level_only=lazily):
        first = name.split(".")[0]
        own = name == "flashcpu.reference" or name.startswith("flashcpu.reference.")
        assert own or first == "numpy" or first in sys.stdlib_module_names, name


@pytest.mark.parametrize("room", ["plan", "problem"])
def test_planning_knows_no_engine(room):
    """Nor anything that imports it."""
    for name in imports(PACKAGE / f"{room}.py"):
        if name.split(".")[0] == "flashcpu":
            assert name.split(".")[1] in ("plan", "problem"), name
        else:
            assert name.split(".")[0] in {"numpy", *sys.stdlib_module_names}, name


@pytest.mark.parametrize("path", INWARD, ids=names)
def test_nothing_inward_imports_contrib(path):
    assert not any("contrib" in name.split(".") for name in imports(path))


@pytest.mark.parametrize("path", INWARD, ids=names)
def test_numpy_is_the_only_dependency(path):
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] in {"flashcpu", "numpy", *sys.stdlib_module_names}, name


def without_comments(text):
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", KERNELS, ids=names)
def test_kernels_know_neither_python_nor_threads_nor_the_heap(path):
    text = without_comments(path.read_text())
    included = re.findall(r'#\s*include\s*[<"]([^">]+)[">]', text)
    assert not {"Python.h", "omp.h", "pthread.h", "stdlib.h", "stdio.h"} & set(included)
    assert not re.search(r"\b(m|c|re)alloc\b|\bfree\s*\(|\bposix_memalign\b|\bPy[A-Z]\w+", text)
    assert not re.search(r"#\s*pragma\s+omp|\b__thread\b|\b_Thread_local\b|\bthread_local\b", text)


@pytest.mark.parametrize("path", KERNELS, ids=names)
def test_kernels_have_no_mutable_globals(path):
    for statement in file_scope(without_comments(path.read_text())):
        is_type = re.match(r"(typedef|struct|union|enum)\b[^=]*$", statement)
        # A declarator in parentheses right after a name is a function, not a variable.
        is_function = re.search(r"\w\s*\(", statement.split("=")[0])
        assert is_type or is_function or re.search(r"\bconst\b", statement), statement


@pytest.mark.parametrize("path", KERNELS, ids=names)
def test_what_is_static_inside_a_function_is_constant(path):
    text = without_comments(path.read_text())
    for declaration in re.findall(r"^[ \t]+static\b[^;{=]*", text, flags=re.MULTILINE):
        assert re.search(r"\bconst\b", declaration), declaration


def file_scope(text):
    """Declarations and the heads of definitions outside all braces, without the preprocessor."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"^\s*#[^\n]*", "", text, flags=re.MULTILINE)
    depth, statement = 0, ""
    for character in text:
        if character == "}":
            depth -= 1
        elif depth == 0 and character in ";{":
            if statement.strip():
                yield " ".join(statement.split())
            statement = ""
        elif depth == 0:
            statement += character
        depth += character == "{"


def test_the_search_for_mutable_globals_finds_them():
    source = (
        "static const int a = 1; int f(int x) { return x; }\nstatic float cache[4] = {0}; int n;"
    )
    found = [s for s in file_scope(source) if "const" not in s and "(" not in s]
    assert "static float cache[4] =" in found
    assert "int n" in found


def test_intrinsics_are_in_the_vector_vocabulary_only():
    intrinsics = re.compile(
        r"\b_mm\d*_\w+|\bv\w+q_[fsu]\d+\b|immintrin\.h|arm_neon\.h|__builtin_ia32|__asm__"
    )
    for path in [*KERNELS, PACKAGE / "_engine.pyx"]:
        if path.name != "vec.h":
            assert not intrinsics.search(without_comments(path.read_text())), path


def test_the_examples_of_the_docstrings_are_true():
    result = doctest.testmod(flashcpu.api)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_budget_in_the_readme_is_that_of_the_files():
    """Lines of code, to a tenth."""
    section = (PACKAGE.parent / "README.md").read_text().split("## The complexity budget")[1]
    budgets = re.findall(r"^\| (`.*) \| (\d+) \|$", section, re.MULTILINE)
    assert len(budgets) == 4
    for names, lines in budgets:
        paths = [PACKAGE / name for name in re.findall("`(.+?)`", names)]
        files = [f for path in paths for f in (path.rglob("*.*") if path.is_dir() else [path])]
        actual = sum(len(f.read_text().splitlines()) for f in files if f.suffix != ".o")
        assert abs(actual - int(lines)) <= 0.1 * int(lines), (names, actual)
