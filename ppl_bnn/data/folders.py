"""Folders of images, a folder for each class, as torchvision's ImageFolder has them."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ppl_bnn.data.as_examples import as_examples
from ppl_bnn.data.fingerprints import of_labelled_files
from ppl_bnn.data.images import Images
from ppl_bnn.data.parts import split_rows
from ppl_bnn.data.settings import Request
from ppl_bnn.data.splits import Files, Split, as_inputs
from ppl_bnn.errors import FileError, UserError, some
from ppl_bnn.native.openmp import num_cores

_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")
# At most this number of images are looked at before all are taken to have their size and channels.
_LOOKED_AT = 2000
_GREY = ("1", "L")
_MOST_WORKERS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tree:
    """Images in folders, one for each class.

    Attributes:
        paths: of the images, class after class, each in the order of names.
        labels: the number of each image's class, [N].
        classes: the names of the classes.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


class ImageFiles(Dataset):
    """Images [C, H, W] in uint8 and the number of their class, decoded each time they are asked for.

    Attributes:
        paths: of the images.
        labels: of their classes, [N].
        mode: ``L`` for one channel, ``RGB`` for three.
        size: height and width of all images.
        resize: whether images are scaled to `size` and cropped in the middle; else another size is refused.
    """

    def __init__(
        self, paths: Sequence[str], labels: NDArray[np.int64], mode: str, size: tuple[int, int], resize: bool
    ) -> None:
        # An array of texts is shared by worker processes; a list is copied as they count its references.
        self.paths, self.labels, self.mode, self.size, self.resize = np.array(paths), labels, mode, size, resize

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels(row)), int(self.labels[row])

    def files_fingerprint(self) -> str:
        """The CRC-32 of names, sizes and labels of all images, and that of their times. No image is read."""
        return self._known

    @cached_property
    def _known(self) -> str:
        # A million files on a network take minutes.
        return of_labelled_files(self.paths.tolist(), torch.from_numpy(self.labels))

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """The pixels of an image, [C, H, W].

        Raises:
            FileError: the image cannot be decoded, or has another size than the others.
        """
        path = str(self.paths[row])
        image = _opened(path, self.mode)
        if self.resize:
            from PIL import ImageOps

            image = ImageOps.fit(image, (self.size[1], self.size[0]))
        elif (image.height, image.width) != self.size:
            raise FileError(
                f"the image {path} is {image.height}x{image.width}, and others are {self.size[0]}x{self.size[1]}: set "
                "data.image_size"
            )
        found = np.array(image)
        return found[None] if found.ndim == 2 else np.ascontiguousarray(found.transpose(2, 0, 1))


def read_folder(asked: Request) -> tuple[Split, Split]:
    """Return (train, test) of a folder with ``train`` and ``test`` (or ``val``), or of one with a folder a class.

    Images of up to `max_memory` in all are decoded once, into `Images`. More are decoded each time they are asked for,
    by worker processes, as `Files`.

    Raises:
        UserError: folders or settings that cannot be used, with the name of the file.
    """
    settings = asked.settings
    if asked.targets in ("numbers", "counts"):
        raise UserError("the folders of data.name folder are classes: use --model.likelihood categorical")
    root, test_root = _roots(asked)
    train = test = _tree(root)
    if test_root is None:
        rows, test_rows = split_rows(len(train.paths), settings.test_fraction)
    else:
        test = _of_classes(_tree(test_root), train.classes, test_root)
        # Not class after class: the first or last of them are to be of all classes.
        rows, test_rows = (np.random.default_rng(0).permutation(len(tree.paths)) for tree in (train, test))
    trees = [_chosen(train, rows), _chosen(test, test_rows)]
    if len(train.classes) < 2:
        raise UserError(f"{root} has images of one class alone, {train.classes[0]}: there is nothing to learn")
    mode, size = _form(trees[0].paths, settings.image_size)
    parts = [ImageFiles(tree.paths, tree.labels, mode, size, settings.image_size is not None) for tree in trees]
    channels = 1 if mode == "L" else 3
    total = sum(map(len, parts)) * channels * size[0] * size[1]
    titled: Any = {"title": asked.title, "classes": train.classes}
    if total <= settings.max_memory * 2**20:
        both: list[Split] = [
            Images(_decoded(part, asked.progress), torch.from_numpy(part.labels), split=split, **titled)
            for part, split in zip(parts, ("train", "test"), strict=True)
        ]
        return both[0], both[1]
    workers = _workers() if settings.workers is None else settings.workers
    log.info(
        "data: %d images, %.0f MiB decoded, are decoded by %d worker processes each time (data.max_memory is %g)",
        sum(map(len, parts)), total / 2**20, workers, settings.max_memory,
    )  # fmt: skip
    train_part, test_part = (
        Files(
            as_examples(part, num_workers=workers, transform=as_inputs), torch.from_numpy(part.labels),
            (channels, *size), split=split, target="class", **titled,
        )
        for part, split in zip(parts, ("train", "test"), strict=True)
    )  # fmt: skip
    return train_part, test_part


