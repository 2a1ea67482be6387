"""Saved draws: what a result keeps so that more draws can be added, with bitwise the result of a single run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from ppl_bnn.errors import FileError, UserError
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.sketch import QuantileSketch
from ppl_bnn.results import netcdf
from ppl_bnn.results.drawn import EXACT, has_classes, name_of
from ppl_bnn.results.idata import dataset, dims_of


def monte_carlo(predictive: Predictive) -> xr.Dataset:
    """The sums over draws behind the averages, in full precision, and how far the averages may be off.

    Variables by obs_id: draws; mc_error, the standard error of the mean; and, to resume from, sum_<name> of each
    average (`Predictive.sums`), reference, squares where they are not those of the spread, and log_sum and sketch where
    these were kept.
    """
    exact = {f"sum_{name}": total for name, total in predictive.sums.items()}
    # Independent draws have the same squares as the spread.
    if not torch.equal(predictive.squares, predictive.sums["spread"]):
        exact["squares"] = predictive.squares
    exact["reference"] = predictive.reference
    if predictive.log_sum is not None:
        exact["log_sum"] = predictive.log_sum
    if predictive.sketch is not None:
        exact |= {f"sketch_{name}": part for name, part in predictive.sketch.state().items()}
    variables = {name: (_dims(predictive, values, name), values) for name, values in exact.items()}
    error = predictive.mc_error.float()
    found = dataset(
        {"draws": (("obs_id",), predictive.draws), "mc_error": (_dims(predictive, error, "mean"), error), **variables},
        obs_id=np.arange(len(predictive.draws)),
    )
    for name in variables:
        found[name].attrs["exact"] = EXACT
    return found


def _dims(predictive: Predictive, values: torch.Tensor, name: str) -> tuple[str, ...]:
    """Dimensions of values by example, [N, ...]: those of y, of the classes behind it, or of their own."""
    if values.shape != predictive.mean.shape[: values.dim()]:
        return dims_of(values, name)
    dims = dims_of(values, "y")
    classes = has_classes(predictive.likelihood) and values.dim() == predictive.mean.dim()
    return (*dims[:-1], "class_id") if classes else dims


def how_drawn(predictive: Predictive) -> dict[str, str | float]:
    """How the draws were made, how many the examples have, and how far the averages may be off.

    likelihood and the units of its uncertainties; method, sampling, compact (yes or no), generator and seed (of their
    random numbers); mean_draws, median_draws and max_draws over examples; mc_error, the mean standard error of the mean
    (of the top probability), and max_mc_error, the largest of any; NaN where the draws do not tell it.
    """
    top = predictive.mc_error
    if has_classes(predictive.likelihood):
        top = top.gather(-1, predictive.mean.argmax(-1, keepdim=True))
    return {
        "likelihood": name_of(predictive.likelihood),
        "units": predictive.likelihood.units,
        "method": predictive.method,
        "sampling": predictive.sampling,
        "compact": "yes" if predictive.compact else "no",
        "generator": predictive.generator,
        "seed": predictive.seed,
        "mean_draws": float(predictive.draws.double().mean()),
        "median_draws": float(predictive.draws.double().median()),
        "max_draws": int(predictive.draws.max()),
        "mc_error": float(top.mean()),
        "max_mc_error": float(predictive.mc_error.amax()),
    }


def read_predictive(path: Path, likelihood: Likelihood | None = None) -> Predictive:
    """A saved predictive: what `predict` resumes from (``so_far=``).

    Kept probabilities are in the file's steps of 1/65534. All else is in full precision: the draws of numbers that are
    added to a saved predictive are bitwise those of a single run.

    Args:
        likelihood: of the predictive; Categorical unless given.

    Raises:
        FileError: missing, damaged, or without the sums to resume from.
        UserError: `likelihood` is not the file's.
    """
    likelihood = likelihood or Categorical()
    groups = {
        name: netcdf.read_group(path, name)
        for name in ("posterior_predictive", "log_likelihood", "observed_data", "sample_stats", "monte_carlo")
    }
    if missing := [name for name in ("posterior_predictive", "monte_carlo") if groups[name] is None]:
        raise FileError(f"{path} has no group {missing[0]!r}; delete it and run its stage again")
    attrs = netcdf.read_attrs(path)
    # Results of version 0.1.0 are all of classes.
    if (name := attrs.get("likelihood", "Categorical")) != name_of(likelihood):
        raise UserError(f"{path} is of a {name} likelihood, got {name_of(likelihood)}: pass likelihood= of the model")

    def tensor(group: str, name: str) -> torch.Tensor | None:
        data = groups[group]
        if data is None or name not in data:
            return None
        # xarray may give memory that cannot be written to.
        found = torch.from_numpy(np.require(data[name].values, requirements="W"))
        dtype = data[name].attrs.get("float_dtype")
        return found if dtype is None else found.to(getattr(torch, dtype))

    def first_chain(group: str, name: str) -> torch.Tensor | None:
        found = tensor(group, name)
        return None if found is None else found[0]

    means = first_chain("posterior_predictive", "mean" if likelihood.drawn else "probs")
    kept, draws = tensor("posterior_predictive", "obs_id"), tensor("monte_carlo", "draws")
    state = groups["monte_carlo"]
    assert means is not None
    assert kept is not None
    assert draws is not None
    assert state is not None
    names = [str(name) for name in state]
    sums, sketch = (
        {name.removeprefix(kind): tensor("monte_carlo", name) for name in names if name.startswith(kind)}
        for kind in ("sum_", "sketch_")
    )
    squares, reference = tensor("monte_carlo", "squares"), tensor("monte_carlo", "reference")
    if not sums:
        sums, squares, reference = _of_version_0_1_0(tensor, draws)  # type: ignore[assignment]
    return Predictive(
        means=means,
        kept=kept,
        y=tensor("observed_data", "y"),
        log_likelihood=first_chain("log_likelihood", "y"),
        sums=sums,  # type: ignore[arg-type]
        squares=sums["spread"] if squares is None else squares,  # type: ignore[arg-type]
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
