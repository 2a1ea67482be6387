"""What results are made of: groups of arrays, read and assembled as ArviZ holds them. The only file that imports ArviZ.

ArviZ 0.x holds an InferenceData, ArviZ 1.x an xarray DataTree of the same groups. The files open in both.
"""

import importlib.metadata
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn.data import Images
from ppl_bnn.errors import UserError
from ppl_bnn.results.netcdf import groups_of, readable

INTERVAL = np.array([0.05, 0.95])
# The smallest standard deviation of a density's kernels: a peak at 1 is then some pixels wide in a panel.
NARROWEST = 0.01


def load(path: Path) -> Any:
    """Read a result whole, as the installed ArviZ holds it.

    Raises:
        FileError: missing, truncated or not such a file.
    """
    with readable(path), xr.open_datatree(path, engine="h5netcdf") as tree:
        tree.load()
    return assemble(groups_of(tree), {str(name): value for name, value in tree.attrs.items()})


def draws_of(groups: Mapping[str, xr.Dataset], image: int) -> np.ndarray:
    """One image's draws of each class's probability, [class, draw]. With a tolerance, images differ in number."""
    probs = groups["posterior_predictive"]["probs"].sel(obs_id=image).transpose("class", "chain", "draw").values
    drawn = probs.reshape(len(probs), -1)
    return drawn[:, ~np.isnan(drawn[0])]


def draws_in(groups: Mapping[str, xr.Dataset]) -> int:
    """The number of draws, of all chains together."""
    sizes = groups["posterior_predictive"].sizes
    return int(sizes["draw"] * sizes.get("chain", 1))


def density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kernel density estimate of values in [0, 1]: (grid, density), the density's mass all within [0, 1].

    ArviZ's estimate with ArviZ's bandwidth where that is at least `NARROWEST`. Where it is less, because the values
    agree, the kernels are normal with that standard deviation, reflected at 0 and 1: a peak is drawn no narrower.
    """
    if np.ptp(values) >= 1e-6:
        # ArviZ 1.x always returns the bandwidth. Where most values are equal, it is 0.
        option = {} if _arviz_version() >= (1,) else {"bw_return": True}
        with np.errstate(divide="ignore", invalid="ignore"):
            grid, pdf, bandwidth = _arviz().kde(values, bound_correction=True, custom_lims=(0, 1), **option)
        if bandwidth >= NARROWEST and np.isfinite(pdf).all():
            return grid, pdf
    grid, kernels = _narrowest_kernels()
    places = np.rint(np.clip(values, 0, 1) * (len(grid) - 1)).astype(int)
    return grid, np.bincount(places, minlength=len(grid)) @ kernels / len(values)


@cache
def _narrowest_kernels() -> tuple[np.ndarray, np.ndarray]:
    """A grid over [0, 1] and a normal density around each of its points, [point, grid], reflected at 0 and 1."""
    grid = np.linspace(0, 1, 513)
    distances = grid[:, None, None] - np.stack([grid, -grid, 2 - grid])
    kernels = np.exp(-0.5 * (distances / NARROWEST) ** 2).sum(1) / (NARROWEST * math.sqrt(2 * math.pi))
    return grid, kernels


def sampled_labels(probs: Tensor, seed: int) -> Tensor:
    """One label drawn from each draw's probabilities [S, N, ..., C], [S, N, ...]; -1 where there is no such draw."""
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.empty(probs.shape[:-1], dtype=torch.int16)
    # One draw at a time: all at once would hold a second copy of the probabilities.
    for s, draw in enumerate(probs):
        uniform = torch.rand(*draw.shape[:-1], 1, generator=generator)
        sampled[s] = (draw.cumsum(-1) < uniform).sum(-1).clamp_max(probs.shape[-1] - 1)
        # An example that has no such draw has no label of it.
        sampled[s][draw.isnan().any(-1)] = -1
    return sampled


