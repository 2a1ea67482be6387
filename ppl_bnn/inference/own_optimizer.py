"""An optimizer and a scheduler of the user's own: what they must be, and their part of a step and of a checkpoint."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ppl_bnn.errors import UserError, some
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inference.optimizers import set_lr
from ppl_bnn.inference.settings import BETTER_WHEN_LARGER, TrainSettings
from ppl_bnn.models.random_network import point_parameters

OwnOptimizer = torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer]
OwnScheduler = LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler]


def own_optimizer(
    given: OwnOptimizer, model: nn.Module, guide: nn.Module, params: Mapping[str, Tensor], *, kl_per_datum: float
) -> torch.optim.Optimizer:
    """The user's optimizer, built already or by a function of the parameters: of all that is trained, once.

    Args:
        params: the unconstrained values of ``pyro.param`` statements, by name.
        kl_per_datum: see `build_optimizer`.

    Raises:
        UserError: no torch optimizer, one that calls the model itself, or one of other parameters than the training's.
    """
    named = {**params, **point_parameters(model)}
    named |= {f"{name} of the guide": value for name, value in guide.named_parameters()}
    trained = {name: value for name, value in named.items() if value.requires_grad}
    optimizer = given
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = given(list(dict.fromkeys(trained.values())))  # type: ignore[operator]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"optimizer must give a torch.optim.Optimizer, got a {type(optimizer).__name__}: return one from the "
            "function of the parameters"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("optimizer LBFGS calls the model several times a step, which a random loss does not allow")
    known = {id(one) for part in (model, guide) for one in part.parameters()} | {id(one) for one in params.values()}
    there = [one for group in optimizer.param_groups for one in group["params"]]
    if strange := [one for one in there if id(one) not in known]:
        raise UserError(
            f"the optimizer has {len(strange)} parameters that are neither the model's nor the guide's, the first of "
            f"shape {list(strange[0].shape)}: build it of [*guide.parameters(), *model.parameters()], after both"
        )
    have = {id(one) for one in there}
    if missing := [name for name, one in trained.items() if id(one) not in have]:
        raise UserError(
            f"the optimizer lacks {some(missing)}: build it of [*guide.parameters(), *model.parameters()], or freeze "
            "what is not to be trained by requires_grad_(False)"
        )
    try:
        json.dumps([{**group, "params": None} for group in optimizer.param_groups])
    except TypeError as error:
        raise UserError(
            f"the optimizer has a setting that a checkpoint cannot hold ({error}): give numbers, a learning rate too"
        ) from None
    if isinstance(optimizer, IVON):
        optimizer.param_groups[0]["kl_per_datum"] = kl_per_datum
    return optimizer


def check_own(settings: TrainSettings, *, optimizer: bool, scheduler: bool) -> None:
    """Raise UserError for a setting that has no effect beside an own optimizer or scheduler."""
    of_optimizer = ("lr", "beta2", "scale_lr_factor") if optimizer else ()
    of_scheduler = ("lr_schedule", "lr_warmup", "lr_per_rank") if scheduler else ()
    for what, names in (("optimizer", of_optimizer), ("scheduler", of_scheduler)):
        for name in names:
            value = getattr(settings, name)
            if value != getattr(TrainSettings, name):
                raise UserError(
                    f"{name} {value!r} has no effect beside an own {what}: leave it out, or set it in the {what}"
                )


def name_of(given: Any) -> str:
    """What settings, checkpoints and messages call an object or function of the user's own: ``module:name``."""
    while hasattr(given, "func"):
        given = given.func
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}:{named.__qualname__}"


class Rates(Protocol):
    """What sets the learning rates of a training."""

    def before_step(self, progress: float) -> None:
        """Before a step, at this share of the training."""

    def after_step(self) -> None:
        """After an update."""

    def after_epoch(self, score: float | None) -> None:
        """After an epoch, with the monitored score of its validation."""

    def state(self) -> Any:
        """Its state, as JSON."""

    def load(self, state: Any) -> None:
        """Go on from a state."""


