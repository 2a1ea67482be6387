"""Rows of a memory-mapped file, read by themselves, are those of the mapping, and stay out of memory."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from ppl_bnn.native import rows
from ppl_bnn.native.library import library
from ppl_bnn.native.rows import MappedRows

WHOLE = np.arange(60 * 7, dtype=np.float32).reshape(60, 7)
ASKED = np.array([3, 0, 59, 3, 17])


@pytest.fixture
def array(tmp_path):
    np.save(tmp_path / "x.npy", WHOLE)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x, lambda x: x[:, 0], lambda x: x[:, 2:5], lambda x: x[::-1], lambda x: x[:, ::-1],
        lambda x: x.view("<i4"), lambda x: x.reshape(60, 7, 1), lambda x: x[10:].reshape(50, 7)[:, 1:],
    ],
)  # fmt: skip
def test_rows_of_an_array_and_of_its_parts_are_those_of_the_mapping(array, part):
    chosen = part(array)
    assert isinstance(chosen, np.memmap)
    asked = ASKED % len(chosen)
    found = MappedRows(chosen).take(asked)
    assert found.dtype == chosen.dtype
    np.testing.assert_array_equal(found, np.asarray(chosen)[asked])


def test_a_file_of_its_own_offset_and_mode_is_read(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"?" * 70_001 + WHOLE.tobytes())
    for mode in ("r", "r+", "c"):
        array = np.memmap(path, np.float32, mode, offset=70_001, shape=WHOLE.shape)
        if mode != "r":
            # What is not in the file yet, or never will be, counts.
            array[17] = -1
        found = MappedRows(array).take(ASKED)
        np.testing.assert_array_equal(found, np.asarray(array)[ASKED])
        assert (found[4, 0] == -1) == (mode != "r")


def test_a_file_that_was_replaced_is_read_through_the_mapping(array, tmp_path):
    other = tmp_path / "other.npy"
    np.save(other, WHOLE + 1)
    other.replace(tmp_path / "x.npy")
    np.testing.assert_array_equal(MappedRows(array).take(ASKED), WHOLE[ASKED])


@pytest.mark.skipif(library(rows._SOURCE, rows._agrees) is None, reason="needs native code")
def test_a_file_that_became_shorter_is_an_error_and_numbers_out_of_range_too(array, tmp_path):
    read = MappedRows(array)
    for bad in (np.array([60]), np.array([-1])):
        with pytest.raises(IndexError, match="of an array of 60"):
            read.take(bad)
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(OSError, match="row 59 of a memory-mapped file cannot be read: has the file become shorter"):
        read.take(ASKED)


def test_without_native_code_rows_are_read_through_the_mapping(array, monkeypatch):
    monkeypatch.setattr(rows, "library", lambda source, agrees: None)
    np.testing.assert_array_equal(MappedRows(array).take(ASKED), WHOLE[ASKED])


@pytest.mark.skipif(library(rows._SOURCE, rows._agrees) is None, reason="needs native code")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_reading_all_rows_adds_nothing_to_the_memory_of_the_process(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (200_000, 100))
    array[:] = 1
    array.flush()
    del array
    read = MappedRows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    before = file_backed()
    order = np.random.default_rng(0).permutation(200_000)
    assert sum(float(read.take(part).sum()) for part in np.array_split(order, 100)) == 200_000 * 100
    assert file_backed() - before < 10 * 2**20


def file_backed():
    """Bytes of files in this process's memory."""
    return 1024 * int(re.search(r"RssFile:\s*(\d+)", Path("/proc/self/status").read_text())[1])
