"""One update of a training: a batch in, gradients averaged over the ranks, parameters moved."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_bnn import inputs
from ppl_bnn.distributed import Communicator, first_unequal
from ppl_bnn.errors import Diverged, UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.elbo import KLScaledELBO, Terms
from ppl_bnn.inference.gradient_step import GradientStep, MicroBatch
from ppl_bnn.inference.memory import refuse_if_too_large
from ppl_bnn.inference.optimizers import first_gone_bad
from ppl_bnn.inference.reading import NO_ROW, Batch, Reader, first_not_finite
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inference.updates import NonFiniteGradient
from ppl_bnn.inputs import Inputs
from ppl_bnn.models.evaluating import forked_random
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
        core: its objective and buckets are entered by the caller for the time of the training.
        augment: a function of a batch's inputs.
        set_lr: sets the learning rates for a progress in [0, 1], if no scheduler of the user's own does.
        reader: gives the batches, and one again.
        weights: of the examples, [N].
    """

    model: nn.Module
    guide: nn.Module
    params: Mapping[str, Tensor]
    reader: Reader
    settings: TrainSettings
    ranks: Communicator
    optimizer: torch.optim.Optimizer
    core: GradientStep
    set_mode: Callable[[bool], None]
    augment: Callable[[Any], Any]
    set_lr: Callable[[float], None]
    weights: Tensor | None = None
    _unread: list["_Unread"] = field(default_factory=list)

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
            UserError: the same, and inputs on any rank are NaN or infinite; the step does not fit into memory; the
                augmentation changes the number of examples.
        """
        self.set_lr(progress)
        # An example that does not count must not move batch norm's statistics either.
        self.set_mode(batch.share > 0)
        x, y = self._augmented(batch.x), batch.y
        batches = self._in_parts(x, y, None if self.weights is None else self.weights[batch.rows], batch.share)
        update = self.core.update
        update.prepare()
        try:
            if self.core.launches:
                # Without its tensors: there may be many unread steps.
                self._unread.append(_Unread(number, batch.forgotten(), self.core.launch(batches, kl_weight)))
                return self._read(stop, save) if read or number % self.settings.log_every == 0 else None
            found = self.core.gradients(batches, kl_weight)
            self._unread.append(_Unread(number, batch, [*found[:4], 0.0]))
            agreed = self._read(stop, save)
            update(found.squares)
        except NonFiniteGradient:
            raise self._what_went_bad(number, agreed.found[0][0], batch, x) from None
        except (RuntimeError, MemoryError) as error:
            flat = self.core.objective.flat
            held = 0 if flat is None else flat.nbytes
            one = batches[0]
            refuse_if_too_large(error, self._loss, self.model, self.guide, self.optimizer, one.x, one.y, held=held)
            raise
        return agreed

    def _in_parts(self, x: Inputs, y: Tensor, weights: Tensor | None, likelihood_weight: float) -> list[MicroBatch]:
        """A step's examples on this rank in batches of about `batch_size`."""
        count, size = len(y), self.settings.batch_size
        if count <= size:
            return [MicroBatch(x, y, weights, likelihood_weight)]
        # None has a single example, which batch norm could not take: of 5 there are batches of 2 and 3.
        number = -(-count // size) if size == 1 else min(-(-count // size), count // 2)
        parts = torch.arange(count).tensor_split(number)
        spans = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
        return [
            MicroBatch(
                inputs.rows(x, span), y[span], None if weights is None else weights[span], likelihood_weight,
                len(part) / count,
            )
            for span, part in zip(spans, parts, strict=True)
        ]  # fmt: skip

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
                batch = one.batch._replace(x=x, y=y)
                raise self._what_went_bad(one.number, Terms(*numbers[:3]), batch, self._augmented(x))
        return agreed

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return device

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager for what looks at a training between two steps: its random numbers are its own."""
        like = self.optimizer.param_groups[0]["params"][0]
        with forked_random(like), torch.autocast(self.device.type, enabled=False):
            yield

    def compare_ranks(self, number: int) -> None:
        """Raise Diverged where a parameter is not the same, to the last bit, on all ranks after step `number`."""
        named = [*point_parameters(self.model).items(), *self.guide.named_parameters(), *self.params.items()]
        if self.settings.compare_every and (found := first_unequal(self.ranks, named)):
            raise Diverged(f"the ranks are no longer the same at step {number}: {found}. The last checkpoint is good")

    def _augmented(self, x: Inputs) -> Inputs:
        channels_last = isinstance(x, Tensor) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        augmented = self.augment(x)
        if (found := inputs.count(augmented)) != (given := inputs.count(x)):
            raise UserError(f"augment must return as many examples as it is given, {given}; got {found}")
        contiguous: Inputs = inputs.mapped(augmented, lambda part: part.contiguous(memory_format=memory_format))
        return contiguous

    def _loss(self, x: Inputs, y: Tensor) -> Tensor:
        # With an estimator of its own: the step's may still be in the middle of a forward pass that failed.
        with poutine.block(), lookup(ESTIMATORS, self.settings.estimator)():
            return KLScaledELBO(len(self.reader.examples)).differentiable_loss(self.model, self.guide, x, y)

    def _what_went_bad(self, number: int, terms: Terms, batch: Batch, x: Inputs) -> UserError | Diverged:
        """The error of a step of `batch`, whose inputs are `x` once augmented; collective."""
        looked_at = (
            (batch.x, "its inputs have", "correct the example, or leave it out"),
            (x, "augment gives it", "correct or leave out train.augment"),
        )
        for values, what, advice in looked_at:
            row = int(self.ranks.gather(torch.tensor([first_not_finite(batch.rows, values)])).min())
            if row != NO_ROW:
                return UserError(
                    f"example {self.reader.number_in_whole(row)}: {what} NaN or infinite values (step {number}): "
                    f"{advice}. The last checkpoint is good"
                )
        y = batch.y
        if flat := self.core.objective.flat:
            if self.core.update.bad is not None:
                # The gradients are of a later step; nothing was updated since.
                self.core.drop_gradients()
                self.core.gradients([MicroBatch(x, y)], 1.0)
            flat.give_gradients()
        where = first_gone_bad(self.model, self.guide, x, y)
        found = f"(loss {terms.loss}, nll {terms.nll}, kl {terms.kl} nats per datum): {where}"
        return Diverged(
            f"training went bad at step {number} {data_parallel.report(self.ranks, found, terms.loss)}. "
            "The last checkpoint is good; try a smaller train.lr, train.clip_norm, or a smaller guide.init_scale"
        )
