"""Stochastic variational inference on mini-batches: `fit`."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_bnn.data import Examples
from ppl_bnn.data.examples import is_in_order
from ppl_bnn.data.fingerprints import without_times
from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.building import build_step, enter
from ppl_bnn.inference.callbacks import Callback, Onlookers
from ppl_bnn.inference.checkpoint import Checkpoint
from ppl_bnn.inference.example_weights import checked_weights, weights_checksum
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.loggers import Logger
from ppl_bnn.inference.loop import Loop
from ppl_bnn.inference.manifest import write_manifest
from ppl_bnn.inference.own_optimizer import (
    ByScheduler,
    OwnOptimizer,
    OwnScheduler,
    Rates,
    Scheduled,
    check_own,
    name_of,
)
from ppl_bnn.inference.reading import lost_workers_named
from ppl_bnn.inference.saving import Checkpoints, last_checkpoint
from ppl_bnn.inference.settings import TrainSettings, kl_weight_at, kl_weights
from ppl_bnn.inference.training_data import batch_size_of, checked_data, given_data
from ppl_bnn.inference.validation import Validation
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.models.example_weights import Weights
from ppl_bnn.models.param_store import trained_store
from ppl_bnn.settings import decisive, described

log = logging.getLogger(__name__)


def fit(
    model: Callable,
    guide: Callable,
    x: Any,
    y: Tensor | np.ndarray | None = None,
    *,
    weights: Weights | None = None,
    epochs: int,
    batch_size: int | None = None,
    validation: Any = None,
    validate_every: int = TrainSettings.validate_every,
    validation_samples: int = TrainSettings.validation_samples,
    patience: int | None = TrainSettings.patience,
    monitor: str = TrainSettings.monitor,
    lr: float = TrainSettings.lr,
    optimizer: str | OwnOptimizer = TrainSettings.optimizer,
    scheduler: OwnScheduler | None = None,
    scheduler_every: Literal["step", "epoch"] = "step",
    beta2: float = TrainSettings.beta2,
    lr_schedule: str = TrainSettings.lr_schedule,
    lr_warmup: float = TrainSettings.lr_warmup,
    scale_lr_factor: float = TrainSettings.scale_lr_factor,
    clip_norm: float | None = TrainSettings.clip_norm,
    estimator: str = TrainSettings.estimator,
    kl_weight: float | Callable[[float], float] = 1.0,
    num_particles: int = TrainSettings.num_particles,
    accumulate: int = TrainSettings.accumulate,
    augment: str | Callable[[Any], Any] = TrainSettings.augment,
    precision: str = TrainSettings.precision,
    compile: bool = TrainSettings.compile,
    seed: int = TrainSettings.seed,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    progress: bool = True,
    folder: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    checkpoint_every: int = TrainSettings.checkpoint_every,
    checkpoint_minutes: float = TrainSettings.checkpoint_minutes,
    keep_checkpoints: int | None = TrainSettings.keep_checkpoints,
    should_stop: Callable[[], bool] = lambda: False,
    communicator: Communicator | None = None,
    lr_per_rank: bool = TrainSettings.lr_per_rank,
    bucket_mb: float = TrainSettings.bucket_mb,
    compression: str = TrainSettings.compression,
    compare_every: int | None = TrainSettings.compare_every,
    cuda_graph: bool = TrainSettings.cuda_graph,
    log_every: int = TrainSettings.log_every,
) -> list[dict[str, float]]:
    """Train `guide` (and the point estimates in `model`) by SVI on the KL-scaled ELBO.

    An interrupted training resumes from the last checkpoint in `folder`: on a CPU with bitwise-identical results, on a
    GPU where ``torch.backends.cudnn.deterministic`` is set. Another number of ranks shares what is left of the epoch.

    Args:
        model: a Pyro model called as model(x, y), such as `Classifier`; a deterministic network in it is trained by
            maximum likelihood (its guide then has no sites).
        guide: a `MeanFieldNormal` of that model, or another guide that `KLScaledELBO` takes, such as one of Pyro's
            autoguides or a function. `estimator` has no effect on these: their draws are used as they are.
        x, y: training inputs [N, ...] and labels or targets [N], tensors or numpy arrays; or, as `x` alone, whatever
            `as_examples` takes: memory-mapped arrays, a Dataset, a DataLoader, an iterable of known length.
        weights: [N], at least 0: example i's log likelihood is multiplied by weights[i], so 2 is the example twice. N,
            by which loss and KL are divided, stays the number of examples. A training resumes with the same weights.
        validation: data to predict after each `validate_every` epochs: what `predict` takes as x, with labels in it, or
            a pair (x, y). Their scores are in the records as ``val_nll`` and so on. With a `folder` the parameters with
            the best score are in ``checkpoints/best.safetensors``; with `patience` they are left in model and guide,
            and in the last checkpoint. The training's own numbers are the same with and without it.
        optimizer: one of the names below; a torch optimizer, built over ``[*guide.parameters(), *model.parameters()]``,
            or a function of a list of all parameters that gives one. Their learning rates are their own: `lr`,
            `scale_lr_factor` and `beta2` are then not for them.
        scheduler: a torch scheduler of the optimizer, or a function that makes one of it, in place of `lr_schedule`;
            ReduceLROnPlateau follows the monitored score of the validation.
        scheduler_every: what the scheduler counts: a ``step`` (an update) or an ``epoch``.
        augment: one of the names below, or a function of a batch's inputs.
        callbacks: what is called as the training runs (`ppl_bnn.inference.callbacks`).
        loggers: where the numbers of the training go, too (`ppl_bnn.inference.loggers`).
        kl_weight: a number above 0, or a function of training progress in [0, 1] that stays above 0
            (`ppl_bnn.inference.schedules.kl_schedule`): 0 would drop the prior from the model.
        progress: show a progress bar; without one, the log tells of each epoch.
        folder: where to write ``log.csv`` (an epoch a row), ``steps.csv`` (50 steps a row), ``performance.json``
            (`TrainingLog.write_performance`), ``manifest.json`` (`ppl_bnn.inference.manifest`) and ``checkpoints/``: at
            the start, by `checkpoint_every` and `checkpoint_minutes`, and at the end (`load_checkpoint`).
        origin: anything JSON about the run, kept in the checkpoints (``meta["origin"]``).
        should_stop: called after each step, on a GPU after each `log_every`; where it returns True, a checkpoint is
            written and Interrupted is raised.
        communicator: the ranks that train together (`ppl_bnn.distributed.connect`), each calling this alike. They start
            from rank 0's state, draw their own noise, and share each step's `batch_size` times `size` examples; rank 0
            alone reads and writes `folder` and shows progress.
        {settings}

    Without a `batch_size`, that of a DataLoader is used, else 100. Labels of data that are not in memory are checked
    batch by batch. Worker processes that read data end with `fit`.

    Before the first step model and guide are called once with two examples; what would not train is refused
    (`ppl_bnn.inference.door`). Modules that were put in evaluation mode stay in it (`ppl_bnn.models.modes`). Values of
    ``pyro.param`` statements are trained too, and are in the caller's parameter store afterwards.

    Returns:
        One record an epoch: epoch, step, seconds, loss, nll and kl (nats per datum), kl_weight (the mean by which
        loss = nll + kl_weight * kl), accuracy (of the single draws used in training, for categorical labels), lr,
        samples_per_second, and the scores of its validation.

    Raises:
        UserError: settings out of range; labels, outputs, sites, parameters or `num_data` that do not fit; `folder`
            holds a training with other settings; fewer examples than ranks, or ranks with other settings, inputs or
            labels than rank 0; bfloat16 on a device without it; a step that does not fit into memory;
            inputs that are NaN or infinite, once a loss or gradient is: the message names the first example.
        Diverged: the loss or a gradient is NaN or infinite; the message says where it began. Neither the
            parameters nor the last checkpoint hold any of it. Or a parameter is not the same on all ranks.
        CallbackFailed: a callback or logger raised an error, its cause. The last checkpoint is good.
        Interrupted: `should_stop` returned True, on any rank.
        RankLost: another rank is gone. The last checkpoint is good.
        WorkerLost: a worker process that reads data is gone. The last checkpoint is good.
    """
    given = locals()
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    data = given_data(x, y)
    plain["batch_size"] = batch_size_of(data, plain["batch_size"])
    settings, own = _settings(plain)
    weight_at = kl_weight_at(kl_weight)
    folder = None if folder is None else Path(folder)
    ranks = communicator or Alone()
    ranks.calls.clear()
    checked, reader = checked_data(model, guide, data, settings, ranks)
    weights = checked_weights(weights, len(reader.examples), checked)
    decided = _decided(settings, weight_at, reader.examples, weights, ranks, resumable=folder is not None)
    step = build_step(checked, reader, settings, ranks, decided["kl_weight"][0], **own)
    step.weights = weights
    rates: Rates = Scheduled(step.optimizer, settings, own="optimizer" in own, factor=ranks.size)
    decided["scheduler"] = None if scheduler is None else f"{name_of(scheduler)} each {scheduler_every}"
    if scheduler is not None:
        check_own(settings, optimizer=False, scheduler=True)
        followed = None if validation is None else monitor
        rates = ByScheduler(scheduler, step.optimizer, every=scheduler_every, monitor=followed)
    step.set_lr = rates.before_step
    # The scopes keep the caller's random state, validation setting, and parameter store but for `params`.
    with ExitStack() as scopes:
        scopes.callback(step.model.eval)
        if (flat := step.core.objective.flat) is not None:
            scopes.callback(flat.release)
        scopes.enter_context(forked_random(*step.optimizer.param_groups[0]["params"][:1]))
        scopes.enter_context(pyro.validation_enabled(False))
        torch.manual_seed(data_parallel.rank_seed(seed, ranks.rank))
        state = data_parallel.start(
            ranks, last_checkpoint(folder, ranks), decided, model=step.model, guide=step.guide,
            optimizer=step.optimizer, params=step.params, device=step.device, folder=folder,
        )  # fmt: skip
        if folder is not None and ranks.is_main:
            write_manifest(folder, step.model, step.guide, step.params)
        records, done = TrainingLog(state.meta if state else None), state.step if state else 0
        if state is not None and folder is not None and ranks.is_main:
            records.resume(folder, done)
        steps = done + _steps_left(records, len(reader.examples), settings, ranks)
        if records.rows and is_in_order(reader.examples) and ranks.is_main:
            log.info("resumed within an epoch of an iterable: exact only if the iterable repeats itself")
        checkpoints = Checkpoints(step, folder, {"steps": steps, "settings": decided, "origin": dict(origin or {})})
        with pyro.get_param_store().scope(checked.store):
            validating = None if validation is None else Validation(validation, step, checkpoints)
        _go_on(state, checkpoints, rates, validating)
        onlookers = Onlookers(step, records, callbacks, loggers)
        scopes.callback(onlookers.close)
        if state is None:
            checkpoints.write(0, records)
        # Not before: what is refused leaves the caller's store as it was.
        scopes.enter_context(trained_store(checked.store, checked.params))
        enter(scopes, step)
        bar = tqdm(total=steps, initial=done, disable=not (progress and ranks.is_main), unit="step", dynamic_ncols=True)
        scopes.enter_context(bar)
        batches = reader.batches(range(len(records.epochs), settings.epochs), skip=records.rows)
        scopes.enter_context(closing(batches))
        scopes.enter_context(lost_workers_named())
        Loop(step, batches, checkpoints, records, bar, rates, onlookers, validating, weight_at, should_stop).run(done)
    if ranks.size > 1 and ranks.is_main and steps > done:
        data_parallel.log_messages(ranks, steps - done)
    return records.epochs


fit.__doc__ = (fit.__doc__ or "").format(settings=described(TrainSettings).lstrip())


def _settings(given: dict[str, Any]) -> tuple[TrainSettings, dict[str, Any]]:
    """The settings, in which what is the user's own has a name, and the optimizer and augmentation that are."""
    if isinstance(given["optimizer"], type):
        given = given | {"optimizer": name_of(given["optimizer"])}
    own = {name: given[name] for name in ("optimizer", "augment") if not isinstance(given[name], str)}
    for name, thing in own.items():
        if not (callable(thing) or isinstance(thing, torch.optim.Optimizer)):
            raise UserError(f"{name} must be a name, an object or a function, got {thing!r}")
    names = {name: getattr(TrainSettings, name) for name in own}
    settings = TrainSettings(**{known.name: (given | names)[known.name] for known in fields(TrainSettings)})
    settings.check()
    if given["validation"] is None and settings.patience is not None:
        raise UserError(f"patience {settings.patience} waits for a better score of a validation: give validation data")
    for name in ("monitor", "validate_every", "validation_samples") if given["validation"] is None else ():
        if (value := getattr(settings, name)) != getattr(TrainSettings, name):
            raise UserError(f"{name} {value!r} has no effect without validation data: leave it out, or give some")
    if given["scheduler"] is None and given["scheduler_every"] != "step":
        raise UserError(f"scheduler_every {given['scheduler_every']!r} has no effect without a scheduler: leave it out")
    check_own(settings, optimizer="optimizer" in own, scheduler=False)
    for name, thing in own.items():
        setattr(settings, name, name_of(thing))
    return settings, own


