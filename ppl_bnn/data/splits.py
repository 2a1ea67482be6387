"""What a run learns from: the training part or the test part of some data, of any kind."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeGuard, TypeVar

import torch
from torch import Tensor

from ppl_bnn.data.examples import Examples, read_batch
from ppl_bnn.data.fingerprints import crc32_of
from ppl_bnn.data.parts import Part
from ppl_bnn.data.tensors import TensorExamples
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, count, mapped, parts, rows, shape_of

S = TypeVar("S", bound="Split")


class Split(Protocol):
    """Labelled examples of one split. `Images`, `Table` and `Arrays` are in memory; `Files` are read batch by batch.

    A class of your own needs what is here; `InMemory` has some of it.
    """

    @property
    def title(self) -> str:
        """Name of the data in figures and metrics."""
        ...

    @property
    def split(self) -> str:
        """``train``, ``test`` or ``validation``."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label; empty where the targets are numbers."""
        ...

    @property
    def shape(self) -> Any:
        """The shape of one input, without N: a tuple of numbers, or a tuple or dict of such (`inputs.shape_of`)."""
        ...

    @property
    def targets(self) -> Tensor:
        """What is learnt, [N]: int64 labels or counts, or float32 numbers. They are always in memory."""
        ...

    @property
    def target(self) -> str:
        """Name of the targets, with their unit."""
        ...

    @property
    def target_scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation by which numeric targets were standardized; None where they were not."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether `inputs` gives all inputs as tensors; else `examples` reads them batch by batch."""
        ...

    def __len__(self) -> int:
        """The number of examples, N."""
        ...

    def inputs(self) -> Inputs:
        """All inputs as the network takes them, [N, ...] each, on the CPU; only of what is in memory."""
        ...

    def rows(self, which: slice | Tensor, split: str | None = None) -> Self:
        """The examples of a slice, or with the numbers int64 [M], as a split of another name if it is given."""
        ...

    def first(self, count: int | None) -> Self:
        """The first `count` examples, or all if it is None."""
        ...

    def fingerprint(self, *, whole: bool) -> str | None:
        """A text that differs where the data differ.

        Data in memory have the CRC-32 of all values, which is None unless `whole`. Others have the fingerprint of
        their `Examples`, which reads a few of them.
        """
        ...

    def examples(self) -> Examples:
        """The data as `fit` and `predict` take them."""
        ...


def is_split(data: object) -> TypeGuard[Split]:
    """Whether data are of a kind of `Split`."""
    names = ("title", "split", "classes", "shape", "targets", "target", "in_memory", "inputs", "rows", "examples")
    return all(hasattr(data, name) for name in names)


class InMemory:
    """What kinds of `Split` share whose inputs are tensors in memory."""

    in_memory = True

    def first(self: S, count: int | None) -> S:
        """The first `count` examples, or all if it is None."""
        return self if count is None else self.rows(slice(count))

    def fingerprint(self: "Stored", *, whole: bool) -> str | None:
        """The CRC-32 of all values, or None unless `whole`."""
        return crc32_of(self.stored) if whole else None

    def examples(self: Split) -> Examples:
        """The data as `fit` and `predict` take them."""
        return TensorExamples(self.inputs(), self.targets)


class Stored(Protocol):
    """What has tensors of which a checksum is made."""

    @property
    def stored(self) -> Iterable[Tensor]:
        """These tensors, on the CPU."""
        ...


