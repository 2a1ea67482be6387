"""Labelled images as tensors in memory, and the image data sets, verified by checksum and cached in one folder."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data.sources import cifar10, digits100k, digits_subset, has_digits_subset, idx_files
from ppl_bnn.data.splits import InMemory
from ppl_bnn.errors import FileError

TITLES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "digits100k": "0.1M transformed digits",
}
# Of one image: channels, height and width.
SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits100k": (1, 28, 28)}
JPEG = " (JPEG)"
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Images(InMemory):
    """Labelled images of one split.

    Attributes:
        pixels: uint8 [N, channels, height, width].
        labels: int64 [N].
        classes: the name of each label.
        title: name of the data in figures and metrics. It says how the data was obtained.
        split: ``train``, ``test`` or ``validation``.
    """

    target: ClassVar[str] = "class"
    target_scale: ClassVar[None] = None

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    title: str
    split: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def targets(self) -> Tensor:
        """What is learnt: the labels."""
        return self.labels

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """The tensors of which a checksum is made: pixels and labels."""
        return self.pixels, self.labels

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: channels, height, width."""
        return tuple(self.pixels.shape[1:])

    def inputs(self) -> Tensor:
        """Return the images as float32 [N, channels, height, width] in [0, 1]."""
        return self.pixels.float() / 255

    def rows(self, which: slice | Tensor, split: str | None = None) -> "Images":
        """Return the examples of a slice, or of some numbers, as a split of another name if it is given."""
        return replace(self, pixels=self.pixels[which], labels=self.labels[which], split=split or self.split)


def load_digits(name: str, folder: Path) -> tuple[Images, Images]:
    """Return (train, test) of ``mnist`` or ``fashion-mnist``. Raises FileError where its files cannot be had."""
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
    return _both_splits(files, classes, TITLES[name])


def load_digits100k(folder: Path, progress: bool) -> tuple[Images, Images]:
    """Return (train, test) of the transformed digits, made once. Raises FileError without MNIST's."""
    try:
        files = idx_files("mnist", folder / "mnist")
    except FileError as error:
        raise FileError(f"digits100k needs all 60,000 training digits of MNIST: {error}") from error
    images, digit = digits100k(folder / "digits100k", files["train-images"], progress=progress)
    files |= {"train-images": images, "train-labels": files["train-labels"][digit]}
    return _both_splits(files, _DIGITS, TITLES["digits100k"])


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


def load_cifar10(folder: Path, file: str | Path | None) -> tuple[Images, Images]:
    """Return (train, test) of CIFAR-10, or of an .npz of its images. Raises FileError where it cannot be had."""
    pixels, labels, is_test = cifar10(folder / "cifar10", None if file is None else Path(file))
    title = TITLES["cifar10"] + (JPEG if file is not None else "")
    train, test = (
        Images(torch.from_numpy(pixels[at]), torch.from_numpy(labels[at]).long(), _CIFAR, title, split)
        for at, split in ((~is_test, "train"), (is_test, "test"))
    )
    return train, test
