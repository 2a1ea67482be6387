"""Results in netCDF: written whole and compressed, read whole or by group. A damaged file is named in the error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5netcdf
import h5py
import numpy as np

from ppl_bnn.errors import FileError
from ppl_bnn.files import written_atomically

if TYPE_CHECKING:
    # Imported in the functions: it takes a second, and a finished run reads no more than attributes.
    import xarray as xr

# A probability in steps of 1/65534 takes half the room of a float32; 65535 stands for NaN.
_PACKED = {"dtype": "uint16", "scale_factor": np.float32(1 / 65534), "_FillValue": np.uint16(65535)}
# Groups beside ArviZ's schema. ArviZ 0.23 joins results by chain only if all their variables have that dimension.
BY_CHAIN = ("uncertainty", "monte_carlo", "layers", "training")


def save(idata: Any, path: Path) -> None:
    """Write an InferenceData atomically as compressed netCDF; attributes that are not text or number become JSON.

    Raises:
        OSError: it could not be written; a file that was there is as before.
    """
    import xarray as xr

    attrs = {
        name: value
        if isinstance(value, str | int | float | np.generic)
        else f"json:{json.dumps(value, default=_plain)}"
        for name, value in idata.attrs.items()
    }
    groups = _all_groups(idata)
    encoding = {f"/{name}": {var: _encoding(data[var]) for var in data.data_vars} for name, data in groups.items()}
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})
    # Made in memory first: where a disk fills up under HDF5, it brings the process down on its way out.
    content = tree.to_netcdf(None, engine="h5netcdf", encoding=encoding)
    with written_atomically(path) as temporary:
        temporary.write_bytes(content)


def read_attrs(path: Path) -> dict[str, Any]:
    """Only the attributes of a result, JSON decoded. Raises FileError for a file that is missing or damaged."""
    with readable(path), h5netcdf.File(path, "r") as root:
        return {name: _decoded(value) for name, value in root.attrs.items()}


def read_group(path: Path, name: str) -> "xr.Dataset | None":
    """Only one group of a result, or None if it has no such group. Raises FileError as `read_attrs` does."""
    import xarray as xr

    with readable(path):
        with h5py.File(path) as file:
            if name not in file:
                return None
        with xr.open_dataset(path, engine="h5netcdf", group=name) as dataset:
            return _of_one_chain(name, dataset.load())


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error while reading a result into a FileError that names the file."""
    if not path.exists():
        raise FileError(f"{path} is not there; run the stage that writes it first")
    try:
        yield
    except PermissionError:
        raise FileError(f"{path} cannot be read: permission denied") from None
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path} is truncated or not a netCDF result ({reason}); delete it and run its stage again"
        raise FileError(message) from None


def groups_of(idata: Any) -> "dict[str, xr.Dataset]":
    """The groups of an InferenceData or a DataTree as {name: Dataset}; those of `BY_CHAIN` without a chain of 1."""
    return {name: _of_one_chain(name, data) for name, data in _all_groups(idata).items()}


def _all_groups(idata: Any) -> "dict[str, xr.Dataset]":
    import xarray as xr

    if isinstance(idata, xr.DataTree):
        return {str(name): node.to_dataset() for name, node in idata.children.items()}
    return {name: idata[name] for name in idata.groups()}


def _of_one_chain(name: str, data: "xr.Dataset") -> "xr.Dataset":
    return data.isel(chain=0, drop=True) if name in BY_CHAIN and data.sizes.get("chain") == 1 else data


def _encoding(variable: "xr.DataArray") -> dict[str, Any]:
    if variable.name == "probs":
        return {**_PACKED, "zlib": True, "complevel": 1}
    if variable.dtype.kind in "OU" or variable.size < 1000:
        return {}
    encoding: dict[str, Any] = {"zlib": True, "complevel": 1}
    # Sums over all weights of a draw, or over all draws, stay in double precision: their differences count.
    if variable.dtype.kind == "f" and "exact" not in variable.attrs and variable.dims != ("chain", "draw"):
        encoding["dtype"] = "float32"
    return encoding


def _plain(value: Any) -> Any:
    # Numbers of numpy, which ArviZ collects in a list where it joins results.
    return value.item() if isinstance(value, np.generic) else str(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("json:"):
        return json.loads(value.removeprefix("json:"))
    return value.item() if isinstance(value, np.generic) else value
