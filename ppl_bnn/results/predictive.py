"""A posterior predictive as ArviZ InferenceData: `predictive.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn.data import Split
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, is_pruned
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.pruning import snr, snr_histogram
from ppl_bnn.results.drawn import drawn_group, has_classes, observed_group, uncertainty_group
from ppl_bnn.results.idata import assemble, data_groups, dataset, input_group, with_coordinates
from ppl_bnn.results.netcdf import BY_CHAIN
from ppl_bnn.results.posterior import posterior_group
from ppl_bnn.results.saved_draws import how_drawn, monte_carlo
from ppl_bnn.results.told import Told, told

_QUANTILES = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])


def to_inference_data(
    predictive: Predictive,
    data: Split | None = None,
    *,
    x: Tensor | np.ndarray | None = None,
    feature_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    guide: Posterior | None = None,
    kl: Mapping[str, float] | None = None,
    norms: bool = True,
    history: Sequence[Mapping[str, float]] = (),
    attrs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Return the posterior predictive as InferenceData. chain is the training run, draw the Monte Carlo draw.

    ArviZ's groups, all with y of any shape (obs_id, y_dim_0, ...):

    - `posterior`, with a `guide`: what `ppl_bnn.results.posterior.posterior_group` says;
    - `posterior_predictive`: class probabilities probs [chain, draw, obs_id, class] and labels y sampled from them; for
      numbers E[y | draw], mean, and the drawn y;
    - `log_likelihood` (y of each example [chain, draw, obs_id], nats), unless it was not kept;
    - `sample_stats`: each draw's own accuracy (numbers: score, minus the mean squared error) and nll;
    - `observed_data` (y) and `constant_data` (images: image, image_index, split; otherwise x).

    Beside them: `uncertainty` (`ppl_bnn.results.drawn.uncertainty_group`), `monte_carlo` (the sums behind it),
    `layers` (snr quantiles and histogram, KL) and `training` (one entry an epoch). All of their variables have the
    dimension chain, as ``az.concat(dim="chain")`` wants it.

    What the predictive lacks is left out: without y there are no `log_likelihood`, `sample_stats` and `observed_data`,
    and the method moments has no draws of numbers and no `posterior`. LOO-PIT needs kept draws of all examples, and one
    y an example.

    Args:
        data: the data `predictive` was made of, in its order, such as `Images` or a `Table`; they tell the names of
            classes and features.
        x: the inputs [N, ...] in place of them.
        feature_names: of the columns of `x`, for figures: ``"age (years)"``.
        classes: names of the classes where there are no images; ``0``, ``1``, ... unless given.
        guide: the posterior, for `posterior` and `layers`. `layers` is left out for a posterior without signal-to-noise
            ratios: one without `loc_scale`, or a pruned one.
        kl: KL by site (`ppl_bnn.inference.elbo.kl_by_site`), nats.
        norms: whether `posterior` has the norms of the weights; they cost all draws of the weights once more.
        history: what `fit` returned, for `training`.
        attrs: numbers and texts about the run, kept with the file. ``title`` and ``y_label`` name the data and y in
            figures.
        seed: of the sampled labels.

    Raises:
        UserError: `data` or `x` and `predictive` differ in number, or the labels do; both `data` and `x`; another
            number of classes or feature names; a `guide` that is no posterior.
    """
    of_data = told(predictive, data, x, feature_names, classes, attrs)
    if guide is not None and not isinstance(guide, Posterior):
        raise UserError(
            f"guide must be the posterior that was predicted with, got a {type(guide).__name__}: a Pyro guide becomes "
            "one by as_posterior"
        )
    names = class_names(predictive, of_data.names)
    groups = {"posterior_predictive": drawn_group(predictive, names, seed)}
    if guide is not None and (found := posterior_group(predictive, guide, kl or {}, norms=norms)) is not None:
        groups["posterior"] = found
    groups |= _by_draw(predictive) | data_groups_of(predictive, of_data)
    groups |= {"uncertainty": uncertainty_group(predictive, names), "monte_carlo": monte_carlo(predictive)}
    if isinstance(guide, Factorized) and not is_pruned(guide) and guide.sites:
        groups["layers"] = layers(guide, kl or {})
    if history:
        columns = {
            name: (("epoch",), np.array([row[name] for row in history])) for name in history[0] if name != "epoch"
        }
        groups["training"] = dataset(columns, epoch=[int(row["epoch"]) for row in history])
    groups = {name: part if name.endswith("_data") else with_coordinates(part) for name, part in groups.items()}
    for name in groups.keys() & set(BY_CHAIN):
        groups[name] = groups[name].expand_dims(chain=[0])
    return assemble(groups, {**predictive.summary(), **how_drawn(predictive), **of_data.attrs})


def class_names(predictive: Predictive, given: Sequence[str] | None) -> list[str]:
    """Names of the classes; none for numbers and for labels of yes or no.

    Raises:
        UserError: another number of names than classes.
    """
    if not has_classes(predictive.likelihood):
        return []
    count = predictive.mean.shape[-1]
    if given is not None and len(given) != count:
        raise UserError(f"the predictive has {count} classes, got names of {len(given)}")
    return [str(name) for name in given] if given is not None else [str(at) for at in range(count)]


def _by_draw(predictive: Predictive) -> dict[str, xr.Dataset]:
    """`log_likelihood` and `sample_stats`, as far as there was a y and they were kept."""
    groups, by_draw = {}, ("chain", "draw")
    stats: dict[str, Any] = {}
    if predictive.draw_scores is not None:
        name = "score" if predictive.likelihood.drawn else "accuracy"
        stats[name] = (by_draw, predictive.draw_scores[None])
    if predictive.log_likelihood is not None:
        obs = np.arange(len(predictive.draws))
        each = {"y": ((*by_draw, "obs_id"), predictive.log_likelihood[None])}
        groups["log_likelihood"] = dataset(each, obs_id=obs)
        stats["nll"] = (by_draw, -predictive.log_likelihood.mean(1)[None])
    if stats:
        groups["sample_stats"] = dataset(stats)
    return groups


def data_groups_of(predictive: Predictive, of_data: Told) -> dict[str, xr.Dataset]:
    """`observed_data` and `constant_data`, as far as there is y and x."""
    data, x = of_data.images, of_data.x
    groups = {} if data is None else data_groups(data)
    if predictive.y is None:
        groups.pop("observed_data", None)
    elif data is None:
        groups["observed_data"] = observed_group(predictive)
    if x is not None:
        groups["constant_data"] = input_group(torch.as_tensor(x), of_data.feature_names)
    return groups


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
        variables["kl"] = (("layer",), np.array([kl.get(site, np.nan) for site in ratios]))
    return dataset(variables, layer=list(ratios), quantile=_QUANTILES, log10_snr=middle.numpy())
