"""Who looks on while a training runs: callbacks and loggers of the user's own, and what they see of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ppl_bnn.errors import CallbackFailed, Interrupted
from ppl_bnn.inference.log import TrainingLog
from ppl_bnn.inference.loggers import Logger
from ppl_bnn.inference.step import Step


class TrainingView:
    """A training as a callback sees it.

    Attributes:
        model, guide: as they are trained; a prediction with them is allowed at any time.
        optimizer: its learning rates may be changed where the optimizer is the user's own and no schedule sets them.
        step: updates so far.
        epoch: complete epochs so far.
        records: the records of these epochs, as `fit` returns them.
    """

    def __init__(self, step: Step, log: TrainingLog, done: int) -> None:
        self._step, self._log = step, log
        self._done, self._stopped = done, False

    @property
    def model(self) -> nn.Module:
        return self._step.model

    @property
    def guide(self) -> nn.Module:
        return self._step.guide

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._step.optimizer

    @property
    def step(self) -> int:
        return self._done

    @property
    def epoch(self) -> int:
        return len(self._log.epochs)

    @property
    def records(self) -> Sequence[Mapping[str, float]]:
        return self._log.epochs

    def stop(self) -> None:
        """End the training after this step, as if it were complete; `fit` returns."""
        self._stopped = True


class Callback(Protocol):
    """What `fit` calls, on every rank, with a view of the training. A class need not have all of the methods.

    Random numbers that a callback draws do not change those of the training.
    """

    def on_start(self, training: TrainingView) -> None:
        """Before the first step, of a training that goes on too."""

    def on_step(self, training: TrainingView) -> None:
        """After an update of the parameters."""

    def on_epoch(self, training: TrainingView, record: Mapping[str, float]) -> None:
        """After an epoch and its validation, with its record."""

    def on_end(self, training: TrainingView) -> None:
        """After the last checkpoint of a training that is complete or was ended; not where it is interrupted."""


class Onlookers:
    """The callbacks of a training, and on rank 0 its loggers."""

    def __init__(self, step: Step, log: TrainingLog, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> None:
        self.view = TrainingView(step, log, 0)
        self._step, self._callbacks = step, callbacks
        self._loggers = loggers if step.ranks.is_main else ()
        self._logged = 0

    def end_now(self) -> bool:
        """Whether a callback of any rank asked to stop; collective where there are callbacks."""
        return bool(self._callbacks) and self._step.ranks.any(self.view._stopped)

    def start(self, done: int) -> None:
        """Before the step after `done`."""
        self.view._done, self._logged = done, len(self.view._log.steps)
        self._call("on_start")

    def step(self, number: int) -> None:
        """After a step."""
        self.view._done = number
        if self._callbacks:
            self._call("on_step")
        steps = self.view._log.steps
        for record in steps[self._logged :] if self._loggers else ():
            self._log("step", record)
        self._logged = len(steps)

    def epoch(self, record: Mapping[str, float]) -> None:
        """After an epoch."""
        self._log("epoch", record)
        self._call("on_epoch", record)

    def end(self) -> None:
        """After a training that was not interrupted."""
        self._call("on_end")

    def close(self) -> None:
        """Close the loggers, whatever happened."""
        for logger in self._loggers:
            self._guarded(logger, "close", logger.close)

    def _call(self, method: str, *args: object) -> None:
        for callback in self._callbacks:
            if (function := getattr(callback, method, None)) is not None:
                with self._step.aside():
                    self._guarded(callback, method, function, self.view, *args)

    def _log(self, kind: str, record: Mapping[str, float]) -> None:
        values = {
            f"{kind}/{name}": float(value)
            for name, value in record.items()
            if name not in ("epoch", "step") and not math.isnan(value)
        }
        for logger in self._loggers:
            self._guarded(logger, "log", logger.log, values, int(record["step"]))

    def _guarded(self, of: object, method: str, function: Callable, *args: Any) -> None:
        try:
            function(*args)
        except Interrupted:
            raise
        except Exception as error:
            raise CallbackFailed(
                f"{type(of).__name__}.{method} failed at step {self.view.step}: {type(error).__name__}: {error}. "
                "The last checkpoint is good; mend it, or leave it out, and call fit again"
            ) from error