def _go_on(state: Checkpoint | None, checkpoints: Checkpoints, rates: Rates, validation: Validation | None) -> None:
    """Give what is kept in checkpoints its state, and let checkpoints keep it."""
    checkpoints.more["scheduler"] = rates.state
    if validation is not None:
        checkpoints.more["validation"] = validation.state
    if state is not None:
        rates.load(state.meta.get("scheduler"))
        if validation is not None:
            validation.load(state.meta.get("validation"))
        if "ended" in state.meta:
            checkpoints.meta.update(steps=state.step, ended=state.meta["ended"])


def _decided(
    settings: TrainSettings, weight_at: Callable[[float], float], examples: Examples, weights: Tensor | None,
    ranks: Communicator, *, resumable: bool,
) -> dict[str, Any]:  # fmt: skip
    """What decides this training, as JSON; the same on all ranks, or UserError."""
    decided = {name: getattr(settings, name) for name in decisive(TrainSettings)}
    decided |= {"kl_weight": kl_weights(weight_at, settings.optimizer), "num_data": len(examples), "ranks": ranks.size}
    decided["weights"] = weights_checksum(weights)
    if len(examples) < ranks.size:
        raise UserError(f"{len(examples)} examples are too few for {ranks.size} ranks: start fewer")
    fingerprint = examples.fingerprint() if ranks.size > 1 or resumable else None
    if ranks.size > 1:
        messages = {"bucket_mb": settings.bucket_mb, "compare_every": settings.compare_every}
        alike = [json.dumps(decided | messages), without_times(str(fingerprint))]
        ranks.check_same("settings, inputs or labels", [text.encode() for text in alike])
    return decided | {"data": fingerprint}


def _steps_left(records: TrainingLog, count: int, settings: TrainSettings, ranks: Communicator) -> int:
    size = settings.batch_size * ranks.size * settings.accumulate
    this_epoch = math.ceil((count - records.rows) / size)
    return this_epoch + (settings.epochs - len(records.epochs) - 1) * math.ceil(count / size)
