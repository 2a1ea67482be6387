"""A pruning sweep as ArviZ InferenceData: `pruning.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ppl_bnn.data import Split
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.pruning import snr
from ppl_bnn.pruning.sweep import Level
from ppl_bnn.results.drawn import drawn_group, name_of, uncertainty_group
from ppl_bnn.results.idata import assemble, dataset
from ppl_bnn.results.predictive import class_names, data_groups_of, layers
from ppl_bnn.results.told import told


def sweep_to_inference_data(
    levels: Sequence[Level],
    data: Split | None = None,
    *,
    guide: Posterior,
    x: Tensor | np.ndarray | None = None,
    feature_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    save_snr: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a pruning sweep as InferenceData with a dimension `level`.

    Groups: `posterior_predictive` of the kept examples (as of `to_inference_data`, [chain, draw, level, obs_id, ...]),
    `observed_data` and `constant_data` of all examples, `layers` of the unpruned posterior, and `pruning`: per level
    threshold, pruned_fraction, nonzero in total and by layer, the likelihood's scores (classes: accuracy, nll, ece,
    brier), seconds, mean_probs [level, image, class] (numbers: mean [level, image, ...]), and total, aleatoric and
    epistemic uncertainty [level, image, ...] in the likelihood's units.

    Args:
        guide: the unpruned posterior.
        data, x, feature_names, classes: as in `to_inference_data`.
        save_snr: with a group `snr`, too: a variable for each site, of its shape, with |loc| / scale of every weight of
            the unpruned posterior.

    Raises:
        UserError: `data` or `x` are not of the examples of the sweep.
    """
    first = levels[0]
    of_data = told(first.predictive, data, x, feature_names, classes, attrs)
    names = class_names(first.predictive, of_data.names)
    sites = list(first.pruned.nonzero)
    drawn = [drawn_group(level.predictive, names, 0) for level in levels]
    by_draw: dict[str, Any] = {
        str(name): (("chain", "draw", "level", *part.dims[2:]), np.stack([one[name].values for one in drawn], 2))
        for name, part in drawn[0].data_vars.items()
    }
    summaries = [level.predictive.summary() for level in levels]
    nonzero = np.array([[level.pruned.nonzero[site] for site in sites] for level in levels])
    pruning: dict[str, Any] = {
        **{name: (("level",), np.array([row[name] for row in summaries])) for name in summaries[0]},
        "threshold": (("level",), np.array([level.pruned.threshold for level in levels])),
        "pruned_fraction": (("level",), np.array([level.pruned.fraction for level in levels])),
        "nonzero": (("level",), nonzero.sum(1)),
        "nonzero_by_layer": (("level", "layer"), nonzero),
        "weights_by_layer": (("layer",), np.array([first.pruned.total[site] for site in sites])),
    }
    examples = [uncertainty_group(level.predictive, names) for level in levels]
    for name in ("mean_probs", "mean", "total", "aleatoric", "epistemic"):
        if name in examples[0]:
            by_level = ("level", "image", *examples[0][name].dims[1:])
            pruning[name] = (by_level, np.stack([one[name].values for one in examples]))
    coords: dict[str, Any] = {"level": np.arange(len(levels)), **({"class": names} if names else {})}
    groups = {
        "posterior_predictive": dataset(by_draw, **coords, obs_id=first.predictive.kept.numpy()),
        **data_groups_of(first.predictive, of_data),
        "layers": layers(guide, {}),
        "pruning": dataset(pruning, **coords, layer=sites, image=np.arange(len(first.predictive.draws))),
    }
    if save_snr:
        groups["snr"] = dataset(
            {
                site: (tuple(f"{site}_dim_{axis}" for axis in range(ratio.dim())), ratio)
                for site, ratio in snr(guide).items()
            }
        )
    how = {"likelihood": name_of(first.predictive.likelihood), "units": first.predictive.likelihood.units}
    return assemble(groups, {**how, **of_data.attrs})
