"""One update of a training: a batch in, gradients averaged over the ranks, parameters moved."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.data.examples import Examples
from ppl_bnn.distributed import Communicator, GradientBuckets, first_unequal, shard
from ppl_bnn.errors import Diverged
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.example_weights import weighting
from ppl_bnn.inference.log import BatchAccuracy
from ppl_bnn.inference.memory import refuse_if_too_large
from ppl_bnn.inference.optimizers import NonFiniteGradient, descend, first_gone_bad, set_lr
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.models.random_network import point_parameters
from ppl_bnn.registry import lookup


@dataclass
class Step:
    """What an update needs, and the update itself.

    Attributes:
        params: the unconstrained values of ``pyro.param`` statements, by name.
        set_mode: ``model.train``, but for modules that stay in evaluation mode.
        weights: of the examples, [N].
        buckets, accuracy: entered by the caller for the time of the training.
    """

    model: nn.Module
    guide: nn.Module
    params: Mapping[str, Tensor]
    examples: Examples
    settings: TrainSettings
    ranks: Communicator
    elbo: KLScaledELBO
    optimizer: torch.optim.Optimizer
    buckets: GradientBuckets
    accuracy: BatchAccuracy
    set_mode: Callable[[bool], None]
    weights: Tensor | None = None

    def __call__(
        self,
        number: int,
        rows: Tensor,
        progress: float,
        kl_weight: float,
        *,
        stop: Callable[[], bool],
        save: Callable[[], bool],
    ) -> data_parallel.Agreed:
        """Move the parameters by the gradient of the global batch `rows` [B]; collective.

        Args:
            number: of the step, from 1, for the message.
            progress: share of the training that is done, in [0, 1].
            stop, save: whether this rank wants to stop, and rank 0 to save, after this step.

        Raises:
            Diverged: the loss or a gradient is NaN or infinite on any rank; nothing was updated.
            UserError: the step does not fit into memory.
        """
        settings, ranks = self.settings, self.ranks
        factor = ranks.size if settings.lr_per_rank else 1
        set_lr(self.optimizer, settings.lr_schedule, progress, warmup=settings.lr_warmup, factor=factor)
        mine, share = shard(rows, ranks.rank, ranks.size)
        # An example that does not count must not move batch norm's statistics either.
        self.set_mode(share > 0)
        x, y = self._batch(mine)
        try:
            # What pyro.infer.SVI does, without its search for the parameters at every step.
            with weighting(self.weights, mine):
                terms = self.elbo.terms_and_grads(
                    self.model, self.guide, x, y, kl_weight=kl_weight, likelihood_weight=share
                )
            self.buckets.average()
            agreed = data_parallel.agree(
                ranks, terms, self.accuracy.correct if share else 0.0, stop=stop(), save=ranks.is_main and save()
            )
            if not math.isfinite(agreed.terms.loss):
                raise NonFiniteGradient
            descend(self.optimizer, settings.clip_norm)
        except NonFiniteGradient:
            raise Diverged(self._what_went_bad(number, x, y)) from None
        except (RuntimeError, MemoryError) as error:
            refuse_if_too_large(error, self._loss, self.model, self.guide, self.optimizer, x, y)
            raise
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

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.examples.take(rows)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        x = lookup(AUGMENTATIONS, self.settings.augment)(x)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous(), y

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        # With an estimator of its own: the step's may still be in the middle of a forward pass that failed.
        with poutine.block(), lookup(ESTIMATORS, self.settings.estimator)():
            return self.elbo.differentiable_loss(self.model, self.guide, x, y)

    def _what_went_bad(self, number: int, x: Tensor, y: Tensor) -> str:
        terms, where = self.elbo.terms, first_gone_bad(self.model, self.guide, x, y)
        found = f"(loss {terms.loss}, nll {terms.nll}, kl {terms.kl} nats per datum): {where}"
        return (
            f"training went bad at step {number} {data_parallel.report(self.ranks, found, terms.loss)}. "
            "The last checkpoint is good; try a smaller train.lr, train.clip_norm, or a smaller guide.init_scale"
        )