class Scheduled:
    """Learning rates by the settings; of an optimizer of the user's own that has no schedule, whatever they are."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: TrainSettings, *, own: bool, factor: int) -> None:
        self._optimizer, self._settings = optimizer, settings
        self._factor = factor if settings.lr_per_rank else 1
        self._idle = own and settings.lr_schedule == "constant" and settings.lr_warmup == 0 and self._factor == 1
        if own and not self._idle:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    def before_step(self, progress: float) -> None:
        """See `Rates`."""
        if not self._idle:
            settings = self._settings
            set_lr(self._optimizer, settings.lr_schedule, progress, warmup=settings.lr_warmup, factor=self._factor)

    def after_step(self) -> None:
        """See `Rates`."""

    def after_epoch(self, score: float | None) -> None:
        """See `Rates`."""

    def state(self) -> None:
        """See `Rates`."""

    def load(self, state: None) -> None:
        """See `Rates`."""


class ByScheduler:
    """Learning rates by a torch scheduler of the user's own.

    Args:
        given: a scheduler of `optimizer`, or a function that makes one of it.
        every: what it counts, ``step`` or ``epoch``; ReduceLROnPlateau has an epoch in any case.
        monitor: the score of the validation, which ReduceLROnPlateau follows; None without a validation.

    Raises:
        UserError: no scheduler, one of another optimizer, or a ReduceLROnPlateau without a validation, or of the wrong
            mode for its score.
    """

    def __init__(
        self, given: OwnScheduler, optimizer: torch.optim.Optimizer, *, every: Literal["step", "epoch"],
        monitor: str | None,
    ) -> None:  # fmt: skip
        scheduler = given if isinstance(given, LRScheduler) else given(optimizer)
        if not isinstance(scheduler, LRScheduler):
            raise UserError(f"scheduler must be, or give, a torch scheduler, got a {type(scheduler).__name__}")
        if scheduler.optimizer is not optimizer:
            raise UserError(
                "the scheduler is of another optimizer than the training's: pass its optimizer too, or a function "
                "that makes the scheduler of the optimizer"
            )
        if every not in ("step", "epoch"):
            raise UserError(f"scheduler_every must be step or epoch, got {every!r}")
        self._plateau = isinstance(scheduler, ReduceLROnPlateau)
        if isinstance(scheduler, ReduceLROnPlateau):
            if monitor is None:
                raise UserError("ReduceLROnPlateau follows the score of a validation: give fit validation data")
            if scheduler.mode != (mode := "max" if monitor in BETTER_WHEN_LARGER else "min"):
                raise UserError(
                    f"ReduceLROnPlateau follows {monitor}, so its mode must be {mode}, got {scheduler.mode}"
                )
        self.scheduler, self._optimizer, self._each_step = scheduler, optimizer, every == "step" and not self._plateau
        self.state()

    def before_step(self, progress: float) -> None:
        """See `Rates`."""

    def after_step(self) -> None:
        """See `Rates`."""
        # It warns otherwise, where an update in buffers is not the optimizer's own `step`.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        if self._each_step:
            self.scheduler.step()

    def after_epoch(self, score: float | None) -> None:
        """See `Rates`."""
        if self._plateau:
            if score is not None:
                self.scheduler.step(score)  # type: ignore[arg-type]
        elif not self._each_step:
            self.scheduler.step()

    def state(self) -> Any:
        """See `Rates`; without what only its maker knows, such as functions."""
        return _plain(self.scheduler.state_dict(), type(self.scheduler).__name__)

    def load(self, state: Any) -> None:
        """See `Rates`."""
        self.scheduler.load_state_dict(_merged(self.scheduler.state_dict(), state))


def _plain(value: Any, name: str) -> Any:
    """The part of a state that JSON holds as it is."""
    if isinstance(value, Tensor):
        raise UserError(f"the scheduler's state has a tensor ({name}), which no checkpoint keeps: make it a number")
    if isinstance(value, Mapping):
        kept = {key: part for key, part in value.items() if isinstance(key, str) and _is_plain(part)}
        return {key: _plain(part, f"{name}.{key}") for key, part in kept.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, name) for part in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | Tensor)


def _merged(now: Any, saved: Any) -> Any:
    """The state of a new scheduler with what was saved in place of its own."""
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        return {**now, **{key: _merged(now.get(key), value) for key, value in saved.items()}}
    if isinstance(now, list) and isinstance(saved, list) and len(now) == len(saved):
        return [_merged(one, other) for one, other in zip(now, saved, strict=True)]
    return tuple(saved) if isinstance(now, tuple) else saved
