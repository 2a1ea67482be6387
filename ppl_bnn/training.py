"""Stochastic variational inference on mini-batches: `fit`."""

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from pyro.infer import SVI
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn import checkpoint
from ppl_bnn.elbo import KLScaledELBO
from ppl_bnn.files import write_text
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.mean_field import draw_seed

log = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "rmsprop")
LR_SCHEDULES = ("constant", "cosine")
SETTINGS = (
    "epochs", "batch_size", "lr", "optimizer", "lr_schedule", "scale_lr_factor", "clip_norm", "estimator",
    "num_particles", "checkpoint_every",
)  # fmt: skip


class Interrupted(Exception):
    """Work stopped because it was asked to; a training has saved a checkpoint first."""


class Diverged(RuntimeError):
    """The loss became NaN or infinite."""


def fit(
    model: nn.Module,
    guide: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int = 100,
    lr: float = 1e-3,
    optimizer: str = "adam",
    lr_schedule: str = "constant",
    scale_lr_factor: float = 1.0,
    clip_norm: float | None = None,
    estimator: str = "plain",
    kl_weight: float | Callable[[float], float] = 1.0,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
    folder: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    checkpoint_every: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train `guide` (and the point estimates in `model`) by SVI on the KL-scaled ELBO.

    Args:
        model: a Pyro model called as model(x, y), such as `Classifier`; a deterministic network in it is trained by
            maximum likelihood (its guide then has no sites).
        guide: a `MeanFieldNormal` of that model, or any guide that is an ``nn.Module``.
        x, y: training inputs [N, ...] and labels [N]; N is the ELBO's num_data.
        lr_schedule: ``constant``, or ``cosine`` from `lr` to 0 over the training.
        scale_lr_factor: the learning rate of the guide's scales is this times `lr`.
        clip_norm: clip the gradient's total norm to this.
        estimator: ``plain``, ``flipout`` or ``local`` (`ppl_bnn.guides`).
        kl_weight: a number, or a function of training progress in [0, 1] (`ppl_bnn.elbo.kl_schedule`).
        folder: where to write ``log.csv`` and ``checkpoints/``, every `checkpoint_every` epochs and at the end.
            A training that was cut off there goes on from its last checkpoint, bitwise as if it had not been.
        origin: anything JSON about the run, kept in the checkpoints (``meta["origin"]``).
        should_stop: asked after each step; when it says yes, a checkpoint is written and Interrupted is raised.

    Returns:
        One record an epoch: epoch, step, seconds, loss, nll and kl (nats per datum), kl_weight, accuracy (of the
        single draws used in training, for categorical labels), lr, samples_per_second.

    Raises:
        ValueError: settings out of range, or `folder` holds a training with other settings.
        Diverged: the loss is NaN or infinite.
        Interrupted: `should_stop` said so.
    """
    settings = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer, "lr_schedule": lr_schedule,
        "scale_lr_factor": scale_lr_factor, "clip_norm": clip_norm, "estimator": estimator,
        "num_particles": num_particles, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    check_settings(settings)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y need the same number of examples, at least 1; got {len(x)} and {len(y)}")
    weight_at = kl_weight if callable(kl_weight) else lambda _: float(kl_weight)
    decisive = {**settings, "seed": seed, "num_data": len(x), "kl_weight": [weight_at(k / 97) for k in range(0, 97, 6)]}
    del decisive["checkpoint_every"]
    steps_per_epoch = math.ceil(len(x) / batch_size)
    torch_optimizer = _build_optimizer(optimizer, model, guide, lr, scale_lr_factor)
    elbo = KLScaledELBO(len(x), num_particles=num_particles)
    accuracy = _BatchAccuracy()
    history: list[dict[str, float]] = []
    sums: dict[str, float] = {}
    step = 0

    def write_checkpoint() -> None:
        if folder is not None:
            meta = {"history": history, "sums": sums, "steps": epochs * steps_per_epoch, "settings": decisive}
            meta["origin"] = dict(origin or {})
            kept = {"model": model, "guide": guide, "optimizer": torch_optimizer}
            checkpoint.save(folder / "checkpoints", step, meta=meta, **kept)  # type: ignore[arg-type]

    # The scopes keep the caller's parameter store, random state and validation setting as they were.
    devices = [x.device] if x.is_cuda else []
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        if folder is not None and (found := checkpoint.saved(folder / "checkpoints")):
            state = checkpoint.load(found[-1])
            _check_same(state.meta["settings"], decisive, folder)
            checkpoint.restore(state, model=model, guide=guide, optimizer=torch_optimizer)
            checkpoint.restore_random(state, x.device)
            history, sums, step = state.meta["history"], state.meta["sums"], state.step
        model.train()
        svi = SVI(model, guide, _OneOptimizer(torch_optimizer, clip_norm), loss=elbo)
        bar = tqdm(total=epochs * steps_per_epoch, initial=step, disable=not progress, unit="step", dynamic_ncols=True)
        with bar, ESTIMATORS[estimator](), accuracy:
            while step < epochs * steps_per_epoch:
                epoch = step // steps_per_epoch
                for rows in _batches(len(x), batch_size, epoch, seed, skip=step % steps_per_epoch, device=x.device):
                    started = time.perf_counter()
                    now = step / (epochs * steps_per_epoch)
                    elbo.kl_weight = weight_at(now)
                    _set_lr(torch_optimizer, lr_schedule, now)
                    loss = svi.step(x[rows], y[rows])
                    step += 1
                    if not math.isfinite(loss):
                        raise Diverged(
                            f"the loss became {loss} at step {step} (nll {elbo.terms.nll}, kl {elbo.terms.kl} nats): "
                            "try a smaller train.lr, train.clip_norm, or a smaller guide.init_scale"
                        )
                    _add(sums, elbo, accuracy, len(rows), time.perf_counter() - started)
                    if bar.update():
                        bar.set_postfix_str(_shown(_means(sums)), refresh=False)
                    if step % steps_per_epoch and should_stop():
                        write_checkpoint()
                        raise Interrupted(f"stopped at step {step} of {epochs * steps_per_epoch}")
                history.append(_record(epoch, step, sums, elbo.kl_weight, torch_optimizer))
                sums = {}
                # The log first: a training that goes on writes it anew, one that is complete does not.
                if folder is not None:
                    write_text(folder / "log.csv", _as_csv(history))
                if (epoch + 1) % checkpoint_every == 0 or epoch + 1 == epochs or should_stop():
                    write_checkpoint()
                if not progress:
                    log.info("epoch %d of %d: %s", epoch + 1, epochs, _shown(history[-1]))
                if should_stop() and epoch + 1 < epochs:
                    raise Interrupted(f"stopped after epoch {epoch + 1} of {epochs}")
        model.eval()
    return history


class _OneOptimizer(PyroOptim):
    """One torch optimizer over all parameters: Pyro's default of one for each tensor is slow."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(self, params: object, *args: object, **kwargs: object) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _BatchAccuracy(Messenger):
    """Reads off the last step's correct answers where the observed site is categorical."""

    correct = math.nan

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and isinstance(msg["fn"], Categorical):
            self.correct = float((msg["fn"].logits.argmax(-1) == msg["value"]).sum())


def check_settings(settings: Mapping[str, Any], *, prefix: str = "") -> None:
    """Raise ValueError for the first of `fit`'s settings (those in SETTINGS) that is out of range, as prefix + name."""
    for name, known in (("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES), ("estimator", tuple(ESTIMATORS))):
        if settings[name] not in known:
            raise ValueError(f"{prefix}{name} must be one of {', '.join(known)}; got {settings[name]!r}")
    for name in ("epochs", "batch_size", "num_particles", "checkpoint_every"):
        if settings[name] < 1:
            raise ValueError(f"{prefix}{name} must be at least 1, got {settings[name]}")
    for name in ("lr", "scale_lr_factor", "clip_norm"):
        value = settings[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{prefix}{name} must be positive and finite, got {value}")


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"{folder} holds a training with {name} {before[name]!r}, this one has {value!r}; use another folder"
            )


def _build_optimizer(
    name: str, model: nn.Module, guide: nn.Module, lr: float, scale_lr_factor: float
) -> torch.optim.Optimizer:
    scales = [value for key, value in guide.named_parameters() if key.startswith("unconstrained_scale.")]
    rest = [value for key, value in guide.named_parameters() if not key.startswith("unconstrained_scale.")]
    groups = [{"params": [*model.parameters(), *rest], "lr": lr}]
    if scales:
        groups.append({"params": scales, "lr": lr * scale_lr_factor})
    for group in groups:
        group["initial_lr"] = group["lr"]
    if name == "rmsprop":
        # Keras's constants, with which the study was run: torch's own are alpha 0.99 and eps 1e-8.
        return torch.optim.RMSprop(groups, alpha=0.9, eps=1e-7)
    return torch.optim.Adam(groups, fused=True)


def _set_lr(optimizer: torch.optim.Optimizer, schedule: str, progress: float) -> None:
    factor = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _batches(n: int, size: int, epoch: int, seed: int, *, skip: int, device: torch.device) -> Iterator[Tensor]:
    # The order depends on (seed, epoch) alone, so a resumed epoch visits exactly what was left of it.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(draw_seed(seed, epoch))).to(device)
    yield from order.split(size)[skip:]


def _add(sums: dict[str, float], elbo: KLScaledELBO, accuracy: _BatchAccuracy, rows: int, seconds: float) -> None:
    terms = elbo.terms
    parts = {"loss": terms.loss * rows, "nll": terms.nll * rows, "kl": terms.kl * rows, "correct": accuracy.correct}
    for name, value in {**parts, "rows": rows, "seconds": seconds}.items():
        sums[name] = sums.get(name, 0.0) + value


def _means(sums: dict[str, float]) -> dict[str, float]:
    rows = sums["rows"]
    means = {name: sums[name] / rows for name in ("loss", "nll", "kl")}
    return {**means, "accuracy": sums["correct"] / rows, "samples_per_second": rows / sums["seconds"]}


def _shown(means: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {means[name]:.4f}" for name in ("loss", "nll", "kl", "accuracy"))
    return f"{shown}, {means['samples_per_second']:.0f} samples/s"


def _record(
    epoch: int, step: int, sums: dict[str, float], kl_weight: float, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    means = _means(sums)
    return {
        "epoch": epoch + 1,
        "step": step,
        "seconds": sums["seconds"],
        **{name: means[name] for name in ("loss", "nll", "kl")},
        "kl_weight": kl_weight,
        "accuracy": means["accuracy"],
        "lr": optimizer.param_groups[0]["lr"],
        "samples_per_second": means["samples_per_second"],
    }


def _as_csv(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
