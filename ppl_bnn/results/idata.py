"""A posterior predictive as ArviZ InferenceData: `predictive.nc`. The only file that knows ArviZ.

ArviZ 0.x holds an InferenceData, ArviZ 1.x an xarray DataTree of the same groups; the files open in both.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn.data import Images
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.prediction.predictive import Predictive
from ppl_bnn.pruning.ratios import snr, snr_histogram
from ppl_bnn.results.netcdf import groups_of, readable
from ppl_bnn.results.saved_draws import how_drawn, monte_carlo

with warnings.catch_warnings():
    # ArviZ 0.23 announces its own refactoring at every import.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

_QUANTILES = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
_INTERVAL = np.array([0.05, 0.95])


def to_inference_data(
    predictive: Predictive,
    images: Images,
    *,
    guide: MeanFieldNormal | None = None,
    kl: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, float]] = (),
    attrs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Return the posterior predictive as InferenceData.

    Groups: `posterior_predictive` (probs [chain, draw, obs_id, class] and sampled labels y [chain, draw, obs_id]),
    `log_likelihood` (y, nats), `observed_data` (y), `constant_data` (image, image_index, split), `sample_stats`
    (each draw's own accuracy and nll), and beside ArviZ's schema `uncertainty` (mean_probs, their standard deviation
    std_probs and 90% interval over the draws, and the total, aleatoric and epistemic uncertainty of each image, nats),
    `monte_carlo` (`ppl_bnn.results.saved_draws`), `layers` (snr quantiles and histogram, KL) and `training` (one entry an epoch).
    The interval is equal-tailed: the draws' 5% and 95% quantiles. chain is the training run, draw the Monte Carlo
    draw.

    Args:
        images: the images `predictive` was made of, in its order.
        guide, kl: the posterior and its KL by site (`ppl_bnn.inference.elbo.kl_by_site`), for `layers`.
        history: what `fit` returned, for `training`.
        attrs: numbers and texts about the run, kept with the file.
        seed: of the sampled labels.

    Raises:
        ValueError: `images` and `predictive` differ in number.
    """
    if len(images) != len(predictive.labels):
        raise ValueError(f"the predictive is of {len(predictive.labels)} images, got {len(images)}")
    total, aleatoric, epistemic = predictive.uncertainties()
    of_draws = predictive.kept.numpy()[: 0 if predictive.method == "moments" else None]
    obs = np.arange(len(images))
    coords = {"obs_id": obs, "class": list(images.classes)}
    by_image = ("obs_id",)
    groups = {
        "posterior_predictive": _draws(predictive, images.classes, seed),
        "log_likelihood": dataset({"y": (("chain", "draw", "obs_id"), predictive.log_likelihood[None])}, obs_id=obs),
        "sample_stats": dataset(
            {
                "accuracy": (("chain", "draw"), predictive.accuracies[None]),
                "nll": (("chain", "draw"), -predictive.log_likelihood.mean(1)[None]),
            }
        ),
        **data_groups(images),
        "uncertainty": dataset(
            {
                "mean_probs": (("obs_id", "class"), predictive.mean_probs.float()),
                **spread(predictive.probs.numpy(), of_draws, len(images)),
                "total": (by_image, total),
                "aleatoric": (by_image, aleatoric),
                "epistemic": (by_image, epistemic),
            },
            **coords,
            quantile=_INTERVAL,
        ),
        "monte_carlo": monte_carlo(predictive),
    }
    if guide is not None and guide.sites:
        groups["layers"] = layers(guide, kl or {})
    if history:
        columns = {
            name: (("epoch",), np.array([row[name] for row in history])) for name in history[0] if name != "epoch"
        }
        groups["training"] = dataset(columns, epoch=[int(row["epoch"]) for row in history])
    return assemble(groups, {"title": images.title, **predictive.summary(), **how_drawn(predictive), **(attrs or {})})


def load(path: Path) -> Any:
    """Open a result as ArviZ does, whole and in memory.

    Raises:
        FileError: missing, truncated or not such a file.
    """
    with readable(path):
        idata = az.from_netcdf(str(path), engine="h5netcdf")
        for group in groups_of(idata).values():
            group.load()
            group.close()
    return idata


def draws_of(groups: Mapping[str, xr.Dataset], image: int) -> np.ndarray:
    """The draws that one image has of each class's softmax, [class, draw]; with a tolerance images differ in number."""
    probs = groups["posterior_predictive"]["probs"].sel(obs_id=image).transpose("class", "chain", "draw").values
    drawn = probs.reshape(len(probs), -1)
    return drawn[:, ~np.isnan(drawn[0])]


def draws_in(groups: Mapping[str, xr.Dataset]) -> int:
    """The number of draws, of all chains together."""
    sizes = groups["posterior_predictive"].sizes
    return int(sizes["draw"] * sizes.get("chain", 1))


