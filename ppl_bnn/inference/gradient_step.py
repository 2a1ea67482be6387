"""Forward, backward and update of a training step: what `fit` and `TrainingStep` do alike."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_bnn.distributed import GradientBuckets
from ppl_bnn.inference.direct import DirectELBO, Numbers
from ppl_bnn.inference.graph import Replayed, cuda_capture
from ppl_bnn.inference.objective import Objective
from ppl_bnn.inference.updates import NonFiniteGradient, Update
from ppl_bnn.inputs import Inputs


class MicroBatch(NamedTuple):
    """Examples whose forward and backward pass run at once.

    Attributes:
        x, y: inputs [B, ...] and labels [B, ...].
        weights: of the examples, [B].
        likelihood_weight: see `KLScaledELBO.terms_and_grads`.
        share: the part of the step's examples on this rank that these are.
    """

    x: Inputs
    y: Tensor
    weights: Tensor | None = None
    likelihood_weight: float = 1.0
    share: float = 1.0


class GradientStep:
    """A step in two halves, `gradients` and `update`, or at once on a device that need not be waited for: `launch`.

    Args:
        objective: entered by the caller where that is needed.
        buckets: average the gradients over several ranks; None on one.
        device: of the parameters.
        cuda_graph: replay steps on a GPU where they can be captured. Batches of several ranks, with weights, or more
            than one a step are not.

    Attributes:
        launches: whether `launch` is there: the program need not wait for a step.
    """

    def __init__(
        self, objective: Objective, update: Update, *, buckets: GradientBuckets | None = None, device: torch.device,
        cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        self.objective, self.update, self.buckets, self.device = objective, update, buckets, device
        self.launches = isinstance(objective, DirectELBO) and device.type != "cpu"
        self._captures = cuda_graph and buckets is None and update.skips and device.type == "cuda"
        self._kl_weight: Tensor | None = None
        self._filled = 0.0
        self._replayed: Replayed | None = None

    def gradients(self, batches: Sequence[MicroBatch], kl_weight: Any) -> Numbers:
        """The parts of the loss of all batches as of one, and its gradients in place, averaged over the ranks."""
        *first, last = batches
        found: Numbers | None = None
        for batch in first:
            with nullcontext() if self.buckets is None else self.buckets.waiting():
                found = self.added(found, batch, kl_weight)
        return self.completed(self.added(found, last, kl_weight), kl_weight)

    def added(self, found: Numbers | None, batch: MicroBatch, kl_weight: Any) -> Numbers:
        """The parts of the loss found so far and those of one more batch, whose gradients are added."""
        x, y, weights, likelihood_weight, share = batch
        new = self.objective.add(
            x, y, kl_weight=kl_weight, likelihood_weight=likelihood_weight, weights=weights, share=share
        )
        return new if found is None else found.plus(new)

    def completed(self, found: Numbers, kl_weight: Any) -> Numbers:
        """The parts of the loss when all batches are added."""
        if self.buckets is not None:
            self.buckets.average()
        return self.objective.completed(found, kl_weight)

    def launch(self, batches: Sequence[MicroBatch], kl_weight: float) -> Tensor:
        """Start a step on the device, and return its numbers there: loss, nll, kl, right answers, `Update.bad`."""
        weight, batch = self.on_device(kl_weight), batches[0]
        if not self._captures or len(batches) > 1 or batch.weights is not None:
            return self._run(batches, weight)
        if self._replayed is None:
            self._replayed = Replayed(
                lambda x, y: self._run([MicroBatch(x, y)], weight), *cuda_capture(self.device), self.drop_gradients
            )
        return self._replayed(batch.x, batch.y)

    def on_device(self, kl_weight: float) -> Any:
        """The weight as a step takes it: where nothing waits for the device, in one place of its memory."""
        if not self.launches:
            return kl_weight
        if self._kl_weight is None:
            self._kl_weight = torch.full((), kl_weight, device=self.device)
        elif kl_weight != self._filled:
            self._kl_weight.fill_(kl_weight)
        self._filled = kl_weight
        return self._kl_weight

    def _run(self, batches: Sequence[MicroBatch], kl_weight: Any) -> Tensor:
        found = self.gradients(batches, kl_weight)
        # It is told when the step is read.
        with suppress(NonFiniteGradient):
            self.update(found.squares)
        assert self.update.bad is not None
        return torch.stack([part.to(found.loss.dtype) for part in (*found[:4], self.update.bad)])

    def drop_gradients(self) -> None:
        """Drop what gradients there are."""
        self.update.optimizer.zero_grad()
        if self.objective.flat is not None:
            self.objective.flat.drop_gradients()
