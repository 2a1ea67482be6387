"""What a data set is read from, and how: the settings that `load` takes and a run has under ``data``."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppl_bnn.errors import UserError
from ppl_bnn.settings import Count, Natural, Positive, Range, check, documented, setting

# What a target is. The likelihood says it; where it does not, the values do.
TargetKind = Literal["classes", "numbers", "counts"]

TABLES = ("csv", "parquet")
ARRAYS = ("npz", "h5", "torch")
FILES = (*TABLES, *ARRAYS, "folder")
# Which names a setting is for; a function of the user's own has none of these names.
_FOR = {
    "file": (*FILES, "cifar10"),
    "test_file": FILES,
    "test_fraction": FILES,
    "target": (*TABLES, *ARRAYS),
    "features": (*TABLES, *ARRAYS),
    "categorical": TABLES,
    "unknown_categories": TABLES,
    "missing": (*TABLES, *ARRAYS),
    "standardize_target": (*TABLES, *ARRAYS),
    "image_size": ("folder",),
    "workers": ("folder",),
    "max_memory": (*ARRAYS, "folder"),
    "options": TABLES,
}
_FOR_ONES_OWN = ("file", "test_fraction", "workers", "options")
# Of the rows of a file that has no test data.
TEST_FRACTION = 0.2


@documented
@dataclass
class DataSettings:
    """What a data set is read from, and how."""

    name: str = setting(
        "mnist", help="mnist, fashion-mnist, cifar10 or digits100k (100,000 deformed and shifted digits made of "
        "MNIST's: infimnist-compatible indexing, own fields); diabetes (a table with numbers to predict, by "
        "scikit-learn); csv, parquet, npz, h5, torch or folder (images, a folder for each class) for data.file; or the "
        "import path of a function of your own, which gets those of folder, file, progress and data.options that it "
        "has parameters for, and returns data or (train, test): Datasets, DataLoaders, tensors (x, y), or kinds of "
        "ppl_bnn.data.Split",
    )  # fmt: skip
    file: str | None = setting(
        None, help="the file or folder to read: a table for csv and parquet; arrays x and y (and x_test, y_test) for "
        "npz (or a folder of .npy), h5 and torch; images for folder (in train and test, or in one folder); for cifar10 "
        "an .npz of its images as JPEGs. A relative path is looked for here, then in the run folder; then the file's "
        "name in data.dir, if that is set",
        decisive=False, per_host=True,
    )  # fmt: skip
    test_file: str | None = setting(
        None, help="a file of the same form with the test data (default: those in file, or a share of its rows)",
        decisive=False, per_host=True,
    )  # fmt: skip
    test_fraction: Annotated[float, Range("lie in (0, 1)", lambda value: 0 < value < 1)] | None = setting(
        None, help=f"share of the rows that is the test set, by a fixed permutation, where there is no test data "
        f"(default: {TEST_FRACTION})",
    )  # fmt: skip
    target: str | None = setting(
        None, help="name of the column to predict (csv, parquet), or of the array (default: y)"
    )
    features: list[str] | None = setting(
        None, help="names of the columns, or arrays, that are inputs (default: all others)"
    )
    categorical: list[str] | None = setting(
        None, help="names of the columns that are categories, each a one-hot column (default: the columns of text)"
    )
    unknown_categories: Literal["refuse", "ignore"] = setting(
        "refuse", help="a category that only test rows have: refuse, or ignore (all its one-hot columns are 0)"
    )
    missing: Literal["refuse", "mean", "median", "drop"] = setting(
        "refuse", help="missing values: refuse; mean or median of the training rows (of categories the most frequent); "
        "or drop the rows",
    )  # fmt: skip
    standardize_target: bool | None = setting(
        None, help="give a numeric target mean 0 and standard deviation 1 in the training rows; scores are then in "
        "units of that standard deviation (default: yes, for numbers)",
    )  # fmt: skip
    image_size: Count | None = setting(
        None, help="folder only: pixels of a side; images are scaled to it by their shorter side and cropped in the "
        "middle (default: images keep their size, which must be the same)",
    )  # fmt: skip
    workers: Natural | None = setting(
        None, help="processes that read images which do not fit into max_memory (default: up to 8, by the cores), "
        "or your own data (default: their DataLoader's)",
        decisive=False, per_host=True,
    )  # fmt: skip
    max_memory: Positive = setting(
        512.0, help="MiB of inputs that are read into memory at once, of npz, h5, torch and folder; more is read "
        "batch by batch",
    )  # fmt: skip
    options: dict[str, Any] = setting(
        factory=dict, help="keyword arguments: of a function of your own, or of pandas' reader of csv and parquet, "
        "such as {sep: ;}",
    )  # fmt: skip


def check_data_settings(settings: DataSettings, *, own: bool) -> None:
    """Raise UserError for settings out of range, that have no effect on this data, or contradict each other.

    Args:
        own: whether `settings.name` is an import path of the user's own.
    """
    check(settings, prefix="data.")
    unused = DataSettings(settings.name)
    for field in fields(DataSettings):
        value = getattr(settings, field.name)
        if field.name == "name" or value == getattr(unused, field.name):
            continue
        names = _FOR[field.name]
        if settings.name not in names and not (own and field.name in _FOR_ONES_OWN):
            raise UserError(
                f"data.{field.name} is for data.name {', '.join(names)}; it cannot be used with {settings.name!r}: "
                "leave it out"
            )
    if settings.name in FILES and settings.file is None:
        raise UserError(f"data.name {settings.name} reads a file of yours: name it with data.file")
    if settings.test_file is not None and settings.test_fraction is not None:
        raise UserError("data.test_fraction has no effect with data.test_file: leave out one of the two")


@dataclass(frozen=True)
class Request:
    """What a reader of data is asked for.

    Attributes:
        settings: the settings.
        folder: the cache of data sets.
        targets: what the targets are; None to see it from their values.
        holdout: number of the last training examples that are not trained on: no statistics are taken of them.
        num_train: number of the training examples that are used, the first of those without the holdout; None for all.
        validation: number of the last of these that are not trained on either.
        progress: show a progress bar.
        tokens: whole numbers in arrays stay int64; else they are numbers to compute with, as floats are.
    """

    settings: DataSettings
    folder: Path
    targets: TargetKind | None = None
    holdout: int = 0
    num_train: int | None = None
    validation: int = 0
    progress: bool = False
    tokens: bool = True

    @property
    def file(self) -> Path:
        """The file to read, which is set (`check_data_settings`)."""
        assert self.settings.file is not None
        return Path(self.settings.file)

    def known(self, train: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the numbers of training rows, in their order, that statistics are taken of."""
        used = train[: max(0, len(train) - self.holdout)][: self.num_train]
        trained_on = used[: max(0, len(used) - self.validation)]
        # A holdout or validation of all of them is refused later.
        return trained_on if len(trained_on) else train

    @property
    def title(self) -> str:
        """The name of data of the user's own in figures and metrics."""
        return title_of(self.file)


def title_of(file: Path) -> str:
    """The name of a file's data in figures and metrics: the file's, without its endings."""
    return file.name.partition(".")[0] or file.name
