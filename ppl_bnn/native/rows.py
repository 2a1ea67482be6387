"""Rows of a memory-mapped file, read without mapping them: they then stay out of this process's memory.

A page that is read through a mapping belongs to the process until it is given back, and comes with its neighbours: a
random row of 400 bytes may bring in 2 MB. Reading rows by themselves takes a system call each, for which Python is too
slow. Without native code rows are read through the mapping.
"""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from ppl_bnn.native.library import library

_SOURCE = Path(__file__).with_name("rows.c")
# Rows that are compared with the mapping before a file is read.
_COMPARED = 16


class MappedRows:
    """The rows of an ``np.memmap`` [N, ...].

    Args:
        array: opened with mode ``r`` or ``r+``; or a part of such a one.
    """

    def __init__(self, array: np.memmap) -> None:
        self.array = np.asarray(array)
        self._file: int | None = None
        if array.mode not in ("r", "r+") or array.filename is None or not array[:1].flags.c_contiguous:
            return
        if library(_SOURCE, _agrees) is None:
            return
        whole = np.frombuffer(array._mmap, np.uint8)  # type: ignore[attr-defined]
        first = self.array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        # A mapping begins at a multiple of the granularity.
        self._start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY + first
        try:
            self._file = os.open(array.filename, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return
        weakref.finalize(self, os.close, self._file)
        rows = np.linspace(0, len(array) - 1, min(_COMPARED, len(array))).astype(np.int64)
        if self.take(rows).tobytes() != self.array[rows].tobytes():
            # There is another file of that name now.
            self._file = None

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows [B, ...] with the numbers `rows` (int64 [B]), copied.

        Raises:
            OSError: the file cannot be read there.
        """
        found = library(_SOURCE, _agrees) if self._file is not None else None
        if found is None:
            return self.array[rows]  # type: ignore[no-any-return]
        assert self._file is not None
        out = np.empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        size = out.itemsize * int(np.prod(out.shape[1:], dtype=np.int64))
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.array):
            raise IndexError(f"rows from {rows.min()} to {rows.max()} of an array of {len(self.array)}")
        done = _read(found, self._file, self._start, self.array.strides[0], size, rows, out)
        if done < len(rows):
            raise OSError(f"row {rows[done]} of a memory-mapped file cannot be read: has the file become shorter?")
        return out


def _read(found: ctypes.CDLL, file: int, start: int, stride: int, size: int, rows: np.ndarray, out: np.ndarray) -> int:
    rows = np.ascontiguousarray(rows, np.int64)
    read = found.read_rows
    read.restype = ctypes.c_int64
    return int(
        read(
            ctypes.c_int(file), *(ctypes.c_int64(number) for number in (start, stride, size)),
            ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(len(rows)), ctypes.c_void_p(out.ctypes.data),
        )
    )  # fmt: skip


def _agrees() -> bool:
    """Whether rows of this package's own C file are those that Python reads."""
    content = _SOURCE.read_bytes()
    rows, out = np.array([3, 0, 7, 3]), np.zeros((4, 11), np.uint8)
    found = library(_SOURCE, _agrees)
    assert found is not None
    with _SOURCE.open("rb", buffering=0) as file:
        done = _read(found, file.fileno(), 5, 20, 11, rows, out)
    return done == 4 and out.tobytes() == b"".join(content[5 + 20 * row : 16 + 20 * row] for row in rows.tolist())
