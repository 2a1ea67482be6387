"""What a result was made of, kept in its file: it is made again where that changed, and never mixed."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import PredictConfig, PruningConfig, ShiftConfig
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.inference.checkpoint import Checkpoint
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.results import netcdf

Settings = PredictConfig | ShiftConfig | PruningConfig

# Of a sweep: whether the images whose draws it keeps were chosen by their uncertainty.
RANKED = "images ranked by predictive.nc"
# What made the random numbers of the draws.
DRAWN_BY = "generator"

log = logging.getLogger(__name__)


def inputs_of(
    run: Experiment, state: Checkpoint, settings: PredictConfig | ShiftConfig | PruningConfig
) -> dict[str, Any]:
    """The checkpoint, settings and data that a result of this run is made of, as JSON."""
    inputs = {
        "checkpoint": state.step,
        "crc32": state.meta["crc32"],
        "settings": dataclasses.asdict(settings),
        DRAWN_BY: GENERATOR,
        "data": f"{len(run.test_images)} {run.test_images.split} {run.named(run.test_images)}",
    }
    if isinstance(settings, PredictConfig):
        # It has a file of its own.
        del inputs["settings"]["train_log_likelihood"]
    else:
        inputs["predict.norm_images"] = run.config.predict.norm_images
    if isinstance(settings, PruningConfig):
        if not settings.finetune_epochs:
            # It has a file of its own; fine-tuned, it is one of the levels.
            del inputs["settings"]["save_fraction"]
        inputs[RANKED] = (run.out / "predictive.nc").exists()
    return inputs


def up_to_date(path: Path, inputs: dict[str, Any], stage: str) -> bool:
    """Whether a result is there and made of `inputs`; the log says why it is made again."""
    if not path.exists():
        return False
    if found := difference_from(path, inputs):
        log.info("%s: doing %s again, because %s", stage, path.name, found)
        return False
    log.info("%s: %s is up to date", stage, path.name)
    return True


def difference_from(path: Path, inputs: dict[str, Any]) -> str | None:
    """In what a result is not made of `inputs`, or None."""
    return saved_config.first_difference(inputs, netcdf.read_attrs(path).get("inputs", {}))