def _roots(asked: Request) -> tuple[Path, Path | None]:
    """The folder of the training images, and that of the test images, if there is one."""
    settings, root = asked.settings, asked.file
    if not root.is_dir():
        raise FileError(f"data.file {root} is not {'a folder' if root.exists() else 'there'}")
    own, test = (next((root / name for name in names if (root / name).is_dir()), None) for names in (_TRAIN, _TEST))
    if settings.test_file is not None:
        if not (given := Path(settings.test_file)).is_dir():
            raise FileError(f"data.test_file {given} is not {'a folder' if given.exists() else 'there'}")
        return own or root, given
    if own is None:
        return root, None
    if others := [name for name in _TEST if (root / name).is_dir() and root / name != test]:
        log.warning("data: the images in %s are the test set, and those in %s are left out", test, some(others))
    if test is not None and settings.test_fraction is not None:
        raise UserError(f"data.test_fraction has no effect, as there is {test}: leave it out")
    return own, test


def _tree(root: Path) -> Tree:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileError(f"{root} has no folders: each class needs one, such as {root}/cat")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            kinds = ", ".join(IMG_EXTENSIONS)
            raise FileError(f"{root / name} has no images ({kinds}): remove the folder, or put images into it")
        paths += files
        labels += [label] * len(files)
    return Tree(paths, np.array(labels), tuple(classes))


def _chosen(tree: Tree, rows: NDArray[np.int64]) -> Tree:
    return Tree([tree.paths[at] for at in rows], tree.labels[rows], tree.classes)


def _of_classes(tree: Tree, classes: tuple[str, ...], root: Path) -> Tree:
    """The same images, with labels counted by the classes of the training images."""
    if unknown := [name for name in tree.classes if name not in classes]:
        raise FileError(
            f"{root} has the class {some(unknown)}, of which there are no training images: there are {some(classes)}"
        )
    numbers = np.array([classes.index(name) for name in tree.classes])
    return Tree(tree.paths, numbers[tree.labels], classes)


def _form(paths: Sequence[str], size: int | None) -> tuple[str, tuple[int, int]]:
    """Mode and size of all images, by some of them."""
    some_paths = [
        paths[at] for at in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _LOOKED_AT)).round().astype(int))
    ]
    images = [(path, _opened(path, None)) for path in some_paths]
    mode = "L" if all(image.mode in _GREY for _, image in images) else "RGB"
    if size is not None:
        return mode, (size, size)
    first = images[0][1]
    for path, image in images:
        if image.size != first.size:
            raise UserError(
                f"images have different sizes, {first.height}x{first.width} of {some_paths[0]} and "
                f"{image.height}x{image.width} of {path}: set data.image_size, such as 64"
            )
    return mode, (first.height, first.width)


def _opened(path: str, mode: str | None) -> Any:
    """An image, decoded as `mode`; None reads no more than its form."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise FileError(f"the image {path} has more than 8 bits for a pixel: convert it to 8 bits")
            if mode == "L" and image.mode not in _GREY:
                raise FileError(f"the image {path} has colours, and others have none: convert it or them")
            # A closed image still knows its size and mode.
            return image if mode is None else image.convert(mode)
    except FileError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        lines = str(error).splitlines()
        raise FileError(
            f"the image {path} cannot be read: {lines[0] if lines else type(error).__name__}; repair or remove it"
        ) from None


def _decoded(files: ImageFiles, progress: bool) -> Tensor:
    """The pixels of all images, uint8 [N, C, H, W]."""
    pixels = np.empty((len(files), 1 if files.mode == "L" else 3, *files.size), np.uint8)

    def decode(row: int) -> None:
        pixels[row] = files.pixels(row)

    # Threads decode side by side: the decoders work outside of Python's lock.
    with ThreadPoolExecutor(_workers()) as pool:
        try:
            for _ in tqdm(
                pool.map(decode, range(len(files))), total=len(files), disable=not progress, desc="decoding images"
            ):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels)


def _workers() -> int:
    return min(_MOST_WORKERS, num_cores())
