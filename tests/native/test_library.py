"""Native code can only help: whatever goes wrong with it is one line in the log, and torch gives the right numbers."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ppl_bnn.native import arithmetic
from ppl_bnn.native import library as native
from ppl_bnn.native.arithmetic import OPERATIONS
from ppl_bnn.native.library import library

# A process that uses native code, and says whether it had any.
PROCESS = """
import logging, torch
logging.basicConfig()
from ppl_bnn.native import arithmetic, library
scale, u, loc = torch.empty(5000), torch.linspace(-3, 3, 5000), torch.linspace(-1, 1, 5000)
sums = arithmetic.OPERATIONS["scale"](scale, u, loc)
torch.testing.assert_close(sums, arithmetic.OPERATIONS["scale"].reference(torch.empty(5000), u, loc))
print([found is not None for found in library._libraries.values()])
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """As in a fresh process with an empty cache."""
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_said", set())
    monkeypatch.setattr(native, "_broken", [])
    monkeypatch.delenv("PPL_BNN_NATIVE", raising=False)
    monkeypatch.setenv("PPL_BNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def afresh():
    """The same files seen by the next process."""
    for known in (native._libraries, native._said, native._broken):
        known.clear()


def compiler(folder: Path, monkeypatch, script: str) -> None:
    """Let `cc` be a script."""
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def numbers_are_right() -> bool:
    u, loc, noise = torch.linspace(-3, 3, 5000), torch.linspace(-1, 1, 5000), torch.linspace(2, -2, 5000)
    (draw, expected) = torch.empty(5000), torch.empty(5000)
    found = OPERATIONS["draw"](draw, loc, u, noise)
    sums = OPERATIONS["draw"].reference(expected, loc, u, noise)
    torch.testing.assert_close(draw, expected)
    torch.testing.assert_close(found, sums)
    return True


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def answer(tmp_path):
    """A C file whose function gives 7."""
    (tmp_path / "answer.h").write_text("#define ANSWER 7\n")
    (tmp_path / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    return tmp_path / "answer.c"


def agreed():
    return True


def test_code_is_compiled_once_for_all_processes(answer, cache, caplog, monkeypatch):
    assert library(answer, agreed).answer() == 7
    (compiled,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    made = compiled.stat().st_mtime_ns
    afresh()
    monkeypatch.setattr(native, "_run", pytest.fail)
    assert library(answer, agreed).answer() == 7
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [made]
    assert not caplog.records


@pytest.mark.parametrize("what", ["source", "header", "flags", "processor", "compiler"])
def test_what_decides_the_code_decides_the_file(what, answer, cache, monkeypatch, tmp_path):
    library(answer, agreed)
    afresh()
    if what == "source":
        answer.write_text(answer.read_text().replace("ANSWER;", "ANSWER + 0;"))
    elif what == "header":
        answer.with_suffix(".h").write_text("#define ANSWER 8\n")
    elif what == "flags":
        monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    elif what == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "another")
    else:
        compiler(tmp_path / "bin", monkeypatch, 'exec /usr/bin/env -u CC gcc "$@"')
    assert library(answer, agreed).answer() == (8 if what == "header" else 7)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_file_in_the_cache_is_made_anew(damage, answer, cache, caplog):
    library(answer, agreed)
    (compiled,) = cache.iterdir()
    whole = compiled.read_bytes()
    # In place of the file, not into it: a loaded library's memory is the file.
    compiled.unlink()
    compiled.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    afresh()
    assert library(answer, agreed).answer() == 7
    assert compiled.read_bytes() == whole
    assert not caplog.records


def test_a_file_that_is_whole_but_does_not_load_is_made_anew(answer, cache, caplog):
    library(answer, agreed)
    (compiled,) = cache.iterdir()
    compiled.unlink()
    content = b"\x7fELF but of another machine"
    compiled.write_bytes(content + native.hashlib.sha256(content).digest())
    afresh()
    assert library(answer, agreed).answer() == 7
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_a_compilation_a_process(answer, cache, caplog):
    cache.write_text("a file where the folder should be")
    assert library(answer, agreed).answer() == 7
    (line,) = warnings(caplog)
    assert line.startswith(f"the cache {cache} cannot be used (")
    assert numbers_are_right()
    assert len(warnings(caplog)) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_of_read_only_files_is_not_written(answer, cache, caplog):
    cache.mkdir(mode=0o500)
    assert library(answer, agreed).answer() == 7
    assert not list(cache.iterdir())
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_file_system_without_execution(everywhere, answer, cache, caplog, monkeypatch):
    load = ctypes.CDLL

    def refused(path):
        if everywhere or str(cache) in path:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr("ctypes.CDLL", refused)
    found = library(answer, agreed)
    assert (found is None) == everywhere
    assert numbers_are_right()
    (line,) = warnings(caplog)
    assert f"the cache {cache} cannot be used (failed to map segment from shared object)" in line
    assert ("a temporary folder cannot either" in line) == everywhere


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_can_write_is_refused(mode, answer, cache, caplog):
    cache.mkdir()
    cache.chmod(mode)
    assert library(answer, agreed) is None
    assert numbers_are_right()
    (line,) = warnings(caplog)
    assert f"others can write in the cache {cache}" in line
    assert f"mode {mode:o}" in line
    assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_ended_and_not_asked_again(answer, cache, caplog, monkeypatch, tmp_path):
    compiler(tmp_path / "bin", monkeypatch, f"sleep 300 & echo $! >> {tmp_path}/started; wait")
    monkeypatch.setattr(native, "_COMPILE_SECONDS", 1.0)
    began = time.monotonic()
    assert library(answer, agreed) is None
    assert numbers_are_right()
    assert time.monotonic() - began < 20
    (line,) = warnings(caplog)
    assert "cc took over 1 seconds; PPL_BNN_NATIVE=0 leaves it out" in line
    (child,) = (tmp_path / "started").read_text().split()
    # Ended, though its parent may not have noticed yet.
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    assert not list(cache.iterdir())


def test_a_compiler_that_fails_is_asked_once(answer, cache, caplog, monkeypatch, tmp_path):
    compiler(tmp_path / "bin", monkeypatch, f"echo >> {tmp_path}/calls; echo 'fatal error: no headers' >&2; exit 1")
    assert library(answer, agreed) is None
    assert numbers_are_right()
    (line,) = warnings(caplog)
    assert line.endswith("cc failed: fatal error: no headers; torch computes in its place, more slowly")
    # With threads and without.
    assert len((tmp_path / "calls").read_text()) == 2
    assert not list(cache.iterdir())


def test_without_a_compiler(answer, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library(answer, agreed) is None
    assert numbers_are_right()
    (line,) = warnings(caplog)
    assert "there is no C compiler (cc, gcc or clang)" in line


def test_code_that_does_not_agree_with_torch_is_not_used(answer, caplog, monkeypatch):
    assert library(answer, lambda: library(answer, agreed).answer() == 8) is None
    (line,) = warnings(caplog)
    assert "the compiled answer.c does not agree with torch" in line
    assert library(answer, agreed) is None
    monkeypatch.setattr(arithmetic, "difference", lambda operation, count: 1.0)
    assert numbers_are_right()
    assert native._libraries[arithmetic._SOURCE] is None
    assert len(warnings(caplog)) == 2


def test_a_library_without_its_functions_is_not_used(answer, caplog):
    assert library(answer, lambda: library(answer, agreed).question() == 7) is None
    assert len(warnings(caplog)) == 1


def test_native_code_can_be_switched_off(answer, cache, caplog, monkeypatch):
    monkeypatch.setenv("PPL_BNN_NATIVE", "0")
    caplog.set_level("INFO")
    assert library(answer, agreed) is None
    assert numbers_are_right()
    assert [record.getMessage() for record in caplog.records] == ["native code is off: PPL_BNN_NATIVE is 0"]
    assert not cache.exists()


@pytest.mark.parametrize("base", ["xdg", "relative", None])
def test_the_cache_is_the_users_own(base, monkeypatch, tmp_path):
    monkeypatch.delenv("PPL_BNN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if base:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if base == "xdg" else base)
    # The standard says that a relative path is to be ignored.
    assert native._cache_folder() == tmp_path / ("xdg" if base == "xdg" else ".cache") / "ppl_bnn"


@pytest.mark.slow
def test_processes_that_start_at_once_share_the_cache_and_a_later_one_runs_no_compiler(cache, monkeypatch, tmp_path):
    compiler(tmp_path / "bin", monkeypatch, f'echo >> {tmp_path}/calls; exec gcc "$@"')

    def started():
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    found = [process.communicate(timeout=300) for process in [started() for _ in range(2)]]
    assert found == [("[True]\n", "")] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    before = (tmp_path / "calls").read_text()
    assert before
    assert started().communicate(timeout=300) == ("[True]\n", "")
    assert (tmp_path / "calls").read_text() == before
