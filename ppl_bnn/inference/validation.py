"""Validation during a training: scores of the predictive, the best parameters so far, and when to give up."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_bnn import inputs
from ppl_bnn.data import as_examples
from ppl_bnn.data.as_examples import in_memory
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inference import checkpoint, data_parallel
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.saving import Checkpoints
from ppl_bnn.inference.settings import BETTER_WHEN_LARGER
from ppl_bnn.inference.step import Step
from ppl_bnn.models.evaluating import unchanged
from ppl_bnn.models.labels import as_tensor

# These are right at a value between.
_NEITHER = ("coverage_", "width_")


class Validation:
    """The validation of a training.

    Args:
        data: what `predict` takes as x, with labels in it, or a pair (x, y).

    Attributes:
        best: the best value of the monitored score so far, None before the first.
        waited: validations since then.

    Raises:
        UserError: data that the model cannot be predicted with and scored on, or no such score as is monitored.
    """

    def __init__(self, data: Any, step: Step, checkpoints: Checkpoints) -> None:
        self.x, self.y = _read(data, step.optimizer.param_groups[0]["params"][0].detach())
        self._step, self._checkpoints = step, checkpoints
        self.best: float | None = None
        self.best_step, self.waited = 0, 0
        self._kept: checkpoint.Checkpoint | None = None
        # All of it once, so that what is wrong with an example is told before the first epoch.
        names = list(self._scores(num_samples=1))
        monitor = step.settings.monitor
        if monitor not in names or monitor.startswith(_NEITHER):
            known = ", ".join(name for name in names if not name.startswith(_NEITHER))
            raise UserError(f"monitor must be a score of the validation: one of {known}; got {monitor!r}")

    def due_after(self, epoch: int) -> bool:
        """Whether one is due after an epoch, counted from 1."""
        settings = self._step.settings
        return epoch % settings.validate_every == 0 or epoch == settings.epochs

    def __call__(self, number: int, records: TrainingLog) -> float:
        """The monitored score after step `number`, with all scores in the last record; collective.

        Parameters with a better score than before are kept. Neither parameters nor random numbers change.
        """
        step = self._step
        with unchanged(step.model):
            # The running averages that a checkpoint would have.
            data_parallel.average_buffers(step.ranks, step.model)
            scores = self._scores(num_samples=step.settings.validation_samples)
            records.add_scores(scores)
            score, larger = scores[step.settings.monitor], step.settings.monitor in BETTER_WHEN_LARGER
            if math.isfinite(score) and (self.best is None or (score > self.best if larger else score < self.best)):
                self.best, self.best_step, self.waited = score, number, 0
                self._keep(number, records)
            else:
                self.waited += 1
        return score

    @property
    def gives_up(self) -> bool:
        """Whether there was nothing better for `patience` validations."""
        patience = self._step.settings.patience
        return patience is not None and self.waited >= patience

    def restore_best(self) -> None:
        """Load the parameters of the best score, if there is one; collective."""
        step = self._step
        if self.best is None:
            return
        found = self._kept
        if self._checkpoints.folder is not None:
            found = checkpoint.load(self._checkpoints.best) if step.ranks.is_main else None
            found = data_parallel.share_state(step.ranks, found, step.model, step.guide, step.params)
        assert found is not None
        checkpoint.restore(found, model=step.model, guide=step.guide, params=step.params)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state."""
        if state is not None:
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]

    def _keep(self, number: int, records: TrainingLog) -> None:
        step = self._step
        if self._checkpoints.folder is not None:
            self._checkpoints.write_best(number, records)
            return
        now = checkpoint.tensors_of(step.model, step.guide, step.params)
        self._kept = checkpoint.Checkpoint(number, {name: one.clone() for name, one in now.items()}, {"priors": {}})

    def _scores(self, *, num_samples: int) -> dict[str, float]:
        from ppl_bnn.prediction.predictive import predict

        step = self._step
        deterministic = isinstance(step.guide, Posterior) and not step.guide.sites
        with step.aside():
            found = predict(
                step.model, step.guide, self.x, self.y, num_samples=1 if deterministic else num_samples,
                seed=step.settings.seed, keep=torch.empty(0, dtype=torch.int64), log_likelihood=False, progress=False,
                communicator=step.ranks,
            )  # fmt: skip
        if found.y is None:
            raise UserError("the validation data have no labels: give validation=(x, y), or data with labels in it")
        return {name: float(score) for name, score in found.scores().items()}


def _read(data: Any, like: Tensor) -> tuple[Any, Any]:
    """Inputs and labels: tensors on the device of `like`; other data stay `Examples`, read as they are needed."""
    x, y = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if in_memory(x):
        x = inputs.mapped(x, lambda one: as_tensor(one, "validation", like=like))
    examples = as_examples(x, y)
    if not is_plain(examples):
        return examples, None
    return inputs.mapped(examples.x, lambda one: one.to(like.device)), examples.y