def spread(
    probs: np.ndarray, kept: np.ndarray, num_examples: int, dims: Sequence[str] = ("obs_id", "class")
) -> dict[str, Any]:
    """Standard deviation and interval over draws [S, K, ...] of the examples `kept` [K]; NaN for the others.

    Args:
        dims: names of the dimensions [N, ...].
    """
    std = np.full((num_examples, *probs.shape[2:]), np.nan, np.float32)
    interval = np.full((*std.shape, 2), np.nan, np.float32)
    # In parts: the quantiles sort a copy of the draws.
    for part in np.array_split(np.arange(len(kept)), max(1, probs.size // 10_000_000)):
        drawn = probs[:, part]
        # Where examples have draws of their own number, the missing ones are NaN.
        std_of, quantile_of = (np.nanstd, np.nanquantile) if np.isnan(drawn).any() else (np.std, np.quantile)
        std[kept[part]] = std_of(drawn, axis=0)
        interval[kept[part]] = np.moveaxis(quantile_of(drawn, INTERVAL, axis=0), 0, -1)
    return {"std_probs": (tuple(dims), std), "interval": ((*dims, "quantile"), interval)}


def data_groups(images: Images) -> dict[str, xr.Dataset]:
    """`observed_data` and `constant_data`: labels, and images (or x of another shape) with their place in the data."""
    obs = np.arange(len(images))
    if images.pixels.dim() == 4:
        constant = dataset({"image": (("obs_id", "channel", "height", "width"), images.pixels)})
    else:
        constant = input_group(images.pixels)
    constant = constant.assign_coords(obs_id=obs).assign(
        image_index=("obs_id", obs), split=("obs_id", np.full(len(images), images.split))
    )
    return {"observed_data": dataset({"y": (("obs_id",), images.labels)}, obs_id=obs), "constant_data": constant}


def input_group(x: Tensor, feature_names: Sequence[str] | None = None) -> xr.Dataset:
    """`constant_data` of inputs [N, ...]: x (obs_id, x_dim_0, ...).

    Args:
        feature_names: coordinates of the last dimension; numbers from 0 unless given.

    Raises:
        UserError: another number of names.
    """
    made = with_coordinates(dataset({"x": (dims_of(x, "x"), x.detach())}))
    if feature_names is None:
        return made
    if x.dim() < 2 or len(feature_names) != x.shape[-1]:
        raise UserError(
            f"feature_names must name each of the {x.shape[-1] if x.dim() > 1 else 1} columns of x "
            f"{list(x.shape)}, got {len(feature_names)} names: pass one a column of x [N, ..., columns]"
        )
    return made.assign_coords({made["x"].dims[-1]: list(feature_names)})


def dims_of(values: Tensor | np.ndarray, name: str) -> tuple[str, ...]:
    """Names of the dimensions of values by example, [N, ...], as ArviZ gives them: obs_id, <name>_dim_0, ..."""
    return ("obs_id", *(f"{name}_dim_{at}" for at in range(len(values.shape) - 1)))


def with_coordinates(data: xr.Dataset) -> xr.Dataset:
    """With coordinates 0, 1, ... for the dimensions that have none: some functions of ArviZ 0.23 need them."""
    return data.assign_coords({d: np.arange(size) for d, size in data.sizes.items() if d not in data.coords})


def dataset(variables: Mapping[str, Any], **coords: Any) -> xr.Dataset:
    """Variables, {name: (dimensions, values)}, with their coordinates."""
    arrays = {
        name: (dims, values.cpu().numpy() if isinstance(values, Tensor) else values)
        for name, (dims, values) in variables.items()
    }
    made = xr.Dataset(arrays, coords=coords)
    # ArviZ expects chain and draw to have coordinates.
    return made.assign_coords({d: np.arange(made.sizes[d]) for d in ("chain", "draw") if d in made.dims})


def assemble(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> Any:
    """Groups and attributes as the installed ArviZ holds them: InferenceData in ArviZ 0.x, a DataTree in ArviZ 1.x."""
    # Not by what ArviZ has: in 1.x InferenceData is another name of DataTree.
    if _arviz_version() < (1,):
        return _arviz().InferenceData(**groups, attrs=dict(attrs), warn_on_custom_groups=False)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def _arviz_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("arviz"))[:2])


@cache
def _arviz() -> ModuleType:
    """ArviZ, imported at first use: it takes seconds, and training needs none of it."""
    # ArviZ 1.x logs the packages that it is made of.
    logger = logging.getLogger("arviz")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # ArviZ 0.23 announces its own refactoring once a day.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    finally:
        logger.setLevel(before)
    return arviz