@dataclass(frozen=True)
class Arrays(InMemory):
    """Examples in memory whose inputs are neither images nor a table: sequences, tokens, several inputs.

    Attributes:
        x: inputs [N, ...], or a tuple or dict of them. uint8 are pixels: `inputs` gives them in [0, 1].
        y: targets [N]: float32 numbers, or int64 counts or class labels.
        title: name of the data in figures and metrics.
        split: ``train``, ``test`` or ``validation``.
        classes: the name of each label, where y are class labels; else empty.
        target: name of y, with its unit.
        target_scale: mean and standard deviation by which y was standardized.

    Raises:
        UserError: parts of different lengths, numbers of x that are not finite, or a y of another shape or dtype.
    """

    x: Inputs
    y: Tensor
    title: str
    split: str
    classes: tuple[str, ...] = ()
    target: str = "y"
    target_scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_targets(self.y, count(self.x), "the y of Arrays")
        for part in parts(self.x):
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise UserError(f"the x of Arrays must be finite numbers, got NaN or infinity in {list(part.shape)}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def targets(self) -> Tensor:
        """What is learnt: y."""
        return self.y

    @property
    def shape(self) -> Any:
        """The shape of one input: ``(T, D)`` of a sequence, or a tuple or dict of shapes."""
        return shape_of(self.x)

    @property
    def stored(self) -> Iterable[Tensor]:
        """The tensors of which a checksum is made: those of x as they are, and y."""
        return (*parts(self.x), self.y)

    def inputs(self) -> Inputs:
        """Return x, with pixels (uint8) as float32 in [0, 1]."""
        return as_inputs(self.x)

    def rows(self, which: slice | Tensor, split: str | None = None) -> "Arrays":
        """Return the examples of a slice, or of some numbers, as a split of another name if it is given."""
        return replace(self, x=rows(self.x, which), y=self.y[which], split=split or self.split)


@dataclass(frozen=True)
class Files:
    """Examples that are read batch by batch: a folder of images, arrays on disk, a Dataset of the user's own.

    Attributes:
        data: the examples, labels included.
        targets: the labels of all of them, [N]: float32 numbers, or int64 counts or class labels.
        shape: of one input as the network takes it.
        title: name of the data in figures and metrics.
        split: ``train``, ``test`` or ``validation``.
        classes: the name of each label, where targets are class labels; else empty.
        target: name of the targets, with their unit.
        target_scale: mean and standard deviation by which targets were standardized.

    Raises:
        UserError: another number of targets than examples, or targets of another shape or dtype.
    """

    in_memory: ClassVar[bool] = False

    data: Examples
    targets: Tensor
    shape: Any
    title: str
    split: str
    classes: tuple[str, ...] = ()
    target: str = "y"
    target_scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_targets(self.targets, len(self.data), "the targets of Files")

    def __len__(self) -> int:
        return len(self.data)

    def inputs(self) -> Inputs:
        """Refused: the inputs are not in memory."""
        raise UserError(f"{self.title} is read batch by batch: use examples() in place of inputs()")

    def rows(self, which: slice | Tensor, split: str | None = None) -> "Files":
        """Return the examples of a slice, or of some numbers, as a split of another name if it is given."""
        at = torch.arange(len(self))[which]
        part: Any = Part(self.data, at)
        return replace(self, data=part, targets=self.targets[at], split=split or self.split)

    def first(self, count: int | None) -> "Files":
        """Return the first `count` examples, or all if it is None."""
        return self if count is None else self.rows(slice(count))

    def fingerprint(self, *, whole: bool) -> str:
        """The fingerprint of the examples, whatever `whole`."""
        return self.data.fingerprint()

    def examples(self) -> Examples:
        """The examples."""
        return self.data


def first_inputs(data: Split, count: int, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of the first `count` examples of any data as the network takes them, on a device."""
    data = data.first(count)
    if data.in_memory:
        return mapped(data.inputs(), lambda part: part.to(device))
    return read_batch(data.examples(), torch.arange(len(data)), device)[0]


def check_targets(y: Tensor, count: int, what: str) -> None:
    """Raise UserError for targets that are not float32 or int64 [count], or that are not finite."""
    if y.shape != (count,) or y.dtype not in (torch.float32, torch.int64):
        raise UserError(f"{what} must be float32 or int64 [{count}], got {y.dtype} {list(y.shape)}")
    if not bool(y.isfinite().all()):
        raise UserError(f"{what} must be finite numbers, got {int((~y.isfinite()).sum())} that are not")


def as_inputs(x: Inputs) -> Inputs:
    """Inputs as a network takes them: `as_input` of each tensor."""
    return mapped(x, as_input)


def as_input(x: Tensor) -> Tensor:
    """A tensor as a network takes it: uint8 are pixels, as float32 in [0, 1]; whole numbers int64; others float32."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()
