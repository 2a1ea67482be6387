"""Predictives under shift and of other data as ArviZ InferenceData: `shift.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.data import Images, Split
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.shift import Shifted
from ppl_bnn.results.drawn import has_classes, name_of
from ppl_bnn.results.idata import assemble, dataset


def shift_to_inference_data(
    shifted: Sequence[Shifted],
    outside: Mapping[str, Predictive],
    data: Split | None = None,
    *,
    temperature: Mapping[str, float] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a test set's predictives under shifts, and those of other data, as InferenceData of custom groups.

    Groups: `shift` (per condition its kind and severity, and its metrics), `in_distribution` (the uncertainties of the
    test examples as they are, [obs_id], and of classes their top_prob), `ood` (the same of the examples of each set
    [set, image], NaN beyond a set's last, and auroc and fpr95 by each uncertainty [set, score]; of images without the
    aleatoric one) and, where it was asked for, `temperature`.

    An example with several labels or numbers has the mean of their uncertainties. The total uncertainty of numbers is
    the variance of y, which ranks the examples as its standard deviation does.

    Args:
        shifted: the first of them is the test set as it is.
        outside: {name of the set: its predictive}.
        data: the test set, for the title.
        temperature: what `ppl_bnn.prediction.shift.temperature_metrics` returned.
    """
    rows, first = [one.metrics for one in shifted], shifted[0].predictive
    assert first is not None
    clean = _by_example(first, "obs_id")
    groups = {
        "shift": dataset(
            {name: (("condition",), np.array([row[name] for row in rows])) for name in rows[0]},
            kind=("condition", [one.kind for one in shifted]),
            severity=("condition", np.array([one.severity for one in shifted])),
        ),
        "in_distribution": clean,
    }
    if outside:
        sets = xr.concat([_by_example(found, "image") for found in outside.values()], dim="set", join="outer")
        scores = ("total", "epistemic") if isinstance(data, Images) else ("total", "aleatoric", "epistemic")
        for name, measure in (("auroc", metrics.auroc), ("fpr95", metrics.fpr95)):
            found = [
                [
                    measure(torch.from_numpy(clean[score].values), _finite(sets[score].isel(set=at).values))
                    for score in scores
                ]
                for at in range(len(outside))
            ]
            sets[name] = (("set", "score"), np.array(found))
        groups["ood"] = sets.assign_coords({"set": list(outside), "score": list(scores)})
    if temperature:
        groups["temperature"] = dataset({name: ((), np.array(value)) for name, value in temperature.items()})
    how = {"likelihood": name_of(first.likelihood), "units": first.likelihood.units, "num_samples": first.num_samples}
    title = data.title if data is not None else f"{len(first.draws)} examples"
    return assemble(groups, {"title": title, **how, **(attrs or {})})


def _by_example(predictive: Predictive, dimension: str) -> xr.Dataset:
    parts = dict(zip(("total", "aleatoric", "epistemic"), predictive.uncertainties(), strict=True))
    parts = {name: values.flatten(1).mean(1) if values.dim() > 1 else values for name, values in parts.items()}
    if has_classes(predictive.likelihood) and predictive.mean_probs.dim() == 2:
        parts["top_prob"] = predictive.mean_probs.amax(1)
    return dataset({name: ((dimension,), values) for name, values in parts.items()}).assign_coords(
        {dimension: np.arange(len(predictive.draws))}
    )


def _finite(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values[np.isfinite(values)])
