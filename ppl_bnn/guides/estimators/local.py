"""Local reparameterization: sample each layer's output instead of its weights (Kingma, Salimans and Welling 2015)."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators.base import KnowsPosteriors

# The least variance: an input of zeros does not make the gradient 0/0, nor a convolution that rounds below 0 a NaN.
_TINY = 1e-16


class LocalReparameterization(KnowsPosteriors):
    """Pyro handler: y = loc x + b + sqrt(scale^2 x^2) * eps, eps ~ Normal(0, 1) for every output (their eq. 6).

    For a Linear layer on [N, in] the outputs have exactly the distribution of independent weight draws for each
    example. For Conv2d it assumes that outputs at different positions are independent, which weights shared over
    space are not: means and variances are exact, covariances over space are dropped. For [N, ..., in] inputs to
    Linear the same is assumed of the middle dimensions.

    Weights are not sampled at all: in the guide's trace the site's value is its loc. The objective takes the KL
    from the distributions, not from that value, so it stays correct.

    Correct where every matrix-valued site of the guide is the weight of a Bayesian layer: a weight that the model
    uses otherwise would lose its noise, and is refused by name at the next step.
    """

    def __enter__(self) -> Self:
        self._unused: set[str] = set()
        return super().__enter__()

    def _pyro_sample(self, msg: dict) -> None:
        # A random bias is a vector; it is sampled as it is.
        if not msg["done"] and not msg["is_observed"] and "posterior" in msg["infer"] and msg["fn"].event_dim > 1:
            if msg["name"] in self._unused:
                raise UserError(
                    f"site {msg['name']!r} is not the weight of a Bayesian layer, so local reparameterization "
                    "cannot give it noise; use the plain or flipout estimator"
                )
            self._unused.add(msg["name"])
            msg["value"], msg["done"] = msg["infer"]["posterior"].loc, True

    def _pyro_bayes_linear(self, msg: dict) -> None:
        self._sample_output(msg, F.linear)

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        self._sample_output(msg, F.conv2d)

    def _sample_output(self, msg: dict, function: Callable[..., Tensor]) -> None:
        if msg["name"] in self.posterior:
            self._unused.discard(msg["name"])
            x, _, bias, *settings = msg["args"]
            q = self.posterior[msg["name"]]
            mean = function(x, q.loc, bias, *settings)
            # x * x: autocast computes a power in float32, on a GPU.
            variance = function(x * x, q.scale.square(), None, *settings)
            msg["value"] = torch.addcmul(mean, variance.clamp_min(_TINY).sqrt(), torch.randn_like(mean))
            msg["done"] = True
