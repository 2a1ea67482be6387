"""What is learnt: class labels, numbers or counts, read from a column or an array."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_bnn.data.settings import TargetKind
from ppl_bnn.errors import UserError, some

# Whole numbers of which there are more than these are numbers, unless a likelihood says that they are classes.
_MOST_CLASSES = 20
# Above this share of the rows, and this number, different whole numbers are hardly classes.
_MOST_OF_ROWS = 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Targets of all rows.

    Attributes:
        y: [N]: int64 labels or counts, or float32 numbers.
        classes: the name of each label; empty for numbers and counts.
        name: of the target, with its unit.
        scale: mean and standard deviation by which numbers were standardized.
    """

    y: Tensor
    classes: tuple[str, ...]
    name: str
    scale: tuple[float, float] | None = None


def read_targets(
    values: NDArray[Any],
    train: NDArray[Any],
    *,
    name: str,
    kind: TargetKind | None,
    standardize: bool | None,
    where: Callable[[int], str] = lambda at: f"row {at + 1}",
) -> Targets:
    """Read targets.

    Args:
        values: numbers, texts or booleans, [N], without missing values.
        train: the rows that statistics are taken of: their numbers, from 0, or a mask [N].
        name: of the target in messages and figures.
        kind: what the likelihood takes; None to see it from the values: texts, booleans and up to 20 different whole
            numbers, each twice on average, are classes.
        standardize: give numbers mean 0 and standard deviation 1 in the rows `train`; None for yes.
        where: what a message calls the row of a number from 0.

    Raises:
        UserError: values that are not of `kind`, or a single class or number.
    """
    values = _plain(values, name)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"data.target {name} must be finite numbers; {where(_first(~np.isfinite(values)))} is not")
    kind = kind or kind_of(values)
    if kind != "numbers" and standardize:
        raise UserError(f"data.standardize_target is for numbers, and data.target {name} are {kind}: leave it out")
    if kind == "classes":
        return _classes(values, name)
    if kind == "counts":
        return Targets(torch.from_numpy(_counts(values, name, where)), (), name)
    return _numbers(values, train, name, standardize is not False)


def kind_of(values: NDArray[Any]) -> TargetKind:
    """What values look like: texts, booleans and a few different whole numbers are classes; others are numbers."""
    if values.dtype.kind == "f":
        return "numbers"
    if values.dtype.kind in "iu" and len(np.unique(values)) > min(_MOST_CLASSES, len(values) / 2):
        return "numbers"
    return "classes"


def check_classes(
    read: Targets, train: NDArray[np.int64], test: NDArray[np.int64], where: Callable[[int], str]
) -> None:
    """Refuse a class that test data of their own have and the training rows have not.

    Args:
        train, test: numbers of rows.
        where: what a message calls the row of a number.
    """
    if not read.classes:
        return
    lone = test[~np.isin(read.y[test], read.y[train])]
    if len(lone):
        at = int(lone[0])
        raise UserError(
            f"data.target {read.name} is {read.classes[int(read.y[at])]!r:.60} in {where(at)}, a class without a "
            "training row: leave that row out, or give training rows of it"
        )


def _plain(values: NDArray[Any], name: str) -> NDArray[Any]:
    """The values as an array of booleans, whole numbers, floats or texts; whole floats are whole numbers."""
    if values.dtype.kind == "O":
        kinds = {type(value) for value in values}
        if kinds <= {bool, np.bool_}:
            values = values.astype(bool)
        elif kinds <= {str}:
            values = values.astype(str)
        else:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UserError(f"data.target {name} must be numbers, texts or booleans, got {names}")
    if values.dtype.kind == "M":
        raise UserError(f"data.target {name} has dates: give numbers, such as days since the first")
    if values.dtype.kind not in "biufU":
        raise UserError(f"data.target {name} must be numbers, texts or booleans, got {values.dtype}")
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.rint(values)).all():
        # A column of whole numbers with a missing value was read as floats.
        return values.astype(np.int64) if np.abs(values).max(initial=0) < 2**53 else values
    return values


def _classes(values: NDArray[Any], name: str) -> Targets:
    if values.dtype.kind == "f":
        part = values[values != np.rint(values)]
        raise UserError(
            f"data.target {name} has numbers such as {(part if len(part) else values)[0]:g}, which are no class "
            "labels: use --model.likelihood normal"
        )
    found, labels = np.unique(values, return_inverse=True)
    if len(found) == 1:
        raise UserError(f"data.target {name} has one class alone, {found[0]!s:.40}: there is nothing to learn")
    if len(found) > max(_MOST_CLASSES, _MOST_OF_ROWS * len(values)):
        what, advice = (
            ("texts", "name another column") if values.dtype.kind == "U"
            else ("whole numbers", "use --model.likelihood normal, or poisson for counts")
        )  # fmt: skip
        raise UserError(
            f"data.target {name} has {len(found)} different {what} in {len(values)} rows, which are hardly classes: "
            f"{advice}"
        )
    return Targets(torch.from_numpy(labels.reshape(-1).astype(np.int64)), tuple(map(str, found.tolist())), name)


def _counts(values: NDArray[Any], name: str, where: Callable[[int], str]) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        what = "texts" if values.dtype.kind == "U" else "booleans" if values.dtype.kind == "b" else "numbers"
        raise UserError(
            f"data.target {name} must be counts (0, 1, 2, ...) here, got {what} such as {values[0]!s:.40}"
            f": use --model.likelihood {'normal' if what == 'numbers' else 'categorical'}"
        )
    if (values < 0).any():
        raise UserError(
            f"data.target {name} must be counts of at least 0, got {values.min()} in {where(_first(values < 0))}: use "
            "--model.likelihood normal"
        )
    return values.astype(np.int64)


def _numbers(values: NDArray[Any], train: NDArray[Any], name: str, standardize: bool) -> Targets:
    if values.dtype.kind in "Ub":
        what = "text" if values.dtype.kind == "U" else "booleans"
        raise UserError(
            f"data.target {name} is {what} ({some(map(str, np.unique(values)))}), and the likelihood takes numbers: "
            "use --model.likelihood categorical"
        )
    y = values.astype(np.float64)
    loc, scale = float(y[train].mean()), float(y[train].std())
    if scale <= 1e-12 * max(1.0, abs(loc)) or not math.isfinite(scale):
        raise UserError(f"data.target {name} is {loc:g} in all training rows: there is nothing to learn")
    if not standardize:
        return Targets(torch.from_numpy(y.astype(np.float32)), (), name)
    log.info("data: %s standardized: mean %.6g, standard deviation %.6g of the training rows", name, loc, scale)
    scaled = ((y - loc) / scale).astype(np.float32)
    return Targets(torch.from_numpy(scaled), (), f"{name} (training standard deviations)", (loc, scale))


def _first(which: NDArray[np.bool_]) -> int:
    return int(which.argmax())
