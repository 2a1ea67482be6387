"""The data sets by name: named ones, files of the user's own, and functions of the user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ppl_bnn.data.cache import data_folder
from ppl_bnn.data.classes import warn_of_classes
from ppl_bnn.data.images import JPEG, SHAPES, TITLES, load_cifar10, load_digits, load_digits100k
from ppl_bnn.data.settings import DataSettings, Request, TargetKind, check_data_settings
from ppl_bnn.data.splits import Split
from ppl_bnn.data.tables import diabetes
from ppl_bnn.errors import UserError
from ppl_bnn.registry import lookup

IMAGE_SETS = tuple(SHAPES)


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    targets: TargetKind | None = None,
    holdout: int = 0,
    num_train: int | None = None,
    validation: int = 0,
    progress: bool = True,
    tokens: bool = True,
    **settings: Any,
) -> tuple[Split, Split]:
    """Return (train, test), downloading into `folder` what is not there yet.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``cifar10`` or ``digits100k``: MNIST's training digits, 100,000 times
            transformed (`ppl_bnn.data.transformed_digits`; infimnist's indices 70000..169999, own fields), and its
            test set; ``diabetes``, a table (`ppl_bnn.data.tables`). Or ``csv``, ``parquet``, ``npz``, ``h5``, ``torch``
            or ``folder`` for a `file`. Or the import path of a function of the user's own (`DataSettings`).
        folder: the cache of named data sets, each in a folder of its own (default: `ppl_bnn.data.cache.data_folder`).
        targets: what the targets of a file are; None to see it from their values.
        holdout: if not 0, keep the last `holdout` training examples out of training and return them in place of
            the test set, so that recipes are chosen without looking at the test set. Not for ``digits100k``.
        num_train: use only this number of training examples, the first; None for all.
        validation: number of the last of these that the caller keeps out of training. They are returned among the
            training examples, and no statistics are taken of them.
        progress: show a progress bar where images are made or read.
        tokens: whole numbers in files of arrays stay int64; else they are numbers to compute with, as floats are.
        settings: of `DataSettings`, such as `file` and `target`.

    Raises:
        UserError: an unknown name, settings that do not fit it, columns or values that cannot be used, a holdout that
            leaves no training data, or a function that returns something else.
        FileError: a file that is missing, cannot be had or read, or is not what its checksum says.
    """
    read = lookup(DATASETS, name, what="the data set")
    # A file may be given as a Path.
    given: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    asked = Request(
        DataSettings(name, **given), data_folder(folder), targets, holdout, num_train, validation, progress, tokens
    )
    check_data_settings(asked.settings, own=name not in DATASETS)
    if targets not in (None, *get_args(TargetKind)):
        raise UserError(f"targets must be one of {', '.join(get_args(TargetKind))}, or None; got {targets!r}")
    if name == "digits100k" and holdout:
        raise UserError(
            f"data.holdout must be 0 with 'digits100k', got {holdout}: training would see other transforms of the "
            "digits held out; choose recipes on 'mnist'"
        )
    if name in DATASETS:
        train, test = read(asked)
    else:
        from ppl_bnn.data.own import read_own

        train, test = read_own(read, asked)
    if not 0 <= holdout < len(train):
        raise UserError(f"data.holdout must be from 0 to {len(train) - 1}, got {holdout}")
    if holdout:
        cut = len(train) - holdout
        train, test = train.first(cut), train.rows(slice(cut, None), "validation")
    train = train.first(num_train)
    warn_of_classes(train, test)
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
    name: str, folder: str | Path | None = None, *, file: str | Path | None = None, progress: bool = True
) -> Described:
    """Describe a data set; arguments as in `load`.

    Nothing is read or downloaded for the named images. A function of the user's own is called.

    Raises:
        UserError: an unknown name, or what that function raises.
    """
    if name in SHAPES:
        check_data_settings(DataSettings(name, file=None if file is None else str(file)), own=False)
        # All of them have ten classes.
        return Described(TITLES[name] + (JPEG if file is not None else ""), SHAPES[name], 10)
    train, _ = load(name, folder, progress=progress, file=file)
    return Described(train.title, train.shape, len(train.classes))


def _tables(asked: Request) -> tuple[Split, Split]:
    # Here, for pandas takes half a second to import.
    from ppl_bnn.data.table_files import read_table

    return read_table(asked)


def _arrays(asked: Request) -> tuple[Split, Split]:
    from ppl_bnn.data.array_data import read_array_data

    return read_array_data(asked)


def _folder(asked: Request) -> tuple[Split, Split]:
    from ppl_bnn.data.folders import read_folder

    return read_folder(asked)


DATASETS: dict[str, Callable[[Request], tuple[Split, Split]]] = {
    "mnist": lambda asked: load_digits("mnist", asked.folder),
    "fashion-mnist": lambda asked: load_digits("fashion-mnist", asked.folder),
    "cifar10": lambda asked: load_cifar10(asked.folder, asked.settings.file),
    "digits100k": lambda asked: load_digits100k(asked.folder, asked.progress),
    "diabetes": diabetes,
    "csv": _tables,
    "parquet": _tables,
    "npz": _arrays,
    "h5": _arrays,
    "torch": _arrays,
    "folder": _folder,
}
