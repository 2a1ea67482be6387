"""One training step for a loop of the user's own."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.distributed import Alone, Communicator
from ppl_bnn.errors import Diverged, UserError
from ppl_bnn.inference.direct import Numbers
from ppl_bnn.inference.door import check_training
from ppl_bnn.inference.gradient_step import GradientStep, MicroBatch
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inference.objective import ThroughPyro, gradient_buckets, objective_for
from ppl_bnn.inference.optimizers import build_optimizer
from ppl_bnn.inference.own_optimizer import OwnOptimizer, check_own, name_of, own_optimizer
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inference.updates import NonFiniteGradient, Update
from ppl_bnn.inputs import Inputs
from ppl_bnn.models.modes import mode_setter
from ppl_bnn.models.param_store import trained_store


class TrainingStep:
    """The step of `fit`, as fast, without its loop: forward, backward, and update on a batch.

        step = TrainingStep(model, guide, x, y, num_data=len(x), lr=1e-3)
        for x, y in batches:
            terms = step(x, y, kl_weight=1.0)

    Order of the examples, log, checkpoints, learning rates and the model's modes are the loop's. Model and guide are
    checked as by `fit`, and are in training mode then. Their parameters stay where they are until `release`.

    Args:
        model, guide: see `fit`.
        x, y: a few examples [n, ...] and labels [n, ...], at least 2, to look at model and guide with.
        num_data: N, by which the KL is divided.
        optimizer: see `fit`.
        estimator: see `fit`; or an object, such as ``GroupedFlips(8)``.
        communicator: ranks that average their gradients, each with a batch of the same size. They start from the same
            parameters, and all make the same calls.
        settings: lr, beta2, scale_lr_factor, clip_norm, num_particles, compile, cuda_graph, bucket_mb and compression,
            as of `fit`.

    Attributes:
        optimizer: the torch optimizer; set its learning rates at any time.

    Raises:
        UserError: see `fit`.
    """

    def __init__(
        self, model: Callable, guide: Callable, x: Inputs, y: Tensor, *, num_data: int,
        optimizer: str | OwnOptimizer = TrainSettings.optimizer, estimator: str | Messenger = TrainSettings.estimator,
        communicator: Communicator | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        own = _settings(settings, optimizer)
        ranks = communicator or Alone()
        trained = check_training(
            model, guide, x, y, batch_size=len(y), ranks=ranks.size, num_data=num_data, with_uses=estimator != "plain",
            own_batches=True,
        )  # fmt: skip
        self.model, self.guide, params = trained.model, trained.guide, trained.params
        if isinstance(optimizer, str | type):
            self.optimizer = build_optimizer(
                own.optimizer, self.model, self.guide, params.values(), lr=own.lr, beta2=own.beta2,
                scale_lr_factor=own.scale_lr_factor, kl_per_datum=1 / num_data,
            )  # fmt: skip
        else:
            self.optimizer = own_optimizer(optimizer, self.model, self.guide, params, kl_per_datum=1 / num_data)
        objective = objective_for(
            trained, estimator, num_data, num_particles=own.num_particles, compile=own.compile,
            gathers=ranks.size == 1, tells=ranks.is_main,
        )  # fmt: skip
        buckets = gradient_buckets(
            self.model, self.guide, objective.flat, ranks, bucket_mb=own.bucket_mb, compression=own.compression,
            params=params.values(),
        )  # fmt: skip
        # What stays entered is of the network and its gradients alone.
        objective.__enter__()
        if ranks.size > 1:
            buckets.__enter__()
        self._core = GradientStep(
            objective, Update(self.optimizer, objective.flat, clip_norm=own.clip_norm),
            buckets=buckets if ranks.size > 1 else None, device=self.optimizer.param_groups[0]["params"][0].device,
            cuda_graph=own.cuda_graph,
        )  # fmt: skip
        # Statements of ``pyro.param`` find what is trained; without messages there are none.
        self._store: Callable[[], AbstractContextManager] | None = None
        if isinstance(objective, ThroughPyro):
            self._store = partial(trained_store, trained.store, params)
        self._num_data, self._kl_weight = num_data, 1.0
        self._found: Numbers | None = None
        mode_setter(self.model)(True)

    def __call__(self, x: Inputs, y: Tensor, *, kl_weight: float = 1.0, weights: Tensor | None = None) -> Numbers:
        """One step on inputs [B, ...] and labels [B, ...]; returns loss, nll, kl (nats per datum) and right answers.

        On a device whose operations a program need not wait for, they are tensors there, and a step whose gradient is
        not finite leaves everything as it was.

        Args:
            weights: of the examples, [B].

        Raises:
            Diverged: the loss or a gradient is NaN or infinite; nothing was updated.
        """
        if not self._core.launches:
            self._add(MicroBatch(x, y, weights), kl_weight)
            return self.update()
        self._set_kl_weight(kl_weight)
        self._core.update.prepare()
        return Numbers(*self._core.launch([MicroBatch(x, y, weights)], kl_weight)[:4])

    def gradients(
        self, x: Inputs, y: Tensor, *, kl_weight: float = 1.0, share: float = 1.0, weights: Tensor | None = None
    ) -> Numbers:
        """The first half of a step: forward and backward. Gradients add up until `update`.

        Several batches before an update have the same draw of the weights, and are as one large batch.

        Args:
            share: the part of the update's examples that this batch has; shares add up to 1.

        Returns:
            The batch's part of nll and kl; `update` returns the sums, and the loss.
        """
        with nullcontext() if self._core.buckets is None else self._core.buckets.waiting():
            return self._add(MicroBatch(x, y, weights, share=share), kl_weight)

    def _add(self, batch: MicroBatch, kl_weight: float) -> Numbers:
        self._set_kl_weight(kl_weight)
        weight = self._core.on_device(kl_weight)
        if self._store is None:
            new = self._core.added(None, batch, weight)
        else:
            with self._store():
                new = self._core.added(None, batch, weight)
        self._found = new if self._found is None else self._found.plus(new)
        return new

    def update(self) -> Numbers:
        """The second half of a step: average over ranks, clip and move the parameters; see `__call__`."""
        if self._found is None:
            raise UserError("update needs gradients: call gradients(x, y) first")
        found, self._found = self._core.completed(self._found, self._core.on_device(self._kl_weight)), None
        self._core.update.prepare()
        try:
            if isinstance(found.loss, float) and not math.isfinite(found.loss):
                raise NonFiniteGradient
            self._core.update(found.squares)
        except NonFiniteGradient:
            self._core.drop_gradients()
            raise Diverged(
                f"the loss or a gradient is NaN or infinite, and nothing was updated (nll {found.nll}, kl {found.kl} "
                "nats per datum): try a smaller lr, or clip_norm"
            ) from None
        return found

    def release(self) -> None:
        """Give each parameter of the guide memory of its own again; no step may follow."""
        if self._core.objective.flat is not None:
            self._core.objective.flat.release()
        if self._core.buckets is not None:
            self._core.buckets.__exit__(None, None, None)
        self._core.objective.__exit__(None, None, None)

    def _set_kl_weight(self, kl_weight: float) -> None:
        if kl_weight == self._kl_weight:
            return
        if not 0 < kl_weight < math.inf:
            raise UserError(f"kl_weight must be positive and finite, got {kl_weight}")
        self._kl_weight = kl_weight
        if isinstance(self.optimizer, IVON):
            self.optimizer.param_groups[0]["kl_per_datum"] = kl_weight / self._num_data


_KNOWN = (
    "lr", "beta2", "scale_lr_factor", "clip_norm", "num_particles", "compile", "cuda_graph", "bucket_mb", "compression",
)  # fmt: skip


def _settings(given: Mapping[str, Any], optimizer: str | OwnOptimizer) -> TrainSettings:
    if unknown := given.keys() - set(_KNOWN):
        raise UserError(f"a TrainingStep has no setting {min(unknown)!r}; it has {', '.join(_KNOWN)}")
    own = not isinstance(optimizer, str | type)
    name = optimizer if isinstance(optimizer, str) else name_of(optimizer)
    settings = TrainSettings(epochs=1, **given, optimizer=TrainSettings.optimizer if own else name)
    settings.check()
    check_own(settings, optimizer=own, scheduler=False)
    return settings
