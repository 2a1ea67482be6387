"""C code beside the package's modules, compiled once into a cache of the user's own; else torch does its work.

Environment variables:
    PPL_BNN_NATIVE: 0 turns native code off.
    PPL_BNN_CACHE: folder of the compiled libraries; default ``$XDG_CACHE_HOME/ppl_bnn``, or ``~/.cache/ppl_bnn``.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ppl_bnn.files import written_atomically

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# In the order of preference. Without OpenMP the code runs on one thread.
_THREADS = (("-fopenmp",), ("-Wno-unknown-pragmas",))
_COMPILE_SECONDS = 60.0
# Lines of /proc/cpuinfo that decide what code -march=native makes; the others change from core to core.
_PROCESSOR = re.compile(r"(vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+)\s*:")

_lock = threading.RLock()
_libraries: dict[Path, ctypes.CDLL | None] = {}
_said: set[str] = set()
# Why nothing more is compiled in this process: a compiler that failed once is not waited for again.
_broken: list[str] = []

log = logging.getLogger(__name__)


class _Unusable(Exception):
    """Why a library cannot be had, in words for the log."""


def library(source: Path, agrees: Callable[[], bool]) -> ctypes.CDLL | None:
    """The compiled library of a C file, or None where it cannot be had; the caller then computes in torch.

    The file is compiled at first use and kept in the cache for later processes. Whatever goes wrong (no compiler, one
    that fails or takes over 60 seconds, a cache that others can write, a library that does not load or that computes
    something else) is said in one warning.

    Args:
        source: the C file. Headers that it includes by name in quotes count as part of it.
        agrees: whether the library computes what its torch reference does; called once, after loading. A call of
            `library` from within it gives the library under test.
    """
    with _lock:
        if source not in _libraries:
            _libraries[source] = None
            try:
                _libraries[source] = _loaded(source)
                if _libraries[source] is not None and not agrees():
                    raise _Unusable(f"the compiled {source.name} does not agree with torch")
            except (_Unusable, OSError, RuntimeError, AttributeError, ctypes.ArgumentError) as problem:
                _libraries[source] = None
                _say(logging.WARNING, f"no native code: {problem}; torch computes in its place, more slowly")
            except BaseException:
                # Interrupted, say: the next call tries again.
                del _libraries[source]
                raise
        return _libraries[source]


def _loaded(source: Path) -> ctypes.CDLL | None:
    if os.environ.get("PPL_BNN_NATIVE") == "0":
        _say(logging.INFO, "native code is off: PPL_BNN_NATIVE is 0")
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _Unusable("there is no C compiler (cc, gcc or clang)")
    name = f"{source.stem}-{_key(source, compiler)}.so"
    folder = _cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_what_others_write(folder)
        return _from(folder / name, source, compiler)
    except OSError as problem:
        unusable = f"the cache {folder} cannot be used ({_reason(problem)})"
    try:
        with tempfile.TemporaryDirectory() as private:
            # The system keeps a loaded library when its file is gone.
            found = _from(Path(private) / name, source, compiler)
    except OSError as problem:
        raise _Unusable(f"{unusable}, and a temporary folder cannot either ({_reason(problem)})") from None
    _say(logging.WARNING, f"{unusable}; native code is compiled for this process alone, which takes seconds")
    return found


def _from(path: Path, source: Path, compiler: str) -> ctypes.CDLL:
    if _is_whole(path):
        # It may need a system library that is gone: then it is made anew.
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    with written_atomically(path) as temporary:
        _compile(source, compiler, temporary)
        with temporary.open("ab") as file:
            file.write(hashlib.sha256(temporary.read_bytes()).digest())
    # torch has loaded its OpenMP before, which this one then shares the threads of.
    return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the checksum of what is before it. Loading half a library would end the process."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _compile(source: Path, compiler: str, path: Path) -> None:
    if _broken:
        raise _Unusable(_broken[0])
    for threads in _THREADS:
        command = [compiler, *_FLAGS, *threads, str(source), "-lm", "-o", str(path)]
        try:
            errors = _run(command)
        except OSError as problem:
            errors = str(problem)
        except subprocess.TimeoutExpired:
            _broken.append(f"{compiler} took over {_COMPILE_SECONDS:g} seconds; PPL_BNN_NATIVE=0 leaves it out")
            raise _Unusable(_broken[0]) from None
        if errors is None:
            return
    lines = (errors or "").strip().splitlines() or ["no message"]
    _broken.append(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    raise _Unusable(_broken[0])


def _run(command: list[str]) -> str | None:
    """None, or what a command that failed wrote to standard error."""
    # In a session of its own, so that what it starts ends with it.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            errors = process.communicate(timeout=_COMPILE_SECONDS)[1]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return errors if process.returncode else None


def _cache_folder() -> Path:
    if own := os.environ.get("PPL_BNN_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "ppl_bnn"


def _refuse_what_others_write(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Unusable(
            f"others can write in the cache {folder} (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}); "
            "chmod 700 it, or name another by PPL_BNN_CACHE"
        )


def _key(source: Path, compiler: str) -> str:
    """Hash of all that decides what the compiled code is."""
    found = hashlib.sha256()
    # The compiler by its file, since asking it for its version takes a process.
    file = Path(compiler).resolve()
    made = file.stat()
    for part in (_FLAGS, _THREADS, compiler, file, made.st_size, made.st_mtime_ns, sys.platform, _processor()):
        found.update(f"{part}\n".encode())
    for path in _with_headers(source):
        found.update(path.read_bytes())
    return found.hexdigest()[:32]


def _with_headers(source: Path) -> list[Path]:
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if (header := path.parent / name) not in found:
                found.append(header)
    return found


def _processor() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    lines = [line for line in first.splitlines() if _PROCESSOR.match(line)]
    return "\n".join([platform.machine(), *(lines or [platform.processor()])])


def _reason(problem: OSError) -> str:
    # The system's loader puts the file's path in front.
    return problem.strerror or str(problem).partition(": ")[2] or str(problem)


def _say(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.log(level, message)
