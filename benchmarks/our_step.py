"""The training step of `ppl_bnn.fit`, without its loop, checks and log."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal
from ppl_bnn.guides import ESTIMATORS, GroupedFlips
from ppl_bnn.guides.estimators import Estimator
from ppl_bnn.inference.direct import DirectELBO, Numbers
from ppl_bnn.inference.graph import Replayed, cuda_capture
from ppl_bnn.inference.updates import Update

METHODS: dict[str, Callable[[], Any]] = {
    **ESTIMATORS,
    **{f"groups-{count}": lambda count=count: GroupedFlips(count) for count in (2, 8, 16)},
}


class OurStep:
    """A step of a classifier under a mean-field guide, at a KL weight of 1.

    Args:
        optimizer: of `build_optimizer`.
        estimator: a name of `METHODS`.
        gathers: see `DirectELBO`.
        compiles: run the network through torch.compile, with the estimator ``plain``.
    """

    def __init__(
        self, model: Classifier, guide: MeanFieldNormal, optimizer: torch.optim.Optimizer, *, estimator: str = "plain",
        gathers: bool = True, compiles: bool = False,
    ) -> None:  # fmt: skip
        optimizer.param_groups[0]["kl_per_datum"] = 1 / model.num_data
        handler = METHODS[estimator]()
        own = handler if isinstance(handler, Estimator) else None
        self.elbo = DirectELBO(model, guide, model.num_data, own, gathers=gathers)
        self.update = Update(optimizer, self.elbo.flat)
        if compiles and own is None:
            model.net.compile()
        like = next(iter(nn.ModuleList([guide, model]).parameters()))
        # On a device, as `fit` has it: a number would be waited for.
        self._kl_weight: Any = 1.0 if like.is_cpu else torch.ones((), device=like.device)

    def __call__(self, x: Tensor, y: Tensor) -> Numbers:
        """One step on inputs [B, ...] and labels [B]."""
        self.update.prepare()
        found = self.gradients(x, y)
        self.update(found.squares)
        return found

    def gradients(self, x: Tensor, y: Tensor) -> Numbers:
        """The parts of the loss, with the gradients in place."""
        return self.elbo.gradients(x, y, kl_weight=self._kl_weight)

    def replayed(self, x: Tensor, y: Tensor) -> Callable[[], object]:
        """The step on this batch, replayed as a CUDA graph once it has run three times."""

        def run(x: Tensor, y: Tensor) -> Tensor:
            found = self.gradients(x, y)
            self.update(found.squares)
            return torch.stack([part.to(found.loss.dtype) for part in found[:4]])

        capture, beside = cuda_capture(x.device) if x.is_cuda else (None, nullcontext)
        replayed = Replayed(run, capture, beside)

        def step() -> None:
            self.update.prepare()
            replayed(x, y)

        return step
