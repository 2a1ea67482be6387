"""When a training writes checkpoints, and what it keeps of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl_bnn.distributed import Communicator
from ppl_bnn.inference import checkpoint, data_parallel
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.step import Step

# A checkpoint by the clock is put off until writing costs at most this share of the time.
_WRITING_SHARE = 0.05


def last_checkpoint(folder: Path | None, ranks: Communicator) -> checkpoint.Checkpoint | None:
    """The last checkpoint in ``folder/checkpoints``, on rank 0; None where there is none, and on every other rank."""
    saved = checkpoint.saved(folder / "checkpoints") if folder is not None and ranks.is_main else []
    return checkpoint.load(saved[-1]) if saved else None


@dataclass
class Checkpoints:
    """The checkpoints that a training writes into ``folder/checkpoints``; rank 0 alone does.

    Args:
        step: holds the model, guide and optimizer that are saved, and the settings: how often, and how many to keep.
        folder: None writes none.
        meta: what each checkpoint says about the training beside its log, as JSON.
        more: functions of what changes from one to the next, by its name in the checkpoint.
    """

    step: Step
    folder: Path | None
    meta: dict[str, Any]
    more: dict[str, Callable[[], Any]] = field(default_factory=dict)
    _written: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def due(self) -> bool:
        """Whether one is due by the clock, inside an epoch."""
        longest = max(60 * self.step.settings.checkpoint_minutes, self._cost / _WRITING_SHARE)
        return time.monotonic() - self._written > longest

    def due_after(self, epoch: int) -> bool:
        """Whether one is due after an epoch, counted from 1."""
        settings = self.step.settings
        return epoch % settings.checkpoint_every == 0 or epoch == settings.epochs

    def write(self, number: int, records: TrainingLog) -> None:
        """Write the checkpoint of a step by its number; collective.

        Raises:
            Diverged: the ranks' parameters are not the same; nothing was written.
            OSError: it could not be written; earlier ones are untouched.
        """
        step, ranks = self.step, self.step.ranks
        step.compare_ranks(number)
        data_parallel.average_buffers(ranks, step.model)
        random = data_parallel.gather_random(ranks, step.device)
        if self.folder is None or not ranks.is_main:
            return
        started = time.monotonic()
        # First, because a training that resumes from the checkpoint keeps the steps before it.
        records.write_performance(self.folder, ranks)
        checkpoint.save(
            self.folder / "checkpoints", number, model=step.model, guide=step.guide, optimizer=step.optimizer,
            meta=self._meta(records), keep=step.settings.keep_checkpoints, random=random, params=step.params,
        )  # fmt: skip
        self._written = time.monotonic()
        self._cost = self._written - started

    @property
    def best(self) -> Path:
        """The file of the best parameters; no step's, so that no training goes on from it."""
        assert self.folder is not None
        return self.folder / "checkpoints" / "best.safetensors"

    def write_best(self, number: int, records: TrainingLog) -> None:
        """Write the parameters of a step, by its number, as the best; rank 0 alone does."""
        step = self.step
        if step.ranks.is_main:
            checkpoint.save(
                self.best.parent, number, model=step.model, guide=step.guide, meta=self._meta(records),
                params=step.params, name=self.best.stem,
            )  # fmt: skip

    def _meta(self, records: TrainingLog) -> dict[str, Any]:
        return {**records.state(), **self.meta, **{name: state() for name, state in self.more.items()}}
