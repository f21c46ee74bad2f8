"""Builds the two extensions; everything else is in pyproject.toml."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from hashlib import sha256

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group


class BuildExt(build_ext):
    """Compiles what has changed, the stubs at the same time, and leaves a copy beside its source.

    Every new environment has Cython write the engine again; the stubs, which take most of the time,
    stay. The copy is there so that `python -m flashcpu` works in the root of a checkout too, where
    Python finds the folder flashcpu/ before the installed package.
    """

    def build_extensions(self):
        compile_one_by_one = self.compiler.compile

        def compile_one(source, output_dir, **options):
            (path,) = self.compiler.object_filenames([source], output_dir=output_dir)
            included = OWN if source.startswith("flashcpu/kernels/") else [*OWN, *HEADERS]
            if self.force or newer_group([source, *included], path):
                start = time.time()
                compile_one_by_one([source], output_dir=output_dir, **options)
                # As old as what was read: an edit meanwhile is newer.
                os.utime(path, (start, start))
            return path

        def compile_all(sources, output_dir, **options):
            # What another compiler or other flags have made lies elsewhere.
            command = [*self.compiler.compiler_so, *options["extra_postargs"]]
            version = subprocess.run([*command, "--version"], capture_output=True).stdout
            made_by = sha256(" ".join(command).encode() + version).hexdigest()[:8]
            place = os.path.join(output_dir, made_by)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(lambda x: compile_one(x, place, **options), sources))

        self.compiler.compile = compile_all
        super().build_extensions()

    def run(self):
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


# All that every object is made of, and nothing of the environment: Cython looks after that.
OWN = [
    "setup.py",
    *glob("flashcpu/kernels/*.inc"),
    *glob("flashcpu/kernels/*.h"),
    *glob("flashcpu/kernels/isa/*.h"),
]
# And those that are no kernels.
HEADERS = glob("flashcpu/*.h")
# Python asks for -g itself, which takes a third of the time; CFLAGS=-g, or -ggdb, keeps it.
DEBUG = [] if " -g" in " " + os.environ.get("CFLAGS", "") else ["-g0"]

engine = Extension(
    "flashcpu._engine",
    # Each stub in isa/ has its instruction set from a pragma (isa/*.h), so the flags are common.
    sources=[
        "flashcpu/_engine.pyx",
        "flashcpu/kernels/cpu.c",
        "flashcpu/kernels/dispatch.c",
        *sorted(glob("flashcpu/kernels/isa/*.c")),
    ],
    depends=[*OWN, *HEADERS],
    include_dirs=[np.get_include(), "flashcpu"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    # Masks are -inf and results are promised bit for bit: never -ffast-math, no contraction.
    extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fopenmp", *DEBUG],
    extra_link_args=["-fopenmp"],
    libraries=["m"],
)

question = Extension(
    "flashcpu._question",
    sources=["flashcpu/_question.pyx"],
    include_dirs=engine.include_dirs,
    define_macros=engine.define_macros,
    extra_compile_args=DEBUG,
)

setup(ext_modules=cythonize([engine, question]), cmdclass={"build_ext": BuildExt})
