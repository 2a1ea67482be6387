"""The Pyro model around a network: logits inside, observed labels outside."""

import pyro
import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Categorical, Likelihood


class Classifier(nn.Module):
    """A Pyro model: y_i ~ Categorical(logits = net(x_i)), i = 1 .. num_data.

    The network runs outside the data plate: only the observation is rescaled from the batch to `num_data`,
    never the weights' sites. It is an ordinary Pyro model: `Predictive`, `condition`, NUTS and Pyro's own
    ELBOs work on it.

    Args:
        net: a network from `build` or `bayesian` (or a deterministic one), [N, ...] -> logits [N, C].
        num_data: number of training examples N in the likelihood.

    Attributes:
        likelihood: p(y | outputs), by which `predict` summarizes draws too.
    """

    likelihood: Likelihood = Categorical()

    def __init__(self, net: nn.Module, num_data: int) -> None:
        super().__init__()
        if num_data < 1:
            raise UserError(f"num_data must be at least 1, got {num_data}")
        self.net = net
        self.num_data = num_data

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Inputs [B, ...] and labels [B] (or None) -> logits [B, C]."""
        logits = self.net(x)
        # Differences of log-probabilities, and their sum over a batch, need more digits than layers in half precision.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A given `subsample` keeps the plate from drawing a permutation of num_data each step.
        with pyro.plate("data", self.num_data, subsample=x):
            pyro.sample("y", self.likelihood.distribution(logits), obs=y)
        return logits
