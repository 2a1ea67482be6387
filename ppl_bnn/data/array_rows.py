"""Which arrays of a file are inputs and targets, and which rows are for training and for the test."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_bnn.data.array_files import read_arrays
from ppl_bnn.data.frames import missing_column
from ppl_bnn.data.parts import split_rows
from ppl_bnn.data.settings import DataSettings, Request
from ppl_bnn.errors import UserError, some

_TEST = "_test"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Arrays of training and test rows.

    Attributes:
        x: inputs by name, one array [N, ...] for each source: the data, or training data and test data.
        y: targets of all rows, [N] or [N, 1], source after source.
        train: numbers of the training rows, counted over all sources.
        test: numbers of the test rows.
        where: what a message calls the row of a number.
    """

    x: Mapping[str, list[Any]]
    y: NDArray[Any]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    where: Callable[[int], str]

    @property
    def bytes(self) -> int:
        """Of all inputs."""
        return sum(int(part.dtype.itemsize) * int(np.prod(part.shape)) for each in self.x.values() for part in each)


def found_arrays(asked: Request, more: Path | None) -> Found:
    """The arrays that the settings name, in the file and in the one with the test data.

    Args:
        more: a file whose rows are the test rows, in place of others. Its targets are not read.

    Raises:
        UserError: files or arrays that cannot be used: an array that is missing, no numbers, another shape or length.
    """
    settings = asked.settings
    arrays = read_arrays(asked.file, settings.name, setting="data.file")
    target, names = _names(arrays, settings)
    sources = [{name: arrays[name] for name in (*names, target)}]
    has_test = target + _TEST in arrays or settings.test_file is not None
    if more is not None:
        others = read_arrays(more, settings.name, setting="shift.ood")
        own = {name: _named(others, name, "shift.ood needs") for name in names}
        # Any value of the target's kind.
        sources.append({**own, target: np.repeat(np.asarray(arrays[target][:1]), _length(own[names[0]]), axis=0)})
    elif target + _TEST in arrays:
        if (given := settings.test_file or settings.test_fraction) is not None:
            raise UserError(
                f"data.file has test data, {target + _TEST}, and the settings name others, {given}: use one"
            )
        sources.append({name: _named(arrays, name + _TEST, "data.file needs") for name in (*names, target)})
    elif settings.test_file is not None:
        others = read_arrays(Path(settings.test_file), settings.name, setting="data.test_file")
        sources.append({name: _named(others, name, "data.test_file needs") for name in (*names, target)})
    elif lone := [name + _TEST for name in names if name + _TEST in arrays]:
        log.warning("data: %s has no %s beside it, and is left out", some(lone), target + _TEST)
    for source in sources:
        lengths = {name: _length(part) for name, part in source.items()}
        if len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise UserError(f"arrays need the same number of rows, at least 1; got {lengths}")
    for name in (*names, target):
        _check_array(name, [source[name] for source in sources], numbers=name != target)
    counts = [len(source[target]) for source in sources]
    train, test = np.arange(counts[0]), np.arange(counts[0], sum(counts))
    if not has_test:
        train, own_test = split_rows(counts[0], settings.test_fraction)
        test = test if len(counts) > 1 else own_test

    def where(at: int) -> str:
        return f"row {at + 1}" if at < counts[0] else f"row {at - counts[0] + 1} of the test data"

    for name in names:
        # Joined, pixels of one would be numbers of the other.
        if len(kinds := {source[name].dtype.kind: str(source[name].dtype) for source in sources}) > 1:
            raise UserError(f"the array {name!r} must be of one type, got {' and '.join(kinds.values())}: convert one")
    y = np.concatenate([np.asarray(source[target]) for source in sources])
    return Found({name: [source[name] for source in sources] for name in names}, y, train, test, where)


def _length(part: Any) -> int:
    return len(part) if part.shape else 0


def _names(arrays: Mapping[str, Any], settings: DataSettings) -> tuple[str, list[str]]:
    """The names of the target and of the inputs."""
    target = settings.target or "y"
    if target not in arrays:
        raise missing_column(target, arrays, setting="data.target", what="array")
    for name in settings.features or []:
        if name not in arrays:
            raise missing_column(name, arrays, setting="data.features", what="array")
    tests = {name for name in arrays if name.endswith(_TEST) and name.removesuffix(_TEST) in arrays}
    names = settings.features or [name for name in arrays if name not in tests | {target}]
    if target in names:
        raise UserError(f"data.features has the target {target!r} itself: leave it out")
    if not names:
        raise UserError(f"there is no array to predict {target!r} from: the file has {some(arrays)} alone")
    return target, list(names)


def _named(arrays: Mapping[str, Any], name: str, setting: str) -> Any:
    if name not in arrays:
        raise missing_column(name, arrays, setting=setting, what="array")
    return arrays[name]


def _check_array(name: str, parts: Sequence[Any], *, numbers: bool) -> None:
    """Refuse arrays of one name that are no numbers but must be, or whose rows have different shapes."""
    for part in parts:
        if numbers and part.dtype.kind not in "biuf":
            raise UserError(f"the array {name!r} must have numbers, got {part.dtype}: name the others by data.features")
        if part.shape[1:] != parts[0].shape[1:]:
            shapes = f"{list(parts[0].shape[1:])} in the training data and {list(part.shape[1:])} in the test data"
            raise UserError(f"rows of the array {name!r} have the shape {shapes}: they must be alike")
