"""Saved draws: what a result keeps so that more draws can be added, with bitwise the result of a single run."""

from pathlib import Path

import numpy as np
import torch
import xarray as xr

from ppl_bnn.errors import FileError
from ppl_bnn.prediction.tally import Predictive
from ppl_bnn.results import netcdf


def monte_carlo(predictive: Predictive) -> xr.Dataset:
    """The sums behind the averages in full precision, and how far the averages may be off.

    Variables by obs_id: draws, mean_probs, mean_squares and mc_error (standard error of mean_probs) of each class, and
    mean_entropy, nats.
    """
    by_class = ("obs_id", "class_id")
    dataset = xr.Dataset(
        {
            "draws": ("obs_id", predictive.draws.numpy()),
            "mean_probs": (by_class, predictive.mean_probs.numpy()),
            "mean_squares": (by_class, predictive.mean_squares.numpy()),
            "mean_entropy": ("obs_id", predictive.mean_entropy.numpy()),
            "mc_error": (by_class, predictive.mc_error.float().numpy()),
        },
        coords={"obs_id": np.arange(len(predictive.labels))},
    )
    for name in ("mean_probs", "mean_squares", "mean_entropy"):
        dataset[name].attrs["exact"] = "float64, to resume from"
    return dataset


def how_drawn(predictive: Predictive) -> dict[str, str | float]:
    """How the draws were made, how many the images have, and how far the averages may be off.

    method, sampling, compact (yes or no), generator (of their random numbers), mean_draws, median_draws and max_draws
    over images; mc_error, the mean standard error of the top probability, and max_mc_error, the largest of any class
    and image; NaN where the draws do not tell it.
    """
    top = predictive.mc_error.gather(1, predictive.mean_probs.argmax(1, keepdim=True))
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


def read_predictive(path: Path) -> Predictive:
    """A saved predictive, its kept probabilities in the file's steps of 1/65534 and all else in full precision.

    Raises:
        FileError: missing, damaged, or without the sums to resume from.
    """
    groups = {
        name: netcdf.read_group(path, name)
        for name in ("posterior_predictive", "log_likelihood", "observed_data", "sample_stats", "monte_carlo")
    }
    if missing := [name for name, group in groups.items() if group is None]:
        raise FileError(f"{path} has no group {missing[0]!r}; delete it and run its stage again")
    attrs = netcdf.read_attrs(path)

    def tensor(group: str, name: str) -> torch.Tensor:
        # xarray may give memory that cannot be written to.
        return torch.from_numpy(np.require(groups[group][name].values, requirements="W"))  # type: ignore[index]

    return Predictive(
        probs=tensor("posterior_predictive", "probs")[0].float(),
        kept=tensor("posterior_predictive", "obs_id"),
        log_likelihood=tensor("log_likelihood", "y")[0].float(),
        labels=tensor("observed_data", "y"),
        mean_probs=tensor("monte_carlo", "mean_probs"),
        mean_entropy=tensor("monte_carlo", "mean_entropy"),
        accuracies=tensor("sample_stats", "accuracy")[0].float(),
        seconds=attrs["seconds"],
        mean_squares=tensor("monte_carlo", "mean_squares"),
        draws=tensor("monte_carlo", "draws"),
        method=attrs["method"],
        sampling=attrs["sampling"],
        # Results of version 0.1.0 do not say.
        compact=attrs.get("compact", "no") == "yes",
        generator=attrs.get("generator", "of version 0.1.0"),
    )
