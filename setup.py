"""Builds the one extension; everything else is in pyproject.toml."""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildExt(build_ext):
    """Compiles the stubs at the same time, and leaves a copy of the extension beside its source.

    The copy is there so that `python -m flashcpu` works in the root of a checkout too, where Python
    finds the folder flashcpu/ before the installed package.
    """

    def build_extensions(self):
        compile_one_by_one = self.compiler.compile

        def compile_all(sources, *args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda x: compile_one_by_one([x], *args, **kwargs), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()

    def run(self):
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


engine = Extension(
    "flashcpu._engine",
    # Each stub in isa/ chooses its instruction set with a pragma, so the flags are common.
    sources=[
        "flashcpu/_engine.pyx",
        "flashcpu/kernels/cpu.c",
        "flashcpu/kernels/dispatch.c",
        *sorted(glob("flashcpu/kernels/isa/*.c")),
    ],
    depends=glob("flashcpu/kernels/*.h") + glob("flashcpu/kernels/*.inc"),
    include_dirs=[np.get_include(), "flashcpu"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    # Masks are -inf and results are promised bit for bit: never -ffast-math, no contraction.
    extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    libraries=["m"],
)

setup(ext_modules=cythonize([engine]), cmdclass={"build_ext": BuildExt})
