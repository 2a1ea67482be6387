"""The prune stage: a sweep over pruning levels, each fine-tuned first if asked."""

import json
import logging
import shutil
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn.experiment.provenance import inputs_of, predictive_path, pruned_path, pruning_path, up_to_date
from ppl_bnn.experiment.scores import SCORES, told
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.guides import median_latents
from ppl_bnn.inference.posterior_file import save_posterior
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.models import Model, site_priors
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.pruning import Pruned, finetune, prune
from ppl_bnn.pruning.sweep import sweep
from ppl_bnn.results import netcdf

# Fine-tunings that are not yet part of pruning.nc.
_FINETUNING = "finetuning"
# Of numbers, single draws are kept of at most this number of examples.
_KEPT_NUMBERS = 100
# Of each class, those of this number of the most uncertain examples.
_KEPT_UNCERTAIN = 10

log = logging.getLogger(__name__)


def pruning_study(run: Experiment) -> None:
    """Sweep over the pruning levels and write pruning.nc (`pruning_path`), and pruned.safetensors if asked for."""
    settings = run.config.pruning
    if not run.guide.sites:
        log.info("prune: skipped, a deterministic network has no signal-to-noise ratio to prune by")
        return
    state = run.restored(settings.checkpoint)
    path = pruning_path(run.out, settings)
    saved = pruned_path(run.out, settings)
    how: dict[str, Any] = {"scope": settings.scope, "criterion": settings.criterion, "structure": settings.structure}
    example = run.example()
    how["priors"] = site_priors(run.model, *example, given=median_latents(run.model, run.guide, *example))
    save, tune, fractions = settings.save_fraction, settings.finetune_epochs > 0, settings.fractions
    inputs = inputs_of(run, state, settings)

    def save_untuned() -> None:
        if save is not None and not tune:
            _save_pruned(run.model, prune(run.guide, fraction=save, **how), saved)

    if (save is None or not tune or saved.exists()) and up_to_date(path, inputs, "prune"):
        save_untuned()
        return
    # Here, for what it imports takes seconds: see `experiment.stages`.
    from ppl_bnn.results.pruning import sweep_to_inference_data

    x, y = run.examples_of(run.test_data)
    levels = sweep(
        run.model, run.guide, x, y, **how,
        thresholds=settings.thresholds(),
        fractions=[*fractions, save] if tune and save is not None and save not in fractions else fractions,
        tuned=_finetuning(run) if tune else None,
        num_samples=settings.num_samples, seed=settings.seed, norm_inputs=run.norm_inputs(),
        compact=run.config.predict.compact, keep=_images_to_keep(run), progress=run.progress,
        should_stop=run.should_stop,
    )  # fmt: skip
    for level in levels:
        for site, nonzero in level.pruned.nonzero.items():
            if nonzero == 0:
                log.warning(
                    "prune: at %.4g%% pruned (%s < %.3g) no weight is left in %s: the network predicts from the "
                    "layers after it alone",
                    100 * level.pruned.fraction, settings.criterion, level.pruned.threshold, site,
                )  # fmt: skip
    if tune and save is not None:
        level = next(level for level in levels if level.fraction == save)
        _save_pruned(level.model, level.pruned, saved)
    # Figures group results by it: trainings that differ in their seed alone are of one network.
    training = {**run.origin, "train": {name: value for name, value in run.origin["train"].items() if name != "seed"}}
    attrs = {"run": run.name, "inputs": inputs, "training": training, "step": state.step, "generator": GENERATOR}
    attrs[SCORES] = list(levels[0].predictive.scores())
    idata = sweep_to_inference_data(levels, run.test_data, attrs=attrs, guide=run.guide, save_snr=settings.save_snr)
    netcdf.save(idata, path)
    # Not before: stopped in the sweep, it would lie beside the levels of another one.
    save_untuned()
    shutil.rmtree(run.out / _FINETUNING, ignore_errors=True)
    for level in levels:
        found = level.predictive.summary()
        log.info(
            "prune: %.4g%% pruned (%s < %.3g), %d weights left: %s, %.1f s",
            100 * level.pruned.fraction, settings.criterion, level.pruned.threshold, sum(level.pruned.nonzero.values()),
            told(found, but=("brier",)), found["seconds"],
        )  # fmt: skip


def _save_pruned(model: nn.Module, pruned: Pruned, path: Path) -> None:
    save_posterior(path, model, pruned.guide)
    count = sum(pruned.nonzero.values())
    log.info("prune: wrote %s with %d weights, %d bytes", path.name, count, path.stat().st_size)


def _finetuning(run: Experiment) -> Callable[[Pruned], tuple[Model, Pruned]]:
    train, settings = run.config.train, run.config.pruning
    x, y = run.examples_of(run.train_data)
    how: dict[str, Any] = {known.name: getattr(train, known.name) for known in fields(TrainSettings)}
    how |= {"lr": settings.finetune_lr or train.lr, "lr_schedule": "cosine", "lr_warmup": 0.0, "keep_checkpoints": 1}
    how |= {"epochs": settings.finetune_epochs, "kl_weight": train.kl_weight, "seed": settings.seed}
    # A level is fine-tuned for all of its epochs.
    how["patience"] = None

    def tuned(pruned: Pruned) -> tuple[Model, Pruned]:
        log.info("prune: fine-tuning the network with %.4g%% pruned", 100 * pruned.fraction)
        return finetune(
            run.model, pruned, x, y, **how, progress=run.progress, should_stop=run.should_stop,
            folder=run.out / _FINETUNING / _name_of(pruned, how),
        )  # fmt: skip

    return tuned


def _name_of(pruned: Pruned, how: dict[str, Any]) -> str:
    # What is tuned, and how: an interrupted fine-tuning resumes only if both are the same.
    crc = zlib.crc32(json.dumps(how).encode())
    for tensor in pruned.guide.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), crc)
    return f"{pruned.fraction:.4f}-{crc:08x}"


def _images_to_keep(run: Experiment) -> Tensor:
    if (asked := run.config.pruning.keep_images) is not None:
        return torch.tensor(sorted(set(asked)))
    targets = run.test_data.targets
    evenly = torch.linspace(0, len(targets) - 1, min(len(targets), _KEPT_NUMBERS)).round().long()
    if not run.of_classes and targets.dim() == 1:
        # From the smallest target to the largest.
        return targets.argsort(stable=True)[evenly].sort().values
    order = _most_uncertain(run)
    if targets.dim() > 1 or targets.is_floating_point():
        # Several targets an example, or soft labels.
        return torch.cat([evenly, order[:_KEPT_UNCERTAIN]]).unique()
    # Of each class the first example and, where the predictive is there, those with the most epistemic uncertainty.
    kept = set()
    for label in targets.unique().tolist():
        kept.add(int((targets == label).nonzero()[0]))
        kept.update(order[targets[order] == label][:_KEPT_UNCERTAIN].tolist())
    return torch.tensor(sorted(kept))


def _most_uncertain(run: Experiment) -> Tensor:
    """Positions of the test examples, the most epistemic uncertainty first where the predictive is there."""
    path, count = predictive_path(run.out, run.config.predict), len(run.test_data)
    uncertainty = netcdf.read_group(path, "uncertainty") if path.exists() else None
    if uncertainty is None or uncertainty.sizes["obs_id"] != count:
        return torch.arange(count)
    epistemic = torch.from_numpy(uncertainty["epistemic"].values)
    return epistemic.reshape(count, -1).mean(1).argsort(descending=True, stable=True)
