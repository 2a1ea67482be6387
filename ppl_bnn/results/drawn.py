"""The draws of a predictive and what they say about each example, as groups: `posterior_predictive`, `uncertainty`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.results.idata import INTERVAL, dataset, dims_of, sampled_labels, spread

# Bounds of the central 50% and 90% intervals.
BOUNDS = np.array([0.05, 0.25, 0.75, 0.95])
EXACT = "float64, to resume from"


def drawn_group(predictive: Predictive, classes: Sequence[str], seed: int) -> xr.Dataset:
    """`posterior_predictive` of the examples kept, [chain, draw, obs_id, ...].

    Class probabilities `probs` [..., class] (of yes or no: of yes, without that dimension) and labels y sampled from
    them; for numbers `mean`, E[y | draw], and the drawn y, whole numbers where it is a count.

    Args:
        seed: of the sampled labels.
    """
    means, by_draw = predictive.means, ("chain", "draw")
    variables: dict[str, Any]
    if predictive.likelihood.drawn:
        variables = {"mean": ((*by_draw, *dims_of(means[0], "y")), means[None])}
        if predictive.samples is not None:
            samples = whole_numbers(predictive.samples) if is_whole(predictive) else predictive.samples
            variables["y"] = ((*by_draw, *dims_of(samples[0], "y")), samples[None])
    else:
        dims = (*by_draw, *_dims_of_mean(predictive.likelihood, means[0]))
        labels = sampled_labels(means, seed) if classes else _sampled_yes(means, seed)
        variables = {"probs": (dims, means[None]), "y": ((*by_draw, *dims_of(labels[0], "y")), labels[None])}
    made = dataset(variables, obs_id=predictive.kept.numpy(), **({"class": list(classes)} if classes else {}))
    for name, values in (("mean", means), ("y", predictive.samples)):
        if predictive.likelihood.drawn and values is not None:
            made[name].attrs |= _float_attrs(values)
    return made


def uncertainty_group(predictive: Predictive, classes: Sequence[str]) -> xr.Dataset:
    """`uncertainty`: what the predictive says about each example.

    - Classes: `mean_probs`, `std_probs` and `interval` (equal-tailed, 90% of the draws) of each probability.
    - Numbers: `mean` and `std` of y, `interval` of y at the quantiles 5%, 25%, 75% and 95%, `mean_interval` of E[y |
      draw] at the same (the uncertainty about the function), and with y its `pit_lower` and `pit_upper`. The method
      moments has no intervals.
    - `total`, `aleatoric` and `epistemic` uncertainty: of classes in nats, of numbers variances.
    """
    total, aleatoric, epistemic = predictive.uncertainties()
    parts = {"total": total, "aleatoric": aleatoric, "epistemic": epistemic}
    variables: dict[str, Any] = {}
    mean, coords = predictive.mean, {"obs_id": np.arange(len(predictive.draws))}
    if predictive.likelihood.drawn:
        numbers = {"mean": mean, "std": predictive.std}
        if predictive.pit is not None:
            numbers["pit_lower"], numbers["pit_upper"] = predictive.pit
        variables = {name: (dims_of(values, "y"), values) for name, values in numbers.items()}
        if predictive.method != "moments":
            quantile: Any = BOUNDS
            for name, of in (("interval", "y"), ("mean_interval", "mean")):
                bounds = predictive.quantiles(torch.from_numpy(BOUNDS), of=of).movedim(0, -1)
                variables[name] = ((*dims_of(mean, "y"), "quantile"), bounds)
            coords["quantile"] = quantile
    else:
        dims = _dims_of_mean(predictive.likelihood, mean)
        of_draws = predictive.kept.numpy()[: 0 if predictive.method == "moments" else None]
        variables = {"mean_probs": (dims, mean.float()), **spread(predictive.means.numpy(), of_draws, len(mean), dims)}
        coords["quantile"] = INTERVAL
    variables |= {name: (dims_of(values, "y"), values) for name, values in parts.items()}
    return dataset(variables, **coords, **({"class": list(classes)} if classes else {}))


def observed_group(predictive: Predictive) -> xr.Dataset:
    """`observed_data`: y [obs_id, ...], as whole numbers where it is counts or labels."""
    y = predictive.y
    assert y is not None
    made = dataset({"y": (dims_of(y, "y"), whole_numbers(y) if is_whole(predictive) else y)})
    if y.is_floating_point():
        made["y"].attrs |= _float_attrs(y)
    return made


def has_classes(likelihood: Likelihood) -> bool:
    """Whether the last dimension of the mean is that of the classes."""
    return isinstance(likelihood, Categorical)


def name_of(likelihood: Likelihood) -> str:
    """What a file calls a likelihood."""
    return "Categorical" if has_classes(likelihood) else type(likelihood).__name__


def is_whole(predictive: Predictive) -> bool:
    """Whether y is counts or labels: all there is of it is whole numbers. ArviZ draws such y in another way."""
    known = [values for values in (predictive.y, predictive.samples) if values is not None and values.numel()]
    # NaN is none.
    return bool(known) and all(bool((values == values.round()).all()) for values in known)


def whole_numbers(values: Tensor) -> Tensor:
    """Values that are whole numbers, as integers of as many bits as they need."""
    wide = not values.is_floating_point() or bool((values.abs() >= 2**31).any())
    return values.to(torch.int64 if wide else torch.int32)


def _float_attrs(values: Tensor) -> dict[str, str]:
    """What a number needs to come back from a file as it was, whatever it is stored as."""
    attrs = {"float_dtype": str(values.dtype).removeprefix("torch.")}
    return attrs | ({"exact": EXACT} if values.dtype == torch.float64 else {})


def _dims_of_mean(likelihood: Likelihood, values: Tensor) -> tuple[str, ...]:
    dims = dims_of(values, "y")
    return (*dims[:-1], "class") if has_classes(likelihood) else dims


def _sampled_yes(probs: Tensor, seed: int) -> Tensor:
    """1 or 0 by each draw's probability of 1, [S, N, ...]; -1 where there is no such draw."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([(torch.rand(draw.shape, generator=generator) < draw).to(torch.int16) for draw in probs])
    return drawn.masked_fill(probs.isnan(), -1)
