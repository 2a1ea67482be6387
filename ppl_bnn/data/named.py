"""The named data sets, and those of the user's own: images and tables."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppl_bnn.data.images import JPEG, SHAPES, TITLES, Images, load_cifar10, load_digits, load_digits100k
from ppl_bnn.data.tables import Table, diabetes
from ppl_bnn.errors import UserError
from ppl_bnn.registry import lookup

# One split of a data set. Both have len, first, rows, inputs, targets, classes, shape, title, split and stored.
Split = Images | Table
IMAGE_SETS = tuple(SHAPES)


def load(
    name: str,
    folder: str | Path = "data",
    *,
    file: str | Path | None = None,
    holdout: int = 0,
    progress: bool = True,
) -> tuple[Split, Split]:
    """Return (train, test), downloading into `folder` what is not there yet.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``cifar10`` or ``digits100k``: MNIST's training digits, 100,000 times
            transformed (`ppl_bnn.data.transformed_digits`; infimnist's indices 70000..169999, own fields), and its
            test set; ``diabetes``, a table (`ppl_bnn.data.tables`). Or the import path of a function of (folder, file,
            progress) that returns (train, test), two `Images` or two `Table`.
        folder: the cache; each data set has a folder of its own in it.
        file: for ``cifar10``, an .npz of JPEGs (arrays jpeg, offsets, labels, is_test) to read instead.
        holdout: if not 0, keep the last `holdout` training examples out of training and return them in place of
            the test set, so that recipes are chosen without looking at the test set. Not for ``digits100k``.
        progress: show a progress bar where images are made.

    Raises:
        UserError: an unknown name, a holdout that leaves no training data, or a function that returns something else.
        FileError: a file that is missing, cannot be had, or is not what its checksum says.
    """
    read = lookup(DATASETS, name, what="the data set")
    _check_file(name, file)
    if name == "digits100k" and holdout:
        raise UserError(
            f"data.holdout must be 0 with 'digits100k', got {holdout}: training would see other transforms of the "
            "digits held out; choose recipes on 'mnist'"
        )
    found = read(Path(folder), file, progress)
    if not (isinstance(found, tuple) and [type(part) for part in found] in ([Images] * 2, [Table] * 2)):
        raise UserError(
            f"data.name {name} must return (train, test), two ppl_bnn.data.Images or two ppl_bnn.data.Table, got "
            f"{found!r:.80}"
        )
    train, test = found
    if not 0 <= holdout < len(train):
        raise UserError(f"data.holdout must be from 0 to {len(train) - 1}, got {holdout}")
    if holdout:
        cut = len(train) - holdout
        train, test = train.first(cut), train.rows(slice(cut, None), "validation")
    return train, test


class Described(NamedTuple):
    """What a network needs to know of a data set.

    Attributes:
        title: its name in figures and metrics.
        shape: of one input: channels, height and width of an image, (D,) of a table's row.
        num_classes: number of classes, 0 where the targets are no class labels.
    """

    title: str
    shape: tuple[int, ...]
    num_classes: int


def described(
    name: str, folder: str | Path = "data", *, file: str | Path | None = None, progress: bool = True
) -> Described:
    """Describe a data set; arguments as in `load`.

    Nothing is read or downloaded for the named images. A function of the user's own is called.

    Raises:
        UserError: an unknown name, or what that function raises.
    """
    _check_file(name, file)
    if name in SHAPES:
        # All of them have ten classes.
        return Described(TITLES[name] + (JPEG if file is not None else ""), SHAPES[name], 10)
    train, _ = load(name, folder, file=file, progress=progress)
    return Described(train.title, train.shape, len(train.classes))


def _check_file(name: str, file: str | Path | None) -> None:
    if file is not None and name in DATASETS and name != "cifar10":
        raise UserError(f"data.file is an .npz of CIFAR-10 JPEGs; it cannot be used with {name!r}")


DATASETS: dict[str, Callable[[Path, str | Path | None, bool], tuple[Split, Split]]] = {
    "mnist": lambda folder, file, progress: load_digits("mnist", folder),
    "fashion-mnist": lambda folder, file, progress: load_digits("fashion-mnist", folder),
    "cifar10": lambda folder, file, progress: load_cifar10(folder, file),
    "digits100k": lambda folder, file, progress: load_digits100k(folder, progress),
    "diabetes": lambda folder, file, progress: diabetes(),
}
