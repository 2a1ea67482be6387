"""The report stage: metrics.json, the figures and the gallery, from the results alone."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ppl_bnn.errors import FileError
from ppl_bnn.experiment.provenance import DRAWN_BY, RANKED, Settings, difference_from, inputs_of
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.files import write_text
from ppl_bnn.inference.checkpoint import Checkpoint
from ppl_bnn.prediction.convergence import convergence
from ppl_bnn.prediction.shift import reliance
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures import predictive as plots
from ppl_bnn.results.figures.convergence import draw_convergence
from ppl_bnn.results.figures.densities import draw_predictive_figures
from ppl_bnn.results.figures.gallery import write_gallery
from ppl_bnn.results.figures.pruning import draw_pruning
from ppl_bnn.results.figures.shift import draw_shift_figures

log = logging.getLogger(__name__)


def report(run: Experiment) -> None:
    """Write metrics.json, every figure and the gallery from predictive.nc, shift.nc and pruning.nc.

    Raises:
        FileError: one of them was made with other settings, or from another checkpoint, than the run has now.
    """
    predictive, shifted, pruning = (run.out / f"{name}.nc" for name in ("predictive", "shift", "pruning"))
    posterior = _check(run, predictive, shifted, pruning)
    attrs = netcdf.read_attrs(predictive)
    metrics: dict[str, Any] = {
        "run": run.name,
        "data": {
            "title": run.test_images.title,
            "train": len(run.train_images),
            run.test_images.split: len(run.test_images),
        },
        "model": {
            "parameters": sum(row.trainable + row.non_trainable for row in run.rows),
            "trainable": sum(row.trainable for row in run.rows),
        },
    }
    history = netcdf.read_group(predictive, "training")
    if history is not None:
        seconds = float(history["seconds"].sum())
        metrics["train"] = {
            "epochs": history.sizes["epoch"],
            "seconds": seconds,
            "samples_per_second": len(run.train_images) * history.sizes["epoch"] / seconds,
            "accuracy": float(history["accuracy"][-1]),
        }
    metrics["test"] = {name: attrs[name] for name in ("num_samples", "seconds", "accuracy", "nll", "ece", "brier")}
    how = ("method", "sampling", "mean_draws", "median_draws", "max_draws", "mc_error", "max_mc_error")
    metrics["test"].update({name: _or_none(attrs[name]) for name in how if name in attrs})
    metrics["convergence"] = _convergence(run, predictive, attrs)
    uncertainty, observed = (netcdf.read_group(predictive, name) for name in ("uncertainty", "observed_data"))
    if uncertainty is not None and observed is not None:
        probs, labels = (torch.from_numpy(found.values) for found in (uncertainty["mean_probs"], observed["y"]))
        metrics["test"] |= reliance(probs, labels)
    if shifted.exists():
        metrics |= read_shift(shifted)
    metrics["pruning"] = []
    if pruning.exists() and (levels := netcdf.read_group(pruning, "pruning")) is not None:
        names = ("threshold", "pruned_fraction", "nonzero", "accuracy", "nll", "ece", "seconds")
        metrics["pruning"] = [
            {name: levels[name].values[at].item() for name in names} for at in range(levels.sizes["level"])
        ]
    if posterior is not None:
        metrics["posterior"] = posterior
    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    figures = plots.draw_figures(predictive, pruning if pruning.exists() else None, run.out / "figures")
    if pruning.exists():
        figures += draw_pruning([pruning], run.out / "figures")
    figures += draw_predictive_figures(predictive, run.out / "figures")
    if shifted.exists():
        figures += draw_shift_figures(shifted, run.out / "figures")
    write_gallery(predictive, run.out / "figures" / "gallery.html")
    log.info(
        "report: %s, %d figures and gallery.html in %s", run.out / "metrics.json", len(figures), run.out / "figures"
    )


def _check(run: Experiment, predictive: Path, shifted: Path, pruning: Path) -> dict[str, Any] | None:
    """Refuse results that are out of date; return what posterior.json says, where it is there."""
    saved = cache(run.saved)
    stages: tuple[tuple[Path, Settings], ...] = (
        (predictive, run.config.predict),
        (shifted, run.config.shift),
        (pruning, run.config.pruning),
    )
    for path, settings in stages:
        if path == predictive or path.exists():
            inputs = inputs_of(run, saved(settings.checkpoint), settings)
            # It was so when the sweep began, and the same command may have predicted since.
            inputs.pop(RANKED, None)
            # Draws of an older version are not added to, but may be reported.
            inputs.pop(DRAWN_BY)
            if difference := difference_from(path, inputs):
                raise FileError(f"{path} is out of date: {difference}; run its stage again first")
    path = run.out / "posterior.json"
    return _read_posterior(path, saved(run.config.predict.checkpoint)) if path.exists() else None


def _read_posterior(path: Path, state: Checkpoint) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        step, crc32 = content["step"], content.pop("crc32", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{path} is damaged; delete it, or run the stage posterior again") from None
    if step != state.step or crc32 not in (None, state.meta["crc32"]):
        raise FileError(
            f"{path} is out of date: it is of step {step}, and predictive.nc of step {state.step} (or of another "
            "training); run the stage posterior again first"
        )
    return content  # type: ignore[no-any-return]


def read_shift(path: Path) -> dict[str, Any]:
    """What shift.nc adds to metrics.json."""
    found: dict[str, Any] = {"shift": [], "ood": []}
    if (levels := netcdf.read_group(path, "shift")) is not None:
        rows = levels.reset_coords()
        found["shift"] = [
            {name: rows[name].values[at].item() for name in ("kind", "severity", *levels)}
            for at in range(rows.sizes["condition"])
        ]
    if (ood := netcdf.read_group(path, "ood")) is not None:
        found["ood"] = [
            {
                "set": str(name),
                "score": str(score),
                **{key: float(ood[key].sel(set=name, score=score)) for key in ("auroc", "fpr95")},
            }
            for name in ood["set"].values
            for score in ood["score"].values
        ]
    if (temperature := netcdf.read_group(path, "temperature")) is not None:
        found["temperature"] = {name: value.item() for name, value in temperature.items()}
    return found


def _convergence(run: Experiment, path: Path, attrs: dict[str, Any]) -> list[dict[str, float | None]]:
    """The predictive's error by the number of draws, as a figure and as rows for metrics.json; none of Sobol points."""
    figure = run.out / "figures" / "convergence.png"
    figure.unlink(missing_ok=True)
    if attrs.get("sampling") == "sobol":
        return []
    drawn, likelihood, labels = (
        netcdf.read_group(path, name) for name in ("posterior_predictive", "log_likelihood", "observed_data")
    )
    assert drawn is not None
    assert likelihood is not None
    assert labels is not None
    kept = drawn["obs_id"].values
    rows = convergence(
        torch.from_numpy(drawn["probs"].values[0]),
        torch.from_numpy(likelihood["y"].values[0][:, kept]),
        torch.from_numpy(labels["y"].values[kept]),
        together=2 if attrs.get("sampling") == "antithetic" else 1,
    )
    if rows:
        some = "" if rows[0]["images"] == len(labels["y"]) else f", the {rows[0]['images']} images that have all draws"
        draw_convergence(rows, run.test_images.title + some, figure)
    return [{name: _or_none(value) for name, value in row.items()} for row in rows]


def _or_none(value: Any) -> Any:
    # JSON has no NaN.
    return None if value != value else value
