"""Texts by which large data are known without reading all of them."""

import os
import re
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppl_bnn.data.examples import Batch, Examples
from ppl_bnn.inputs import parts

_SAMPLES = 16


def of_samples(examples: Examples) -> str:
    """Shapes, dtypes and the CRC-32 of up to 16 examples, evenly spread; said so where they differ when read again."""
    rows = torch.linspace(0, len(examples) - 1, min(len(examples), _SAMPLES), dtype=torch.float64).long()
    found, again = (_tensors(examples.take(rows)) for _ in range(2))
    shapes = " ".join(f"{list(part.shape[1:])} {part.dtype}" for part in found)
    texts = crc32_of(found), crc32_of(again)
    return f"{shapes}, samples {texts[0] if texts[0] == texts[1] else 'vary'}"


def of_files(paths: Iterable[str | Path]) -> str:
    """Sizes in bytes and times of files; empty without files."""
    found = [Path(path).stat() for path in paths]
    if not found:
        return ""
    times = " ".join(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(one.st_mtime)) for one in found)
    return f", files of {' '.join(str(one.st_size) for one in found)} bytes{_TIMES}{times}"


def of_labelled_files(paths: Sequence[str], labels: Tensor) -> str:
    """The CRC-32 of the names, sizes and labels of many files, and that of their times.

    A name is a path without the folders that all files are in.
    """
    root, found = len(os.path.commonpath(paths)), [Path(path).stat() for path in paths]
    lines = "".join(f"{path[root:]}\0{one.st_size}\n" for path, one in zip(paths, found, strict=True))
    known = zlib.crc32(lines.encode(errors="surrogateescape"), int(crc32_of([labels]), 16))
    times = torch.tensor([int(one.st_mtime) for one in found])
    return f", files {known:08x}{_TIMES}{crc32_of([times])}"


def without_times(fingerprint: str) -> str:
    """A fingerprint without the times of files, which a copy on another host need not keep."""
    return re.sub(f"{_TIMES}[^;]*", "", fingerprint)


_TIMES = ", modified "


def crc32_of(parts: Iterable[Tensor]) -> str:
    """The CRC-32 of all values of some tensors, as eight hexadecimal digits."""
    crc32 = 0
    for part in parts:
        values = part.detach().cpu().contiguous().view(torch.uint8).reshape(-1)
        crc32 = zlib.crc32(memoryview(values.numpy()), crc32)  # type: ignore[arg-type]
    return f"{crc32:08x}"


def _tensors(batch: Batch) -> list[Tensor]:
    return [part for part in parts(batch) if isinstance(part, Tensor)]
