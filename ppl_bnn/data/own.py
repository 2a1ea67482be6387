"""Data of a function, or class, of the user's own."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_bnn.data.arrays import is_array
from ppl_bnn.data.as_examples import as_examples
from ppl_bnn.data.examples import Examples, Streamed, is_in_order, read_batch
from ppl_bnn.data.images import Images
from ppl_bnn.data.parts import split_rows
from ppl_bnn.data.settings import Request
from ppl_bnn.data.splits import Arrays, Files, Split, is_split
from ppl_bnn.data.tables import Table
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import mapped, shape_of

_BATCH = 256


def read_own(function: Callable[..., Any], asked: Request) -> tuple[Split, Split]:
    """Return (train, test) of what a function of the user's own returns.

    It is called with those of folder, file and progress that it has parameters for, and with data.options. It returns
    data, of which a share is the test set, or (train, test). Data are a kind of `Split`, or what `as_examples` takes.

    Raises:
        UserError: options that it does not take, data of another kind, or labels that the likelihood does not take.
    """
    name, settings = asked.settings.name, asked.settings
    given = _arguments(function, asked)
    try:
        found = function(**given)
    except UserError:
        raise
    except Exception as error:
        # What goes wrong in the user's own function is the user's to mend.
        lines = str(error).splitlines()
        raise UserError(f"data.name {name} raised {type(error).__name__}: {lines[0] if lines else ''}") from error
    if isinstance(found, list) and len(found) == 2:
        # Nobody means a set of two examples.
        found = tuple(found)
    # Two tensors are inputs and labels.
    is_pair = isinstance(found, tuple) and len(found) == 2 and not any(map(_is_array, found))
    if is_pair and settings.test_fraction is not None:
        raise UserError(f"data.test_fraction has no effect, as data.name {name} returns (train, test): leave it out")
    parts = list(found) if is_pair else [found]
    if not all(map(is_split, parts)):
        parts = _wrapped(parts, asked)
    if is_pair:
        if isinstance(parts[0], Table) and parts[0].shape != parts[1].shape:
            shapes = f"{list(parts[0].shape)} in the training data and {list(parts[1].shape)} in the test data"
            raise UserError(f"data.name {name} gives rows of the shape {shapes}: they must be alike")
        return parts[0], parts[1]
    (whole,) = parts
    train, test = (torch.from_numpy(rows) for rows in split_rows(len(whole), settings.test_fraction))
    if not whole.in_memory and is_in_order(whole.examples()):
        train, test = torch.arange(len(whole)).split([len(train), len(test)])
    return whole.rows(train, "train"), whole.rows(test, "test")


def _arguments(function: Callable[..., Any], asked: Request) -> dict[str, Any]:
    settings = asked.settings
    known = {"folder": asked.folder, "file": settings.file, "progress": asked.progress}
    try:
        taken = inspect.signature(function)
    except (TypeError, ValueError):
        return dict(settings.options)
    given = {key: value for key, value in known.items() if key in taken.parameters} | settings.options
    try:
        taken.bind(**given)
    except TypeError as error:
        raise UserError(
            f"data.name {settings.name} takes {taken}, and data.options are {settings.options}: {error}"
        ) from None
    if settings.file is not None and "file" not in taken.parameters:
        raise UserError(f"data.name {settings.name} has no parameter file: leave out data.file")
    return given


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or is_array(value)


def _wrapped(parts: Sequence[Any], asked: Request) -> list[Split]:
    """Data that `as_examples` takes, as kinds of `Split` with the same classes."""
    workers = asked.settings.workers
    try:
        examples = [as_examples(part, num_workers=workers) for part in parts]
    except UserError as error:
        raise UserError(
            f"data.name {asked.settings.name} must return data or (train, test), each a Dataset, a DataLoader, tensors "
            f"(x, y), or ppl_bnn.data.Images, Table, Arrays or Files; got {parts[0]!r:.60}: {error}"
        ) from None
    targets = [_targets(one, part, asked) for one, part in zip(examples, parts, strict=True)]
    classes: tuple[str, ...] = ()
    if not any(y.is_floating_point() for y in targets) and asked.targets != "counts":
        count = int(torch.cat(targets).max()) + 1
        dataset = getattr(parts[0], "dataset", parts[0])
        named = [str(name) for name in getattr(dataset, "classes", ())]
        classes = tuple(named) if len(named) >= count else tuple(map(str, range(count)))
    return [
        _split(one, y, classes, split, asked.settings.name)
        for one, y, split in zip(examples, targets, ("train", "test"), strict=False)
    ]


def _split(examples: Examples, y: Tensor, classes: tuple[str, ...], split: str, title: str) -> Split:
    if not is_plain(examples):
        shape = shape_of(read_batch(examples, torch.tensor([0]), "cpu")[0])
        return Files(examples, y, shape, title, split, classes)
    x: Any = examples.x
    if isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point():
        names = tuple(f"x{at}" for at in range(x.shape[1]))
        return Table(x.float().cpu(), y, names, "y", title, split, classes)
    if isinstance(x, Tensor) and x.dim() == 4 and x.dtype == torch.uint8 and classes:
        return Images(x.cpu(), y, classes, title, split)
    return Arrays(mapped(x, lambda part: part.cpu()), y, title, split, classes)


def _targets(examples: Examples, data: Any, asked: Request) -> Tensor:
    """The labels of all examples, [N], as the likelihood's kind has them."""
    y = _labels(examples, getattr(data, "dataset", data), asked)
    name = asked.settings.name
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() != 1:
        raise UserError(
            f"data.name {name} must give one label for each example, got labels of shape {list(y.shape[1:])}"
        )
    whole = not y.is_floating_point()
    if asked.targets == "numbers" or (asked.targets is None and not whole):
        return y.float()
    if not whole:
        raise UserError(
            f"data.name {name} gives labels in {y.dtype}, which are no {asked.targets}: give int64, or use "
            "--model.likelihood normal"
        )
    if int(y.min()) < 0:
        raise UserError(f"data.name {name} gives the label {int(y.min())}, and {asked.targets or 'classes'} start at 0")
    return y.long()


def _labels(examples: Examples, data: Any, asked: Request) -> Tensor:
    """The labels as they are: known ones, or of a pass over all examples."""
    # With a transform of labels, those of the Dataset are others than its items'.
    of_dataset = None if getattr(data, "target_transform", None) else getattr(data, "targets", None)
    for known in (getattr(examples, "y", None), of_dataset):
        if known is not None and hasattr(known, "__len__") and len(known) == len(examples):
            found = torch.as_tensor(known[:])
            places = torch.linspace(0, len(examples) - 1, min(len(examples), 8)).long()
            own = examples.take(places)[1]
            # Items may have other labels in another way.
            if own is not None and torch.equal(own.double().cpu().reshape(-1), found[places].double().reshape(-1)):
                return found.cpu()
    rows = torch.arange(len(examples)).split(_BATCH)
    shown = tqdm(rows, disable=not asked.progress, desc="reading labels")
    read = examples.stream(shown) if isinstance(examples, Streamed) else map(examples.take, shown)
    labels = [y for _, y in read]
    if any(y is None for y in labels):
        raise UserError(
            f"data.name {asked.settings.name} has no labels: give each example as a tuple (x, y), or a dict with a 'y'"
        )
    return torch.cat([y.cpu() for y in labels if y is not None])
