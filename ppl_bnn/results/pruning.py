"""A pruning sweep as ArviZ InferenceData: `pruning.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ppl_bnn.data import Images
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.pruning import snr
from ppl_bnn.pruning.sweep import Level
from ppl_bnn.results.idata import assemble, data_groups, dataset, sampled_labels
from ppl_bnn.results.predictive import layers


def sweep_to_inference_data(
    levels: Sequence[Level],
    images: Images,
    *,
    guide: Posterior,
    save_snr: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a pruning sweep as InferenceData with a dimension `level`.

    Groups: `posterior_predictive` (probs [chain, draw, level, obs_id, class] of the kept images, and sampled labels y
    [chain, draw, level, obs_id]), `observed_data`
    and `constant_data` of all images, `layers` of the unpruned posterior, and `pruning`: per level threshold,
    pruned_fraction, nonzero in total and by layer, accuracy, nll, ece, brier, seconds, mean_probs
    [level, image, class], and total, aleatoric and epistemic uncertainty [level, image], nats.

    Args:
        guide: the unpruned posterior.
        save_snr: with a group `snr`, too: a variable for each site, of its shape, with |loc| / scale of every weight of
            the unpruned posterior.
    """
    first = levels[0]
    kept, sites = first.predictive.kept.numpy(), list(first.pruned.nonzero)
    probs = torch.stack([level.predictive.probs for level in levels], 1)[None]
    sampled = torch.stack([sampled_labels(level.predictive.probs, 0) for level in levels], 1)[None]
    summaries = [level.predictive.summary() for level in levels]
    by_level = {name: (("level",), np.array([row[name] for row in summaries])) for name in summaries[0]}
    nonzero = np.array([[level.pruned.nonzero[site] for site in sites] for level in levels])
    uncertainties = [
        torch.stack(values) for values in zip(*(level.predictive.uncertainties() for level in levels), strict=True)
    ]
    pruning = {
        **by_level,
        "threshold": (("level",), np.array([level.pruned.threshold for level in levels])),
        "pruned_fraction": (("level",), np.array([level.pruned.fraction for level in levels])),
        "nonzero": (("level",), nonzero.sum(1)),
        "nonzero_by_layer": (("level", "layer"), nonzero),
        "weights_by_layer": (("layer",), np.array([first.pruned.total[site] for site in sites])),
        "mean_probs": (
            ("level", "image", "class"),
            torch.stack([level.predictive.mean_probs for level in levels]).float(),
        ),
        **{
            name: (("level", "image"), values)
            for name, values in zip(("total", "aleatoric", "epistemic"), uncertainties, strict=True)
        },
    }
    coords = {"level": np.arange(len(levels)), "class": list(images.classes)}
    groups = {
        "posterior_predictive": dataset(
            {
                "probs": (("chain", "draw", "level", "obs_id", "class"), probs),
                "y": (("chain", "draw", "level", "obs_id"), sampled),
            },
            **coords,
            obs_id=kept,
        ),
        **data_groups(images),
        "layers": layers(guide, {}),
        "pruning": dataset(pruning, **coords, layer=sites, image=np.arange(len(images))),
    }
    if save_snr:
        groups["snr"] = dataset(
            {
                site: (tuple(f"{site}_dim_{axis}" for axis in range(ratio.dim())), ratio)
                for site, ratio in snr(guide).items()
            }
        )
    return assemble(groups, {"title": images.title, **(attrs or {})})
