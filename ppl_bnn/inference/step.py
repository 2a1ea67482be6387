"""One update of a training: a batch in, gradients averaged over the ranks, parameters moved."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.distributed import Communicator, GradientBuckets, first_unequal
from ppl_bnn.errors import Diverged
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.direct import DirectELBO, Numbers
from ppl_bnn.inference.elbo import KLScaledELBO, Terms
from ppl_bnn.inference.graph import Replayed, cuda_capture
from ppl_bnn.inference.memory import refuse_if_too_large
from ppl_bnn.inference.objective import Objective
from ppl_bnn.inference.optimizers import first_gone_bad, set_lr
from ppl_bnn.inference.reading import Batch, Reader
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inference.updates import NonFiniteGradient, Update
from ppl_bnn.inputs import Inputs, mapped
from ppl_bnn.models.random_network import point_parameters
from ppl_bnn.registry import lookup


@dataclass
class _Unread:
    """A step, and what it found, on its device still."""

    number: int
    batch: Batch
    numbers: Any


@dataclass
class Step:
    """What an update needs, and the update itself.

    Attributes:
        params: the unconstrained values of ``pyro.param`` statements, by name.
        set_mode: ``model.train``, but for modules that stay in evaluation mode.
        reader: gives the batches, and one again.
        weights: of the examples, [N].
        objective, buckets: entered by the caller for the time of the training.
    """

    model: nn.Module
    guide: nn.Module
    params: Mapping[str, Tensor]
    reader: Reader
    settings: TrainSettings
    ranks: Communicator
    objective: Objective
    optimizer: torch.optim.Optimizer
    update: Update
    buckets: GradientBuckets
    set_mode: Callable[[bool], None]
    weights: Tensor | None = None
    _unread: list["_Unread"] = field(default_factory=list)
    _kl_weight: Tensor | None = None
    _replayed: Any = None

    def __call__(
        self,
        number: int,
        batch: Batch,
        progress: float,
        kl_weight: float,
        *,
        stop: Callable[[], bool],
        save: Callable[[], bool],
        read: bool = True,
    ) -> data_parallel.Agreed | None:
        """Move the parameters by the gradient of a global batch, of which `batch` is this rank's share; collective.

        On a device whose operations the program need not wait for, what steps found is read every `log_every` steps.
        Where a gradient is NaN or infinite, this update and all after it are left out, until it is read.

        Args:
            number: of the step, from 1, for the message.
            progress: share of the training that is done, in [0, 1].
            stop, save: whether this rank wants to stop, and rank 0 to save, after this step.
            read: whether to read in any case.

        Returns:
            The steps since the last read; None where they are not read now.

        Raises:
            Diverged: the loss or a gradient is NaN or infinite on any rank; nothing was updated.
            UserError: the step does not fit into memory.
        """
        settings, ranks = self.settings, self.ranks
        factor = ranks.size if settings.lr_per_rank else 1
        set_lr(self.optimizer, settings.lr_schedule, progress, warmup=settings.lr_warmup, factor=factor)
        share = batch.share
        # An example that does not count must not move batch norm's statistics either.
        self.set_mode(share > 0)
        x, y = self._augmented(batch.x), batch.y
        weights = None if self.weights is None else self.weights[batch.rows]
        self.update.prepare()
        try:
            if self._there:
                there = self._launched(x, y, weights, kl_weight, share)
                # Without its tensors: there may be many unread steps.
                self._unread.append(_Unread(number, batch.forgotten(), there))
                return self._read(stop, save) if read or number % settings.log_every == 0 else None
            found = self.objective.gradients(x, y, kl_weight=kl_weight, likelihood_weight=share, weights=weights)
            found = self._averaged(found, kl_weight)
            self._unread.append(_Unread(number, batch, [*found[:4], 0.0]))
            agreed = self._read(stop, save)
            self.update(found.squares)
        except NonFiniteGradient:
            raise Diverged(self._what_went_bad(number, agreed.found[0][0], x, y)) from None
        except (RuntimeError, MemoryError) as error:
            held = 0 if self.objective.flat is None else self.objective.flat.nbytes
            refuse_if_too_large(error, self._loss, self.model, self.guide, self.optimizer, x, y, held=held)
            raise
        return agreed

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.objective.flat is not None:
            self.objective.flat.drop_gradients()

    def _averaged(self, found: Numbers, kl_weight: Any) -> Numbers:
        """Average the gradients over the ranks."""
        if self.ranks.size == 1:
            return found
        self.buckets.average()
        return self.objective.completed(found, kl_weight)

    def _launched(self, x: Inputs, y: Tensor, weights: Tensor | None, kl_weight: float, share: float) -> Tensor:
        """Start a step on the device, and return its numbers there: loss, nll, kl, right answers, `Update.bad`."""
        if self._kl_weight is None:
            self._kl_weight = torch.full((), kl_weight, device=self.device)
        else:
            self._kl_weight.fill_(kl_weight)

        def run(x: Inputs, y: Tensor) -> Tensor:
            found = self.objective.gradients(x, y, kl_weight=self._kl_weight, likelihood_weight=share, weights=weights)
            found = self._averaged(found, self._kl_weight)
            # It is told when the step is read.
            with suppress(NonFiniteGradient):
                self.update(found.squares)
            assert self.update.bad is not None
            return torch.stack([part.to(found.loss.dtype) for part in (*found[:4], self.update.bad)])

        if self._replayed is None:
            alone = self.ranks.size == 1 and self.weights is None and self.update.skips and self.settings.cuda_graph
            capture, beside = cuda_capture(self.device) if alone and self.device.type == "cuda" else (None, nullcontext)
            self._replayed = Replayed(run, capture, beside, self._drop_gradients) if capture else run
        return self._replayed(x, y) if isinstance(self._replayed, Replayed) else run(x, y)

    @property
    def _there(self) -> bool:
        """Whether the program need not wait for a step."""
        return isinstance(self.objective, DirectELBO) and self.device.type != "cpu"

    def _read(self, stop: Callable[[], bool], save: Callable[[], bool]) -> data_parallel.Agreed:
        unread = [*self._unread]
        self._unread.clear()
        parts: Any = [one.numbers for one in unread]
        if isinstance(parts[0], Tensor):
            parts = torch.stack(parts).tolist()
        found = [
            (Terms(*numbers[:3]), numbers[3] if one.batch.share else 0.0)
            for one, numbers in zip(unread, parts, strict=True)
        ]
        agreed = data_parallel.agree(self.ranks, found, stop=stop(), save=self.ranks.is_main and save())
        for one, numbers, (terms, _) in zip(unread, parts, agreed.found, strict=True):
            if numbers[4] or not math.isfinite(terms.loss):
                x, y = self.reader.again(one.batch)
                raise Diverged(self._what_went_bad(one.number, Terms(*numbers[:3]), self._augmented(x), y))
        return agreed

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return device

    def compare_ranks(self, number: int) -> None:
        """Raise Diverged where a parameter is not the same, to the last bit, on all ranks after step `number`."""
        named = [*point_parameters(self.model).items(), *self.guide.named_parameters(), *self.params.items()]
        if self.settings.compare_every and (found := first_unequal(self.ranks, named)):
            raise Diverged(f"the ranks are no longer the same at step {number}: {found}. The last checkpoint is good")

    def _augmented(self, x: Inputs) -> Inputs:
        channels_last = isinstance(x, Tensor) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        x = lookup(AUGMENTATIONS, self.settings.augment)(x)  # type: ignore[arg-type]
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return mapped(x, lambda part: part.contiguous(memory_format=memory_format))

    def _loss(self, x: Inputs, y: Tensor) -> Tensor:
        # With an estimator of its own: the step's may still be in the middle of a forward pass that failed.
        with poutine.block(), lookup(ESTIMATORS, self.settings.estimator)():
            return KLScaledELBO(len(self.reader.examples)).differentiable_loss(self.model, self.guide, x, y)

    def _what_went_bad(self, number: int, terms: Terms, x: Inputs, y: Tensor) -> str:
        if self.objective.flat:
            if self.update.bad is not None:
                # The gradients are of a later step; nothing was updated since.
                self._drop_gradients()
                self._averaged(self.objective.gradients(x, y, kl_weight=1.0), 1.0)
            self.objective.flat.give_gradients()
        where = first_gone_bad(self.model, self.guide, x, y)
        found = f"(loss {terms.loss}, nll {terms.nll}, kl {terms.kl} nats per datum): {where}"
        return (
            f"training went bad at step {number} {data_parallel.report(self.ranks, found, terms.loss)}. "
            "The last checkpoint is good; try a smaller train.lr, train.clip_norm, or a smaller guide.init_scale"
        )
