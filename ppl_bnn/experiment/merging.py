"""Independent trainings of one network as the chains of one InferenceData."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.provenance import RANKED, read_inputs
from ppl_bnn.results.idata import assemble, spread
from ppl_bnn.results.netcdf import groups_of

_SAME = ("observed_data", "constant_data")
_ITS_TRAINING = ("checkpoint", "crc32", RANKED)


def merge(parts: Sequence[Any], *, attrs: Mapping[str, Any] | None = None) -> Any:
    """Return several `predictive.nc`, or several `pruning.nc`, as one InferenceData with a chain for each.

    What had a chain of length 1, and what belongs to one training (`layers`, `training`, `pruning`), gets the dimension
    chain. `uncertainty` and the attributes accuracy, nll, ece and brier are those of the predictive that averages all
    draws of all chains. A pruning sweep's levels are put in one order: first those at a threshold that all chains have,
    then those at a fraction. Its single draws are kept of the images that all chains kept.

    Args:
        parts: at least one, of the same images and numbers of levels.
        attrs: more attributes. Those of the parts are kept where all agree.

    Raises:
        UserError: no parts, or they do not fit together.
    """
    if not parts:
        raise UserError("there is nothing to merge")
    if len(generators(part.attrs for part in parts)) > 1:
        raise UserError("draws of two generators are not merged; predict the older results again")
    groups = [{name: data.drop_encoding() for name, data in groups_of(part).items()} for part in parts]
    shared = [name for name in _SAME if name in groups[0]]
    for name in shared:
        if not all(name in one and one[name].equals(groups[0][name]) for one in groups):
            raise UserError(f"only results of the same images can be merged: their {name} differ")
    if "uncertainty" in groups[0] and "mean_probs" not in groups[0]["uncertainty"]:
        raise UserError("only predictives of classes are merged; join draws of numbers by az.concat(..., dim='chain')")
    if "pruning" in groups[0]:
        groups = _levels_in_one_order(groups)
    merged = {name: groups[0][name] for name in shared}
    merged |= {name: _chains(name, [one[name] for one in groups]) for name in groups[0] if name not in _SAME}
    own = [{name: value for name, value in part.attrs.items() if name != "inputs"} for part in parts]
    same = {name: value for name, value in own[0].items() if all(one.get(name) == value for one in own)}
    if "uncertainty" in merged:
        merged["uncertainty"], summary = _mixture(merged, moments=same.get("method") == "moments")
        same |= summary | {"seconds": sum(float(one["seconds"]) for one in own)}
    return assemble(merged, {**same, **(attrs or {})})


def generators(attrs: Iterable[Mapping[str, Any]]) -> set[str]:
    """The generators of some results' random numbers. Results of version 0.1.0 do not name theirs."""
    return {of.get("generator", "of version 0.1.0") for of in attrs}


def differing(inputs: Sequence[Mapping[str, Any]]) -> str | None:
    """The first setting or data set that differs between several results of one run, the training aside, or None."""
    own = [{name: value for name, value in of.items() if name not in _ITS_TRAINING} for of in map(read_inputs, inputs)]
    found = (saved_config.first_difference(own[0], other, words=("one has", "another")) for other in own[1:])
    return next(filter(None, found), None)


def _chains(name: str, parts: list[xr.Dataset]) -> xr.Dataset:
    parts = [part if "chain" in part.dims else part.expand_dims("chain") for part in parts]
    if "draw" in parts[0].dims:
        # Where images stop early, trainings end after numbers of draws of their own: the others have NaN there, as
        # images that stopped have, and the sampled label -1.
        most = np.arange(max(part.sizes["draw"] for part in parts))
        fill = {key: -1 if value.dtype.kind == "i" else np.nan for key, value in parts[0].items()}
        parts = [part.reindex(draw=most, fill_value=fill) for part in parts]
    kept = name == "posterior_predictive" and "level" in parts[0].dims
    try:
        merged = xr.concat(
            parts, "chain", data_vars="all", coords="minimal", compat="override", join="inner" if kept else "exact",
            combine_attrs="drop_conflicts",
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"the results' {name} cannot be merged: {str(error).splitlines()[0]}") from None
    return merged.assign_coords(chain=np.arange(merged.sizes["chain"]))


def _mixture(groups: Mapping[str, xr.Dataset], *, moments: bool) -> tuple[xr.Dataset, dict[str, float]]:
    by_chain = groups["uncertainty"]
    # With a tolerance, chains have numbers of draws of their own for each image; moments have none.
    weights = groups["monte_carlo"]["draws"].astype("float64").clip(min=1)
    means, entropies = (
        torch.from_numpy(by_chain[name].astype("float64").weighted(weights).mean("chain").values)
        for name in ("mean_probs", "aleatoric")
    )
    uncertainty = by_chain.isel(chain=0, drop=True)
    parts = zip(("total", "aleatoric", "epistemic"), metrics.uncertainties(means, entropies), strict=True)
    uncertainty = uncertainty.assign(mean_probs=(("obs_id", "class"), means.float().numpy()))
    uncertainty = uncertainty.assign({name: (("obs_id",), values.numpy()) for name, values in parts})
    probs = groups["posterior_predictive"]["probs"].stack(sample=("chain", "draw"))
    probs = probs.transpose("sample", "obs_id", "class")[:, : 0 if moments else None]
    uncertainty = uncertainty.assign(spread(probs.values, probs["obs_id"].values, len(means)))
    draws = groups["log_likelihood"]["y"].stack(sample=("chain", "draw")).transpose("sample", "obs_id")
    labels = torch.from_numpy(groups["observed_data"]["y"].values).long()
    return uncertainty, {
        "num_samples": int((~np.isnan(draws.values)).any(1).sum()),
        "accuracy": metrics.accuracy(means, labels),
        "nll": metrics.nll(torch.from_numpy(draws.values)),
        "ece": metrics.ece(means, labels),
        "brier": metrics.brier(means, labels),
    }


def _levels_in_one_order(groups: Sequence[Mapping[str, xr.Dataset]]) -> list[dict[str, xr.Dataset]]:
    thresholds = [one["pruning"]["threshold"].values for one in groups]
    shared = set(thresholds[0]).intersection(*thresholds)
    return [{name: _reordered(data, one, shared) for name, data in one.items()} for one in groups]


def _reordered(data: xr.Dataset, groups: Mapping[str, xr.Dataset], shared: set[float]) -> xr.Dataset:
    if "level" not in data.dims:
        return data
    thresholds, fractions = (groups["pruning"][name].values for name in ("threshold", "pruned_fraction"))
    order = sorted(range(len(thresholds)), key=lambda level: (thresholds[level] not in shared, fractions[level]))
    return data.isel(level=order).assign_coords(level=np.arange(len(order)))
