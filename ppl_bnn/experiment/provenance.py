"""What a result was made of, saved in its file. A result is recomputed if that changed; results are never mixed."""

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppl_bnn.errors import FileError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import PredictConfig, PruningConfig, ShiftConfig
from ppl_bnn.experiment.identity import read_identity
from ppl_bnn.experiment.located import without_folder
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.experiment.shift_kinds import without_effect
from ppl_bnn.inference import checkpoint
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
        "data": run.identity(run.test_data),
        "model.likelihood": run.config.model.likelihood,
    }
    if run.code:
        inputs["code"] = run.code
    if isinstance(settings, PredictConfig):
        # It has a file of its own.
        del inputs["settings"]["train_log_likelihood"]
        # What is in the file counts, not where it lies.
        if (file := inputs["settings"].pop("posterior")) is not None:
            try:
                inputs["posterior"] = f"{zlib.crc32(Path(file).read_bytes()):08x}"
            except OSError as error:
                raise FileError(
                    f"predict.posterior {file} cannot be read ({error.strerror}): say where it is, or set it to null"
                ) from None
    else:
        inputs["predict.norm_images"] = run.config.predict.norm_images
    if isinstance(settings, ShiftConfig):
        for name in without_effect(run):
            del inputs["settings"][name]
        # A mapping would be compared by the names that are still there.
        inputs["settings"]["own"] = [[name, levels] for name, levels in settings.own.items()]
        if settings.ood is not None:
            # What is in a file counts, not where it lies (`shift_kinds.outside_identities`).
            inputs["settings"]["ood"] = [without_folder(name) for name in settings.ood]
    if isinstance(settings, PruningConfig):
        inputs["predict.compact"] = run.config.predict.compact
        if not settings.finetune_epochs:
            # It has a file of its own; fine-tuned, it is one of the levels.
            del inputs["settings"]["save_fraction"]
        if settings.keep_images is None:
            inputs[RANKED] = predictive_path(run.out, run.config.predict).exists()
    return inputs


def predictive_path(out: Path, settings: PredictConfig) -> Path:
    """``predictive.nc``, ``predictive-step-00006000.nc`` of another saved step than the last, or
    ``predictive-pruned.nc`` of the posterior file ``pruned.safetensors``."""
    if settings.posterior is not None:
        return out / f"predictive-{Path(settings.posterior).stem}.nc"
    return out / f"predictive{_of_step(settings.checkpoint)}.nc"


def pruning_path(out: Path, settings: PruningConfig) -> Path:
    """``pruning.nc``, or the file beside it of another saved step, number of draws or seed.

    A saved step that is named has a file of its own: ``pruning-step-00006000.nc``. Draws of the same step that are not
    those of the file that is there go beside it: ``pruning-100draws.nc``, ``pruning-seed1.nc``, or both. So the first
    sweep of a step keeps the short name, and the same command finds its file again.
    """
    first = first_pruning_path(out, settings)
    if not first.exists():
        return first
    name, there = first.stem, netcdf.read_attrs(first).get("inputs", {}).get("settings", {})
    if there.get("num_samples", settings.num_samples) != settings.num_samples:
        name += f"-{settings.num_samples}draws"
    if there.get("seed", settings.seed) != settings.seed:
        name += f"-seed{settings.seed}"
    return first.with_stem(name)


def pruned_path(out: Path, settings: PruningConfig) -> Path:
    """The file of the pruned posterior that is saved beside a sweep, ``pruned.safetensors`` beside ``pruning.nc``."""
    path = pruning_path(out, settings)
    return path.with_name(path.name.replace("pruning", "pruned", 1)).with_suffix(".safetensors")


def result_path(out: Path, name: str) -> Path:
    """The file of a result, ``predictive`` or ``pruning``, that the settings saved in an out folder name."""
    path = out / "config.yaml"
    saved = saved_config.read(path) if path.exists() else {}
    if name == "predictive":
        return predictive_path(out, PredictConfig(**saved_config.completed("predict", saved.get("predict", {}))))
    return pruning_path(out, PruningConfig(**saved_config.completed("pruning", saved.get("pruning", {}))))


def first_pruning_path(out: Path, settings: PruningConfig) -> Path:
    """The file of the first sweep of a saved step."""
    return out / f"pruning{_of_step(settings.checkpoint)}.nc"


def _of_step(name: str) -> str:
    return "" if name == "last" else f"-{checkpoint.full_name(name)}"


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
    # Earlier versions had no such settings.
    settings = inputs.get("settings", {})
    younger: dict[str, Any] = {"compact": "auto", "keep_images": None, "save_snr": False}
    if "temperature_on" in settings:
        younger |= {"own": [], "column": None}
    defaults = {"predict.compact": "auto", "model.likelihood": "categorical", "shift.ood": {}}
    return {**defaults, **inputs, "settings": {**younger, **settings}}
