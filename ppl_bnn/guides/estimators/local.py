"""Local reparameterization: sample each layer's output instead of its weights (Kingma, Salimans and Welling 2015)."""

import logging
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators.base import KnowsPosteriors

log = logging.getLogger(__name__)

# The least variance: an input of zeros does not make the gradient 0/0, nor a convolution that rounds below 0 a NaN.
_TINY = 1e-16


class LocalReparameterization(KnowsPosteriors):
    """Pyro handler: y = loc x + b + sqrt(scale^2 x^2) * eps, eps ~ Normal(0, 1) for every output (their eq. 6).

    For a Linear layer on [N, in], used once, the outputs have exactly the distribution of independent weight draws for
    each example. Elsewhere each output has the right mean and variance, and covariances within an example are wrong,
    so the ELBO is biased; `plain`, `flipout` and `groups` are not:

    * Linear on [N, ..., in]: eps is one number for each example and output unit, shared over the positions in between.
      The noise at two positions t and u then has correlation 1 instead of the true
      sum_j scale_j^2 x_tj x_uj / sqrt(sum_j scale_j^2 x_tj^2 * sum_j scale_j^2 x_uj^2): the noise of a mean over
      positions is too large, or right where the positions are equal up to a positive factor.
    * Conv2d: eps is drawn for each position, so covariances over space are 0: the noise of a mean over space is too
      small.
    * A layer that a forward pass uses twice has independent noise in its two uses.

    Weights are not sampled at all: in the guide's trace the site's value is its loc. The objective takes the KL
    from the distributions, not from that value, so it stays correct.

    Correct where every matrix-valued site of the guide is the weight of a Bayesian layer: a weight that the model
    uses otherwise would lose its noise, and is refused by name at the next step.
    """

    def __enter__(self) -> Self:
        self._unused: set[str] = set()
        self._warned = False
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
        positions = max(msg["args"][0].dim() - 2, 0)
        if positions and not self._warned:
            self._warned = True
            log.warning(
                "local is biased for layer %s, whose input is %s: its noise has correlation 1 between the positions of "
                "an example. plain, groups and flipout are right there.",
                msg["name"].removesuffix(".weight"),
                list(msg["args"][0].shape),
            )
        self._sample_output(msg, F.linear, (slice(None), *[slice(1)] * positions))

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        self._sample_output(msg, F.conv2d)

    def _sample_output(self, msg: dict, function: Callable[..., Tensor], noise: tuple[slice, ...] = ()) -> None:
        # `noise` are the outputs for which eps is drawn; it is broadcast to the rest.
        if msg["name"] in self.posterior:
            self._unused.discard(msg["name"])
            x, _, bias, *settings = msg["args"]
            q = self.posterior[msg["name"]]
            mean = function(x, q.loc, bias, *settings)
            # x * x: autocast computes a power in float32, on a GPU.
            variance = function(x * x, q.scale.square(), None, *settings)
            msg["value"] = torch.addcmul(mean, variance.clamp_min(_TINY).sqrt(), torch.randn_like(mean[noise]))
            msg["done"] = True
