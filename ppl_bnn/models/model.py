"""The Pyro model around a network: a likelihood's parameters inside, observed values outside."""

from typing import cast

import pyro
import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, call, lead
from ppl_bnn.models.likelihoods import Categorical, Likelihood


class Model(nn.Module):
    """A Pyro model: y_i ~ likelihood(net(x_i)), i = 1 .. num_data.

    The network and the likelihood's own random variables run outside the data plate: only the observation is rescaled
    from the batch to `num_data`. It is an ordinary Pyro model: `Predictive`, `condition`, NUTS and Pyro's own ELBOs
    work on it.

    Args:
        net: a network from `build` or `bayesian` (or a deterministic one), [N, ...] -> outputs [N, *]. It may have
            several inputs (`ppl_bnn.inputs.call`).
        likelihood: p(y | outputs), by which `predict` summarizes draws too.
        num_data: number of training examples N in the likelihood.
    """

    def __init__(self, net: nn.Module, likelihood: Likelihood, num_data: int) -> None:
        super().__init__()
        if not isinstance(likelihood, Likelihood):
            raise UserError(
                f"likelihood must be a Likelihood, such as Normal() or Categorical(), got {likelihood!r:.60}"
            )
        if num_data < 1:
            raise UserError(f"num_data must be at least 1, got {num_data}")
        self.net = net
        self.likelihood = likelihood
        self.num_data = num_data

    def forward(self, x: Inputs, y: Tensor | None = None) -> Tensor:
        """Inputs [B, ...] and observed values [B, ...] (or None) -> outputs [B, *]."""
        # Not as an attribute: nn.Module finds a module by a failed look-up first, a microsecond each.
        likelihood = cast(Likelihood, self._modules["likelihood"])
        outputs = self.outputs(x)
        distribution = likelihood.distribution(outputs, **(latents := likelihood.latents()))
        first = x if isinstance(x, Tensor) else lead(x)
        if distribution.batch_shape[-1:] != (len(first),):
            # Pyro would refuse the site, and not say why.
            likelihood.check(outputs, **latents)
        # A given `subsample` keeps the plate from drawing a permutation of num_data each step.
        with pyro.plate("data", self.num_data, subsample=first):
            pyro.sample("y", distribution, obs=y)
        return outputs

    def outputs(self, x: Inputs) -> Tensor:
        """The network's outputs [B, *] as the likelihood takes them, for inputs [B, ...]."""
        net = cast(nn.Module, self._modules["net"])
        outputs = one_tensor(net(x) if isinstance(x, Tensor) else call(net, x))
        # Differences of log-probabilities, and their sum over a batch, need more digits than layers in half precision.
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def one_tensor(outputs: object) -> Tensor:
    """The tensor that a network returned, or the logits of an output object (as those of transformers have them).

    Raises:
        UserError: there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(logits := getattr(outputs, "logits", None), Tensor):
        return logits
    raise UserError(
        f"the network must return one tensor [N, ...], got a {type(outputs).__name__}: convert a module around it that "
        "returns the tensor, such as one value of a dict"
    )


class Classifier(Model):
    """A `Model` of class labels: y_i ~ Categorical(logits = net(x_i)), i = 1 .. num_data.

    Args:
        net: a network from `build` or `bayesian` (or a deterministic one), [N, ...] -> logits [N, C]; or [N, C, H, W]
            with a label [H, W] for each pixel.
        num_data: number of training examples N in the likelihood.
    """

    def __init__(self, net: nn.Module, num_data: int) -> None:
        super().__init__(net, Categorical(), num_data)
