"""Arrays of the user's own as data: images, a table, or whatever else their shapes say; in memory, or on disk."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_bnn.data.array_rows import Found, found_arrays
from ppl_bnn.data.arrays import ArrayExamples
from ppl_bnn.data.examples import Examples, read_batch
from ppl_bnn.data.images import Images
from ppl_bnn.data.moments import standardized_columns
from ppl_bnn.data.parts import Part
from ppl_bnn.data.settings import Request, title_of
from ppl_bnn.data.splits import Arrays, Files, Split, as_input, as_inputs
from ppl_bnn.data.table_files import tables_of
from ppl_bnn.data.targets import Targets, check_classes, read_targets
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, mapped, rows, shape_of

# Numbers of channels by which [N, H, W, C] is told from [N, C, H, W].
_CHANNELS = (1, 3, 4)

log = logging.getLogger(__name__)


def read_array_data(asked: Request, more: Path | None = None) -> tuple[Split, Split]:
    """Return (train, test) of a file of arrays: `Images` of uint8, a `Table` of [N, D], else `Arrays`.

    Inputs of more than `max_memory` are read batch by batch, as `Files`; those of npz and h5 stay on disk.

    Args:
        more: a file whose rows are returned in place of the test rows. Its targets are not read.

    Raises:
        UserError: files or arrays that cannot be used.
    """
    found = found_arrays(asked, more)
    settings = asked.settings
    known = asked.known(found.train)
    if found.bytes > settings.max_memory * 2**20:
        return _on_disk(found, known, _targets(found, known, asked), asked)
    # A copy, in memory.
    x = {key: _as_numbers(np.concatenate([np.asarray(part) for part in each]), asked) for key, each in found.x.items()}
    first = next(iter(x.values()))
    if len(x) == 1 and first.ndim == 2 and first.dtype.kind == "f":
        return _tables(next(iter(x)), first, found, asked)
    if settings.missing != "refuse":
        raise UserError(f"data.missing {settings.missing} is for tables, numbers [N, D]: leave it out")
    for key, part in x.items():
        _check_finite(key, part, found.where)
    read = _targets(found, known, asked)
    if len(x) == 1 and _are_pixels(first):
        return _images(torch.from_numpy(first), read, found, asked)
    tensors = {key: torch.from_numpy(part) for key, part in x.items()}
    return _arrays(tensors if len(tensors) > 1 else next(iter(tensors.values())), read, found, asked)


def read_more_arrays(asked: Request, file: Path) -> Split:
    """The rows of another file, as the test rows of a data set: standardized by its training rows.

    Its targets are not read.

    Raises:
        UserError: files or arrays that cannot be used.
    """
    found: Any = read_array_data(asked, file)[1]
    return replace(found, title=title_of(file))  # type: ignore[no-any-return]


def _targets(found: Found, known: NDArray[np.int64], asked: Request) -> Targets:
    name = asked.settings.target or "y"
    read = read_targets(
        _vector(found.y, name), known, name=name, kind=asked.targets, standardize=asked.settings.standardize_target,
        where=found.where,
    )  # fmt: skip
    if len(next(iter(found.x.values()))) > 1:
        check_classes(read, found.train, found.test, found.where)
    return read


def _vector(y: NDArray[Any], name: str) -> NDArray[Any]:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise UserError(f"data.target {name} must have one value for each row, [N], got {list(y.shape)}")
    return np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y


def _check_finite(name: str, part: NDArray[Any], where: Callable[[int], str]) -> None:
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        at = int(np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(1))[0])
        raise UserError(f"the array {name!r} has NaN or infinity in {where(at)}: correct it, or leave that row out")


def _tables(name: str, x: NDArray[Any], found: Found, asked: Request) -> tuple[Split, Split]:
    features = [f"{name}{at}" for at in range(x.shape[1])]
    frame = pd.DataFrame(x, columns=features)
    target = asked.settings.target or "y"
    frame[target] = _vector(found.y, target)
    count = len(found.x[name][0])
    more = frame.iloc[count:] if len(found.x[name]) > 1 else None
    divided = len(found.train) < count
    return tables_of(frame.iloc[:count], more, target, features, asked, divided=divided)


def _are_numbers(part: Any, asked: Request) -> bool:
    """Whether an array has numbers to compute with: no pixels, no tokens."""
    return part.dtype.kind == "f" or (not asked.tokens and part.dtype.kind in "iu" and part.dtype != np.uint8)


def _as_numbers(part: NDArray[Any], asked: Request) -> NDArray[Any]:
    return part.astype(np.float64) if part.dtype.kind != "f" and _are_numbers(part, asked) else part


def _are_pixels(part: Any) -> bool:
    return part.dtype == np.uint8 and len(part.shape) in (3, 4)


def _images(pixels: Tensor, read: Targets, found: Found, asked: Request) -> tuple[Split, Split]:
    pixels = channels_first(pixels)
    if not read.classes:
        return _arrays(pixels, read, found, asked)
    return _both(lambda at, split: Images(pixels[at], read.y[at], read.classes, asked.title, split), found)


def channels_first(pixels: Tensor) -> Tensor:
    """Pixels [N, H, W], [N, H, W, C] or [N, C, H, W] as the last of these."""
    if pixels.dim() == 3:
        return pixels.unsqueeze(1)
    if pixels.shape[1] not in _CHANNELS and pixels.shape[-1] in _CHANNELS:
        return pixels.permute(0, 3, 1, 2).contiguous()
    return pixels


def _arrays(x: Inputs, read: Targets, found: Found, asked: Request) -> tuple[Split, Split]:
    return _both(
        lambda at, split: Arrays(rows(x, at), read.y[at], asked.title, split, read.classes, read.name, read.scale),
        found,
    )


def _both(make: Callable[[Tensor, str], Split], found: Found) -> tuple[Split, Split]:
    """What `make` makes of the numbers of rows, int64 [n], and the name of the split: of training and test rows."""
    return make(torch.from_numpy(found.train), "train"), make(torch.from_numpy(found.test), "test")


def _on_disk(found: Found, known: NDArray[np.int64], read: Targets, asked: Request) -> tuple[Split, Split]:
    settings = asked.settings
    if settings.missing != "refuse":
        raise UserError(
            f"data.missing {settings.missing} needs the data in memory: set data.max_memory above "
            f"{found.bytes // 2**20} MiB, or correct the values in the file"
        )
    log.info(
        "data: %.1f MiB of inputs are read batch by batch (data.max_memory is %g)",
        found.bytes / 2**20, settings.max_memory,
    )  # fmt: skip
    first = next(iter(found.x.values()))[0]
    one = len(found.x) == 1
    transform: Callable[[Inputs], Inputs] = as_inputs if asked.tokens else _floats
    if one and _are_pixels(first):
        transform = _pixels
    elif one and len(first.shape) == 2 and _are_numbers(first, asked):
        name, parts = next(iter(found.x.items()))
        transform = standardized_columns(parts, known, name=name, where=found.where)
    starts = np.cumsum([0, *(len(part) for part in next(iter(found.x.values())))])

    def part_of(at: Tensor, split: str) -> Files:
        source = int(np.searchsorted(starts, int(at[0]), side="right")) - 1
        arrays = {name: each[source] for name, each in found.x.items()}
        own = torch.arange(starts[source], starts[source + 1])
        whole: Examples = ArrayExamples(next(iter(arrays.values())) if one else arrays, read.y[own], transform)
        data = whole if torch.equal(at, own) else Part(whole, at - int(starts[source]))
        shape = shape_of(read_batch(data, torch.tensor([0]), "cpu")[0])
        return Files(data, read.y[at], shape, asked.title, split, read.classes, read.name, read.scale)

    return _both(part_of, found)


def _floats(x: Inputs) -> Inputs:
    return mapped(as_inputs(x), lambda part: part.float())


def _pixels(x: Any) -> Tensor:
    return as_input(channels_first(x))