def density(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's kernel density estimate of values in [0, 1]: (grid, density).

    A narrow peak at their mean where all or most of the values are equal, or too close to each other for its grid.
    """
    if np.ptp(values) >= 1e-6:
        # Where most values are equal, ArviZ's bandwidth is 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            grid, pdf = _kde(values)
        if np.isfinite(pdf).all() and pdf.max() > 0:
            return grid, pdf
    return values.mean() + np.array([-0.004, 0.0, 0.004]), np.array([0.0, 250.0, 0.0])


def _kde(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(az, "kde"):
        return az.kde(values, bound_correction=True, custom_lims=(0, 1))
    from arviz_stats.base import array_stats

    grid, pdf, _ = array_stats.kde(values, bound_correction=True, custom_lims=(0, 1))
    return grid, pdf


def _draws(predictive: Predictive, classes: Sequence[str], seed: int) -> xr.Dataset:
    variables: dict[str, Any] = {
        "probs": (("chain", "draw", "obs_id", "class"), predictive.probs[None]),
        "y": (("chain", "draw", "obs_id"), sampled_labels(predictive.probs, seed)[None]),
    }
    return dataset(variables, obs_id=predictive.kept.numpy(), **{"class": list(classes)})


def sampled_labels(probs: Tensor, seed: int) -> Tensor:
    """One label drawn from each draw's probabilities [S, N, C], [S, N]; -1 where an example has no such draw."""
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.empty(probs.shape[:2], dtype=torch.int16)
    # One draw at a time: all at once would hold a second copy of the probabilities.
    for s, draw in enumerate(probs):
        uniform = torch.rand(len(draw), 1, generator=generator)
        sampled[s] = (draw.cumsum(1) < uniform).sum(1).clamp_max(probs.shape[2] - 1)
        # An example that has no such draw has no label of it.
        sampled[s][draw.isnan().any(1)] = -1
    return sampled


def spread(probs: np.ndarray, kept: np.ndarray, num_images: int) -> dict[str, Any]:
    """Standard deviation and interval over draws [S, K, C] of the images `kept` [K]; NaN for the other images."""
    std = np.full((num_images, probs.shape[2]), np.nan, np.float32)
    interval = np.full((*std.shape, 2), np.nan, np.float32)
    # In parts: the quantiles sort a copy of the draws.
    for part in np.array_split(np.arange(len(kept)), max(1, probs.size // 10_000_000)):
        drawn = probs[:, part]
        # Where images have draws of their own number, the missing ones are NaN.
        std_of, quantile_of = (np.nanstd, np.nanquantile) if np.isnan(drawn).any() else (np.std, np.quantile)
        std[kept[part]] = std_of(drawn, axis=0)
        interval[kept[part]] = np.moveaxis(quantile_of(drawn, _INTERVAL, axis=0), 0, -1)
    return {"std_probs": (("obs_id", "class"), std), "interval": (("obs_id", "class", "quantile"), interval)}


def data_groups(images: Images) -> dict[str, xr.Dataset]:
    """`observed_data` and `constant_data`: labels, and images with their place in the data set."""
    obs = np.arange(len(images))
    dims = ("obs_id", "channel", "height", "width")
    constant = {
        "image": (dims, images.pixels),
        "image_index": (("obs_id",), obs),
        "split": (("obs_id",), np.full(len(images), images.split)),
    }
    return {
        "observed_data": dataset({"y": (("obs_id",), images.labels)}, obs_id=obs),
        "constant_data": dataset(constant, obs_id=obs),
    }


def layers(guide: MeanFieldNormal, kl: Mapping[str, float]) -> xr.Dataset:
    """`layers`: quantiles and histogram of each layer's signal-to-noise ratio, and its KL in nats."""
    ratios = snr(guide)
    edges, counts = snr_histogram(ratios)
    middle = (edges[:-1] + edges[1:]) / 2
    quantiles = np.stack([np.quantile(ratio.cpu().numpy(), _QUANTILES) for ratio in ratios.values()])
    variables: dict[str, Any] = {
        "snr_quantile": (("layer", "quantile"), quantiles),
        "snr_histogram": (("layer", "log10_snr"), torch.stack(list(counts.values()))),
        "network_snr_quantile": (
            ("quantile",),
            np.quantile(torch.cat([ratio.flatten() for ratio in ratios.values()]).cpu().numpy(), _QUANTILES),
        ),
    }
    if kl:
        variables["kl"] = (("layer",), np.array([kl[site] for site in ratios]))
    return dataset(variables, layer=list(ratios), quantile=_QUANTILES, log10_snr=middle.numpy())


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
    """Groups and attributes as whatever the installed ArviZ works with."""
    if hasattr(az, "InferenceData"):
        return az.InferenceData(**groups, attrs=dict(attrs), warn_on_custom_groups=False)
    tree = xr.DataTree.from_dict(dict(groups))
    tree.attrs = dict(attrs)
    return tree
