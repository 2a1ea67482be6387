"""Named image data sets as tensors in memory, verified by checksum and cached in one folder."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data.sources import cifar10, digits100k, digits_subset, has_digits_subset, idx_files
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.registry import lookup

_TITLES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "digits100k": "0.1M transformed digits",
}
# Of one image: channels, height and width.
_SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits100k": (1, 28, 28)}
_JPEG = " (JPEG)"
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Images:
    """Labelled images of one split.

    Attributes:
        pixels: uint8 [N, channels, height, width].
        labels: int64 [N].
        classes: the name of each label.
        title: name of the data in figures and metrics. It says how the data was obtained.
        split: ``train``, ``test`` or ``validation``.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    title: str
    split: str

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self) -> Tensor:
        """Return the images as float32 [N, channels, height, width] in [0, 1]."""
        return self.pixels.float() / 255

    def first(self, count: int | None) -> "Images":
        """Return the first `count` examples, or all if it is None."""
        return self if count is None else replace(self, pixels=self.pixels[:count], labels=self.labels[:count])


def load(
    name: str,
    folder: str | Path = "data",
    *,
    file: str | Path | None = None,
    holdout: int = 0,
    progress: bool = True,
) -> tuple[Images, Images]:
    """Return (train, test), downloading into `folder` what is not there yet.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``cifar10`` or ``digits100k``: MNIST's training digits, 100,000 times
            transformed (`ppl_bnn.data.transformed_digits`; infimnist's indices 70000..169999, own fields), and its
            test set. Or the import path of a function of (folder, file, progress) that returns (train, test).
        folder: the cache; each data set has a folder of its own in it.
        file: for ``cifar10``, an .npz of JPEGs (arrays jpeg, offsets, labels, is_test) to read instead.
        holdout: if not 0, keep the last `holdout` training examples out of training and return them in place of
            the test set, so that recipes are chosen without looking at the test set. Not for ``digits100k``.
        progress: show a progress bar where images are made.

    Raises:
        UserError: an unknown name or a holdout that leaves no training data.
        FileError: a file that is missing, cannot be had, or is not what its checksum says.
    """
    read = lookup(DATASETS, name, what="the data set")
    _check_file(name, file)
    if name == "digits100k" and holdout:
        raise UserError(
            f"data.holdout must be 0 with 'digits100k', got {holdout}: training would see other transforms of the "
            "digits held out; choose recipes on 'mnist'"
        )
    train, test = read(Path(folder), file, progress)
    if not 0 <= holdout < len(train):
        raise UserError(f"data.holdout must be from 0 to {len(train) - 1}, got {holdout}")
    if holdout:
        cut = len(train) - holdout
        test = replace(train, pixels=train.pixels[cut:], labels=train.labels[cut:], split="validation")
        train = train.first(cut)
    return train, test


def title_and_shape(
    name: str, folder: str | Path = "data", *, file: str | Path | None = None, progress: bool = True
) -> tuple[str, tuple[int, int, int]]:
    """The title of a data set and the shape of its images (channels, height, width); arguments as in `load`.

    Nothing is read or downloaded for the named sets. A function of the user's own is called.

    Raises:
        UserError: an unknown name, or what that function raises.
    """
    _check_file(name, file)
    if name in _SHAPES:
        return _TITLES[name] + (_JPEG if file is not None else ""), _SHAPES[name]
    images, _ = load(name, folder, file=file, progress=progress)
    channels, height, width = images.pixels.shape[1:]
    return images.title, (channels, height, width)


def _check_file(name: str, file: str | Path | None) -> None:
    if file is not None and name in DATASETS and name != "cifar10":
        raise UserError(f"data.file is an .npz of CIFAR-10 JPEGs; it cannot be used with {name!r}")


def _load_digits(name: str, folder: Path) -> tuple[Images, Images]:
    classes = _DIGITS if name == "mnist" else _FASHION
    try:
        files = idx_files(name, folder / name)
    except FileError as error:
        # A corrupt file is the user's to repair; only data that cannot be had falls back to the subset.
        if name != "mnist" or not isinstance(error.__cause__, LookupError) or not has_digits_subset(folder / name):
            raise
        logging.getLogger(__name__).warning(
            "%s -- using the subset of 5,000 MNIST digits in %s: figures and metrics say so", error, folder / name
        )
        return _split_subset(*digits_subset(folder / name))
    return _both_splits(files, classes, _TITLES[name])


def _load_digits100k(folder: Path, progress: bool) -> tuple[Images, Images]:
    try:
        files = idx_files("mnist", folder / "mnist")
    except FileError as error:
        raise FileError(f"digits100k needs all 60,000 training digits of MNIST: {error}") from error
    images, digit = digits100k(folder / "digits100k", files["train-images"], progress=progress)
    files |= {"train-images": images, "train-labels": files["train-labels"][digit]}
    return _both_splits(files, _DIGITS, _TITLES["digits100k"])


def _both_splits(files: dict[str, np.ndarray], classes: tuple[str, ...], title: str) -> tuple[Images, Images]:
    train, test = (
        Images(
            torch.from_numpy(files[f"{split}-images"]).unsqueeze(1),
            torch.from_numpy(files[f"{split}-labels"]).long(),
            classes,
            title,
            split,
        )
        for split in ("train", "test")
    )
    return train, test


def _split_subset(pixels: np.ndarray, labels: np.ndarray) -> tuple[Images, Images]:
    # The file is sorted by class: every fifth digit is a test set of 1,000 with 100 of each class.
    is_test = np.arange(len(labels)) % 5 == 4
    order = np.random.default_rng(0).permutation(int((~is_test).sum()))
    title = "MNIST (5,000-digit subset)"
    train, test = (
        Images(torch.from_numpy(pixels[at].copy()), torch.from_numpy(labels[at]).long(), _DIGITS, title, split)
        for at, split in ((np.flatnonzero(~is_test)[order], "train"), (np.flatnonzero(is_test), "test"))
    )
    return train, test


def _load_cifar10(folder: Path, file: str | Path | None) -> tuple[Images, Images]:
    pixels, labels, is_test = cifar10(folder / "cifar10", None if file is None else Path(file))
    title = _TITLES["cifar10"] + (_JPEG if file is not None else "")
    train, test = (
        Images(torch.from_numpy(pixels[at]), torch.from_numpy(labels[at]).long(), _CIFAR, title, split)
        for at, split in ((~is_test, "train"), (is_test, "test"))
    )
    return train, test


DATASETS: dict[str, Callable[[Path, str | Path | None, bool], tuple[Images, Images]]] = {
    "mnist": lambda folder, file, progress: _load_digits("mnist", folder),
    "fashion-mnist": lambda folder, file, progress: _load_digits("fashion-mnist", folder),
    "cifar10": lambda folder, file, progress: _load_cifar10(folder, file),
    "digits100k": lambda folder, file, progress: _load_digits100k(folder, progress),
}
