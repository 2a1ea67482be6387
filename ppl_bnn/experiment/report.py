"""The report stage: metrics.json, the figures and the gallery, from the results alone."""

import json
import logging
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ppl_bnn.errors import FileError
from ppl_bnn.experiment.figures import draw_all
from ppl_bnn.experiment.provenance import (
    RANKED,
    Settings,
    difference_from,
    first_pruning_path,
    inputs_of,
    predictive_path,
    pruning_path,
)
from ppl_bnn.experiment.scores import score_names
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.files import write_text
from ppl_bnn.inference.checkpoint import Checkpoint
from ppl_bnn.prediction.convergence import convergence
from ppl_bnn.prediction.shift import reliance
from ppl_bnn.results import netcdf
from ppl_bnn.version import __version__

log = logging.getLogger(__name__)


def report(run: Experiment) -> None:
    """Write metrics.json, every figure and a page of the least certain examples from the results.

    Nothing is written if neither the results nor the files of the last report have changed.

    Raises:
        FileError: a result was made with other settings, or from another checkpoint, than the run has now.
    """
    predictive, shifted, pruning = _results(run)
    posterior = _check(run, predictive, shifted, pruning)
    what: dict[str, Any] = {
        "run": run.name,
        "step": netcdf.read_attrs(predictive)["inputs"]["checkpoint"],
        "data": {
            "title": run.test_data.title,
            "train": len(run.train_data),
            run.test_data.split: len(run.test_data),
        },
        "model": {
            "parameters": sum(row.trainable + row.non_trainable for row in run.rows),
            "trainable": sum(row.trainable for row in run.rows),
        },
    }
    with_what = run.config.predict
    if with_what.posterior is not None or with_what.checkpoint != "last":
        file = None if with_what.posterior is None else Path(with_what.posterior).name
        what["predicted_with"] = {"checkpoint": with_what.checkpoint, "posterior": file}
    results = [path for path in (predictive, shifted, pruning, run.out / "posterior.json") if path.exists()]
    made_of = {**what, "ppl_bnn": __version__, "results": _checksums(run.out, results)}
    record, metrics = run.out / "figures" / "made_of.json", run.out / "metrics.json"
    if _is_of(record, run.out, made_of):
        log.info("report: %s and the figures are up to date", metrics)
        return
    rows = _convergence(predictive) if run.of_classes and run.test_data.targets.dim() == 1 else []
    content = {**what, **_metrics(run, predictive, shifted, pruning), "convergence": [_finite(row) for row in rows]}
    if posterior is not None:
        content["posterior"] = posterior
    write_text(metrics, json.dumps(content, indent=2) + "\n")
    figures = draw_all(run, rows, predictive, shifted, pruning)
    written = _checksums(run.out, [metrics, *figures])
    write_text(record, json.dumps({"made_of": made_of, "written": written}, indent=2) + "\n")
    drawn = [path for path in figures if path.suffix == ".png"]
    gallery = " and gallery.html" if figures and figures[-1].name == "gallery.html" else ""
    log.info("report: %s, %d figures%s in %s", metrics, len(drawn), gallery, run.out / "figures")


def is_posterior_of(path: Path, state: Checkpoint) -> bool:
    """Whether posterior.json exists, is undamaged, and describes this checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return bool(content["layers"]) and content["crc32"] == state.meta["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_of(record: Path, out: Path, made_of: dict[str, Any]) -> bool:
    """Whether the last report was made of the same results, and its files have not changed since."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        written: dict[str, int] = before["written"]
        return before["made_of"] == made_of and _checksums(out, [out / name for name in written]) == written
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checksums(folder: Path, paths: Sequence[Path]) -> dict[str, int]:
    """The CRC-32 of each file by its path in `folder`."""
    found = {}
    for path in paths:
        crc32 = 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                crc32 = zlib.crc32(block, crc32)
        found[str(path.relative_to(folder))] = crc32
    return found


