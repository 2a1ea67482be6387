"""A posterior predictive as ArviZ InferenceData: `predictive.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from ppl_bnn.data import Images
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, is_pruned
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.pruning import snr, snr_histogram
from ppl_bnn.results.idata import INTERVAL, assemble, data_groups, dataset, sampled_labels, spread
from ppl_bnn.results.saved_draws import how_drawn, monte_carlo

_QUANTILES = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])


def to_inference_data(
    predictive: Predictive,
    images: Images,
    *,
    guide: Posterior | None = None,
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
    `monte_carlo` (the sums behind it), `layers` (snr quantiles and histogram, KL) and `training` (one entry an epoch).
    The interval is equal-tailed: the draws' 5% and 95% quantiles. chain is the training run, draw the Monte Carlo
    draw.

    Args:
        images: the images `predictive` was made of, in its order.
        guide, kl: the posterior and its KL by site (`ppl_bnn.inference.elbo.kl_by_site`), for `layers`. The group is
            left out for a posterior without signal-to-noise ratios: one without `loc_scale`, or a pruned one.
        history: what `fit` returned, for `training`.
        attrs: numbers and texts about the run, kept with the file.
        seed: of the sampled labels.

    Raises:
        UserError: `images` and `predictive` differ in number.
    """
    if len(images) != len(predictive.labels):
        raise UserError(f"the predictive has {len(predictive.labels)} images, got {len(images)}")
    if not torch.equal(images.labels.cpu().long(), predictive.labels.long()):
        raise UserError("images must be those that the predictive was made of, in its order; their labels differ")
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
            quantile=INTERVAL,
        ),
        "monte_carlo": monte_carlo(predictive),
    }
    if isinstance(guide, Factorized) and not is_pruned(guide) and guide.sites:
        groups["layers"] = layers(guide, kl or {})
    if history:
        columns = {
            name: (("epoch",), np.array([row[name] for row in history])) for name in history[0] if name != "epoch"
        }
        groups["training"] = dataset(columns, epoch=[int(row["epoch"]) for row in history])
    return assemble(groups, {"title": images.title, **predictive.summary(), **how_drawn(predictive), **(attrs or {})})


def _draws(predictive: Predictive, classes: Sequence[str], seed: int) -> xr.Dataset:
    variables: dict[str, Any] = {
        "probs": (("chain", "draw", "obs_id", "class"), predictive.probs[None]),
        "y": (("chain", "draw", "obs_id"), sampled_labels(predictive.probs, seed)[None]),
    }
    return dataset(variables, obs_id=predictive.kept.numpy(), **{"class": list(classes)})


def layers(guide: Posterior, kl: Mapping[str, float]) -> xr.Dataset:
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
