"""C code beside the package's modules, compiled at first use."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -shared -fPIC"


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled file, or None where there is no C compiler that can do it. Without OpenMP it runs on one thread."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for at, threads in enumerate((["-fopenmp"], ["-Wno-unknown-pragmas"])):
            path = Path(folder) / f"{source.stem}{at}.so"
            command = [compiler, *_FLAGS.split(), *threads, str(source), "-lm", "-o", str(path)]
            if not subprocess.run(command, capture_output=True, check=False).returncode:
                # torch has loaded its OpenMP before, which this one then shares the threads of.
                return ctypes.CDLL(str(path))
    return None