def _metrics(run: Experiment, predictive: Path, shifted: Path, pruning: Path) -> dict[str, Any]:
    """The results in numbers: the parts train, test, shift, ood, temperature and pruning of metrics.json."""
    metrics: dict[str, Any] = {}
    attrs = netcdf.read_attrs(predictive)
    history = netcdf.read_group(predictive, "training")
    if history is not None:
        seconds = float(history["seconds"].sum())
        metrics["train"] = {
            "epochs": history.sizes["epoch"],
            "seconds": seconds,
            "samples_per_second": len(run.train_data) * history.sizes["epoch"] / seconds,
        }
        if run.of_classes:
            metrics["train"]["accuracy"] = float(history["accuracy"][-1])
    how = ("method", "sampling", "mean_draws", "median_draws", "max_draws", "mc_error", "max_mc_error")
    metrics["test"] = _finite({name: attrs[name] for name in ("num_samples", "seconds", *score_names(attrs))})
    metrics["test"] |= _finite({name: attrs[name] for name in how if name in attrs})
    uncertainty, observed = (netcdf.read_group(predictive, name) for name in ("uncertainty", "observed_data"))
    if run.of_classes and uncertainty is not None and observed is not None and observed["y"].ndim == 1:
        probs, labels = (torch.from_numpy(found.values) for found in (uncertainty["mean_probs"], observed["y"]))
        metrics["test"] |= reliance(probs, labels)
    if shifted.exists():
        metrics |= read_shift(shifted)
    metrics["pruning"] = []
    if pruning.exists() and (levels := netcdf.read_group(pruning, "pruning")) is not None:
        scores = score_names(netcdf.read_attrs(pruning))
        # A table of levels has had these of classes since version 0.1.0.
        scores = [name for name in scores if name != "brier"] if run.of_classes else scores
        names = ("threshold", "pruned_fraction", "nonzero", *scores, "seconds")
        metrics["pruning"] = [
            _finite({name: levels[name].values[at].item() for name in names}) for at in range(levels.sizes["level"])
        ]
    return metrics


def _results(run: Experiment) -> tuple[Path, Path, Path]:
    """The predictive, shift and pruning results of the run's settings, which may not be there."""
    settings = run.config.pruning
    pruning = pruning_path(run.out, settings)
    if not pruning.exists():
        # If that of other draws is there alone, it is refused by name.
        pruning = first_pruning_path(run.out, settings)
    return predictive_path(run.out, run.config.predict), run.out / "shift.nc", pruning


def _check(run: Experiment, predictive: Path, shifted: Path, pruning: Path) -> dict[str, Any] | None:
    """Refuse results that are out of date. Return the content of posterior.json, or None if there is none."""
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
            if difference := difference_from(path, inputs):
                raise FileError(f"{path} is out of date ({difference}); run its stage again first")
    path = run.out / "posterior.json"
    return _read_posterior(path, saved(run.config.predict.checkpoint)) if path.exists() else None


def _read_posterior(path: Path, state: Checkpoint) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        step, crc32 = content["step"], content.pop("crc32", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{path} is damaged; delete it, or run the stage diagnose again") from None
    if step != state.step or crc32 not in (None, state.meta["crc32"]):
        raise FileError(
            f"{path} is out of date: it is of step {step}, and predictive.nc of step {state.step} (or of another "
            "training); run the stage diagnose again first"
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


def _convergence(path: Path) -> list[dict[str, float]]:
    """The predictive's error by the number of draws; none of Sobol points."""
    attrs = netcdf.read_attrs(path)
    if attrs.get("sampling") == "sobol":
        return []
    drawn, likelihood, labels = (
        netcdf.read_group(path, name) for name in ("posterior_predictive", "log_likelihood", "observed_data")
    )
    assert drawn is not None
    assert labels is not None
    kept = drawn["obs_id"].values
    if likelihood is None or not len(kept):
        # Of many examples that are not in memory, single draws may not have been kept.
        return []
    return convergence(
        torch.from_numpy(drawn["probs"].values[0]),
        torch.from_numpy(likelihood["y"].values[0][:, kept]),
        torch.from_numpy(labels["y"].values[kept]),
        together=2 if attrs.get("sampling") == "antithetic" else 1,
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {name: None if value != value else value for name, value in row.items()}
