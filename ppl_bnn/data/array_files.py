"""Arrays by name, of npz, npy, h5 and torch files; those that can stay in their file are not read here."""

import logging
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ppl_bnn.errors import FileError

log = logging.getLogger(__name__)


def read_arrays(path: Path, kind: str, *, setting: str) -> dict[str, Any]:
    """The arrays of a file of the kind ``npz`` (or a folder of .npy files), ``h5`` or ``torch``.

    Arrays of .npy files, uncompressed members of an npz, and data sets of an h5 file stay on disk until they are
    indexed. Compressed members are read into memory.

    Args:
        setting: that names the file, for messages.

    Raises:
        FileError: a file that is not there, is not of this kind, or has no arrays.
    """
    what = f"{setting} {path}"
    if not path.exists():
        raise FileError(f"{what} is not there")
    read = {"npz": _npy_folder if path.is_dir() else _npz, "h5": _h5, "torch": _torch}[kind]
    try:
        arrays = read(path)
    except FileError:
        raise
    except Exception as error:
        # Each library has errors of its own for a file of another kind, or a damaged one.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise FileError(f"{what} cannot be read as {kind}: {lines[0] if lines else type(error).__name__}") from error
    if not arrays:
        raise FileError(f"{what} has no arrays")
    return arrays


def _npy_folder(path: Path) -> dict[str, Any]:
    return {
        file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(path.iterdir())
        if file.suffix == ".npy"
    }  # fmt: skip


def _npz(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        raise FileError(f"data.file {path} is one array: give a folder with x.npy and y.npy, or an npz with x and y")
    found: dict[str, Any] = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            stored = _mapped(file, path, member) if member.compress_type == zipfile.ZIP_STORED else None
            if stored is None:
                if member.file_size > 2**30:
                    log.info("data: %s of %s is compressed: reading all of it into memory", name, path.name)
                with archive.open(member) as stream:
                    stored = np.lib.format.read_array(stream, allow_pickle=False)
            found[name] = stored
    return found


def _mapped(file: BinaryIO, path: Path, member: zipfile.ZipInfo) -> Any:
    """An uncompressed member as memory-mapped array; None where numpy has no public reader of its header."""
    # The local header: 26 bytes, then the lengths of its name and of an extra field.
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        return None
    shape, in_columns, dtype = readers[version](file)
    if dtype.hasobject or 0 in shape:
        return None
    order = "F" if in_columns else "C"
    return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape, order=order)  # type: ignore[call-overload]


def _h5(path: Path) -> dict[str, Any]:
    import h5py

    # It stays open for the data sets, which are read later.
    file = h5py.File(path, "r")
    found = {name: part for name, part in file.items() if isinstance(part, h5py.Dataset) and part.shape}
    return {name: part.asstr()[:] if h5py.check_string_dtype(part.dtype) else part for name, part in found.items()}


def _torch(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it must hold a dict of tensors alone, such as x and y") from None
    if not isinstance(content, dict) or not all(isinstance(part, torch.Tensor) for part in content.values()):
        raise FileError(
            f"data.file {path} must hold a dict of tensors, such as x and y, got a {type(content).__name__}"
        )
    # numpy has no bfloat16.
    tensors = {name: part.float() if part.dtype == torch.bfloat16 else part for name, part in content.items()}
    return {str(name): part.detach().numpy() for name, part in tensors.items()}
