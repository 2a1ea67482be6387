"""Predictives under shift and of other data as ArviZ InferenceData: `shift.nc`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.data import Images
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.shift import Shifted, shift_metrics
from ppl_bnn.results.idata import assemble, dataset


def shift_to_inference_data(
    shifted: Sequence[Shifted],
    outside: Mapping[str, Predictive],
    images: Images,
    *,
    temperature: Mapping[str, float] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a test set's predictives under shifts, and those of other data, as InferenceData of custom groups.

    Groups: `shift` (per condition its kind and severity, and `prediction.shift.shift_metrics`), `in_distribution` (the
    uncertainties of the test images as they are and their top_prob, [obs_id]), `ood` (the same of the images of each
    set [set, image], NaN beyond a set's last, and auroc and fpr95 by the total and by the epistemic uncertainty
    [set, score]) and, where it was asked for, `temperature`.

    Args:
        shifted: the first of them is the test set as it is.
        outside: {name of the set: its predictive}.
        temperature: what `ppl_bnn.prediction.shift.temperature_metrics` returned.
    """
    rows = [shift_metrics(one.predictive) for one in shifted]
    clean = _by_image(shifted[0].predictive, "obs_id")
    groups = {
        "shift": dataset(
            {name: (("condition",), np.array([row[name] for row in rows])) for name in rows[0]},
            kind=("condition", [one.kind for one in shifted]),
            severity=("condition", np.array([one.severity for one in shifted])),
        ),
        "in_distribution": clean,
    }
    if outside:
        sets = xr.concat([_by_image(found, "image") for found in outside.values()], dim="set", join="outer")
        scores = ("total", "epistemic")
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
    return assemble(groups, {"title": images.title, "num_samples": shifted[0].predictive.num_samples, **(attrs or {})})


def _by_image(predictive: Predictive, dimension: str) -> xr.Dataset:
    parts = dict(zip(("total", "aleatoric", "epistemic"), predictive.uncertainties(), strict=True))
    parts["top_prob"] = predictive.mean_probs.amax(1)
    return dataset({name: ((dimension,), values) for name, values in parts.items()}).assign_coords(
        {dimension: np.arange(len(predictive.labels))}
    )


def _finite(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values[np.isfinite(values)])
