"""What a result was made of, saved in its file. A result is recomputed if that changed; results are never mixed."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import PredictConfig, PruningConfig, ShiftConfig
from ppl_bnn.experiment.identity import read_identity
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.inference.checkpoint import Checkpoint
from ppl_bnn.results import netcdf

Settings = PredictConfig | ShiftConfig | PruningConfig

# Of a sweep: whether the images whose draws it keeps were chosen by their uncertainty.
RANKED = "ranked_by_predictive"
_OLD_RANKED = "images ranked by predictive.nc"

log = logging.getLogger(__name__)


def inputs_of(
    run: Experiment, state: Checkpoint, settings: PredictConfig | ShiftConfig | PruningConfig
) -> dict[str, Any]:
    """The checkpoint, settings and data that a result of this run is made of, as JSON."""
    inputs = {
        "checkpoint": state.step,
        "crc32": state.meta["crc32"],
        "settings": dataclasses.asdict(settings),
        "data": run.identity(run.test_images),
    }
    if isinstance(settings, PredictConfig):
        # It has a file of its own.
        del inputs["settings"]["train_log_likelihood"]
    else:
        inputs["predict.norm_images"] = run.config.predict.norm_images
    if isinstance(settings, PruningConfig):
        inputs["predict.compact"] = run.config.predict.compact
    if isinstance(settings, PruningConfig):
        if not settings.finetune_epochs:
            # It has a file of its own; fine-tuned, it is one of the levels.
            del inputs["settings"]["save_fraction"]
        inputs[RANKED] = (run.out / "predictive.nc").exists()
    return inputs


def up_to_date(path: Path, inputs: dict[str, Any], stage: str) -> bool:
    """Whether a result exists and was made of `inputs`; the log says why it is recomputed."""
    if not path.exists():
        return False
    if found := difference_from(path, inputs):
        log.info("%s: recomputing %s (%s)", stage, path.name, found)
        return False
    log.info("%s: %s is up to date", stage, path.name)
    return True


def difference_from(path: Path, inputs: dict[str, Any]) -> str | None:
    """The first difference between what a result was made of and `inputs`, or None."""
    return saved_config.first_difference(inputs, read_inputs(netcdf.read_attrs(path).get("inputs", {})))


def read_inputs(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A result's inputs as they were saved, by this version or by version 0.1.0."""
    inputs = dict(saved)
    if "data" in inputs:
        inputs["data"] = read_identity(inputs["data"])
    if _OLD_RANKED in inputs:
        inputs[RANKED] = inputs.pop(_OLD_RANKED)
    # Version 0.1.0 had no such setting.
    return {"predict.compact": "auto", **inputs, "settings": {"compact": "auto", **inputs.get("settings", {})}}
