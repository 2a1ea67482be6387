"""CSV and Parquet files as pandas data frames; what goes wrong is told in one line."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ppl_bnn.errors import FileError, UserError, some


def read_frame(path: Path, kind: str, options: dict[str, Any], *, setting: str) -> pd.DataFrame:
    """Read a file of the kind ``csv`` or ``parquet``.

    Args:
        options: keyword arguments of pandas' reader.
        setting: that names the file, for messages.

    Raises:
        FileError: a file that is not there, is empty, larger than the memory, or not of this kind.
        UserError: options that pandas does not take.
    """
    what = f"{setting} {path}"
    if not path.is_file():
        raise FileError(f"{what} is not a file" if path.exists() else f"{what} is not there")
    if options.keys() & {"chunksize", "iterator"}:
        raise UserError("data.options must let pandas' reader give one table: leave out chunksize and iterator")
    try:
        _check_size(path, kind, what)
        frame = pd.read_csv(path, **_whole(options)) if kind == "csv" else pd.read_parquet(path, **options)
    except ImportError:
        raise UserError("data.name parquet needs pyarrow: pip install 'ppl_bnn[parquet]'") from None
    except TypeError as error:
        raise UserError(f"data.options are not understood by pandas' reader of {kind}: {error}") from None
    except pd.errors.EmptyDataError:
        raise FileError(f"{what} is empty: it needs a line of column names, and rows") from None
    except UnicodeDecodeError as error:
        raise FileError(
            f"{what} is not {error.encoding} text: name its encoding, as in data.options {{encoding: latin-1}}"
        ) from None
    except (OSError, ValueError) as error:
        raise FileError(f"{what} cannot be read as {kind}: {_first_line(error)}") from None
    frame.columns = frame.columns.map(str)
    if twice := frame.columns[frame.columns.duplicated()].tolist():
        raise FileError(f"{what} has two columns of the name {twice[0]!r}")
    if len(frame) == 0:
        raise FileError(f"{what} has no rows, only the columns {some(frame.columns)}")
    if len(frame.columns) == 1 and (marks := [mark for mark in (";", "\t", "|") if mark in frame.columns[0]]):
        raise FileError(
            f"{what} has one column alone, {frame.columns[0]!r:.60}: name its separator, as in data.options "
            f"{{sep: {marks[0]!r}}}"
        )
    return frame


def _whole(options: dict[str, Any]) -> dict[str, Any]:
    """Options by which pandas' fast reader sees a column as a whole: else each part of a long one has its own type."""
    fast = "engine" not in options and len(str(options.get("sep", ","))) == 1
    return {"low_memory": False, **options} if fast else options


def missing_column(name: str, known: Iterable[str], *, setting: str, what: str = "column") -> UserError:
    """The error for a name of none of the columns (or arrays), with the most similar one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"there are {some(known, 12)}"
    # A file needs a column that another setting names.
    which = ", which" if setting.endswith(" needs") else ""
    return UserError(f"{setting} {name!r}{which} is no {what} of the file: {advice}")


def _check_size(path: Path, kind: str, what: str) -> None:
    size = path.stat().st_size if kind == "csv" else _parquet_size(path)
    if size > (free := _free_memory()):
        raise FileError(
            f"{what} has {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free: write it as arrays for "
            "data.name h5 or npz (a folder of .npy), which are read batch by batch"
        )


def _parquet_size(path: Path) -> int:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        about = file.metadata
        return sum(about.row_group(at).total_byte_size for at in range(about.num_row_groups))


def _free_memory() -> int:
    """Bytes of memory that are free, or that the system can free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
