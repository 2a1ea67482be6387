"""Saved draws: what a result keeps so that more draws can be added, with bitwise the result of a single run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from ppl_bnn.errors import FileError
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.sketch import QuantileSketch
from ppl_bnn.results import netcdf


def monte_carlo(predictive: Predictive) -> xr.Dataset:
    """The sums over draws behind the averages, in full precision, and how far the averages may be off.

    Variables by obs_id: draws; mc_error, the standard error of the mean; and, to resume from, sum_<name> of each
    average (`Predictive.sums`), squares, reference and, where it was kept, log_sum.
    """
    exact = {f"sum_{name}": total for name, total in predictive.sums.items()}
    exact |= {"squares": predictive.squares, "reference": predictive.reference}
    if predictive.log_sum is not None:
        exact["log_sum"] = predictive.log_sum
    if predictive.sketch is not None:
        exact |= {f"sketch_{name}": part for name, part in predictive.sketch.state().items()}
    variables = {name: (dims_of(values, name), values.numpy()) for name, values in exact.items()}
    found = xr.Dataset(
        {
            "draws": ("obs_id", predictive.draws.numpy()),
            "mc_error": (dims_of(predictive.squares, "squares"), predictive.mc_error.float().numpy()),
            **variables,
        },
        coords={"obs_id": np.arange(len(predictive.draws))},
    )
    for name in variables:
        found[name].attrs["exact"] = "float64, to resume from"
    return found


def dims_of(values: torch.Tensor, name: str) -> tuple[str, ...]:
    """Dimensions of an array by example, [N, ...]: the sketch's have names of their own."""
    if name.startswith("sketch_"):
        return tuple(f"{name}_dim_{at}" for at in range(values.dim()))
    kind = "entropy" if name == "sum_entropy" else "y"
    return ("obs_id", *(f"{kind}_dim_{at}" for at in range(values.dim() - 1)))


def how_drawn(predictive: Predictive) -> dict[str, str | float]:
    """How the draws were made, how many the examples have, and how far the averages may be off.

    method, sampling, compact (yes or no), generator (of their random numbers), mean_draws, median_draws and max_draws
    over examples; mc_error, the mean standard error of the mean (of the top probability), and max_mc_error, the largest
    of any; NaN where the draws do not tell it.
    """
    error = predictive.mc_error
    top = error if predictive.likelihood.drawn else error.gather(-1, predictive.mean.argmax(-1, keepdim=True))
    return {
        "method": predictive.method,
        "sampling": predictive.sampling,
        "compact": "yes" if predictive.compact else "no",
        "generator": predictive.generator,
        "mean_draws": float(predictive.draws.double().mean()),
        "median_draws": float(predictive.draws.double().median()),
        "max_draws": int(predictive.draws.max()),
        "mc_error": float(top.mean()),
        "max_mc_error": float(predictive.mc_error.amax()),
    }


def read_predictive(path: Path, likelihood: Likelihood | None = None) -> Predictive:
    """A saved predictive, its kept probabilities in the file's steps of 1/65534 and all else in full precision.

    Args:
        likelihood: of the predictive; Categorical unless given.

    Raises:
        FileError: missing, damaged, or without the sums to resume from.
    """
    likelihood = likelihood or Categorical()
    groups = {
        name: netcdf.read_group(path, name)
        for name in ("posterior_predictive", "log_likelihood", "observed_data", "sample_stats", "monte_carlo")
    }
    if missing := [name for name in ("posterior_predictive", "monte_carlo") if groups[name] is None]:
        raise FileError(f"{path} has no group {missing[0]!r}; delete it and run its stage again")
    attrs = netcdf.read_attrs(path)

    def tensor(group: str, name: str) -> torch.Tensor | None:
        data = groups[group]
        if data is None or name not in data:
            return None
        # xarray may give memory that cannot be written to.
        return torch.from_numpy(np.require(data[name].values, requirements="W"))

    def first_chain(group: str, name: str) -> torch.Tensor | None:
        found = tensor(group, name)
        return None if found is None else found[0].float()

    means = first_chain("posterior_predictive", "mean" if likelihood.drawn else "probs")
    kept, draws = tensor("posterior_predictive", "obs_id"), tensor("monte_carlo", "draws")
    state = groups["monte_carlo"]
    assert means is not None
    assert kept is not None
    assert draws is not None
    assert state is not None
    sums = {str(name).removeprefix("sum_"): tensor("monte_carlo", str(name)) for name in state if "sum_" in str(name)}
    sums.pop("log_sum", None)
    squares, reference = tensor("monte_carlo", "squares"), tensor("monte_carlo", "reference")
    if not sums:
        sums, squares, reference = _of_version_0_1_0(tensor, draws)
    sketch = {
        str(name).removeprefix("sketch_"): tensor("monte_carlo", str(name))
        for name in state
        if str(name).startswith("sketch_")
    }
    return Predictive(
        means=means,
        kept=kept,
        y=tensor("observed_data", "y"),
        log_likelihood=first_chain("log_likelihood", "y"),
        sums=sums,  # type: ignore[arg-type]
        squares=squares,  # type: ignore[arg-type]
        reference=reference,  # type: ignore[arg-type]
        draws=draws,
        draw_scores=first_chain("sample_stats", "score" if likelihood.drawn else "accuracy"),
        seconds=attrs["seconds"],
        samples=first_chain("posterior_predictive", "y") if likelihood.drawn else None,
        sketch=QuantileSketch.from_state(sketch) if sketch else None,  # type: ignore[arg-type]
        log_sum=tensor("monte_carlo", "log_sum"),
        method=attrs["method"],
        sampling=attrs["sampling"],
        # Results of version 0.1.0 do not say.
        compact=attrs.get("compact", "no") == "yes",
        seed=int(attrs.get("seed", 0)),
        likelihood=likelihood,
        generator=attrs.get("generator", "of version 0.1.0"),
    )


def _of_version_0_1_0(
    tensor: Callable[[str, str], torch.Tensor | None], draws: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Sums, squares and reference of a file that holds averages of class probabilities."""
    mean, entropy, squares = (tensor("monte_carlo", name) for name in ("mean_probs", "mean_entropy", "mean_squares"))
    assert mean is not None
    assert entropy is not None
    assert squares is not None
    count = draws.clamp_min(1).double()
    total = squares * count.unsqueeze(1)
    return (
        {"mean": mean * count.unsqueeze(1), "entropy": entropy * count, "spread": total}, total, torch.zeros_like(mean)
    )  # fmt: skip
