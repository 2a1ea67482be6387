"""Local reparameterization: sample each layer's output instead of its weights (Kingma, Salimans and Welling 2015)."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators.base import Estimator
from ppl_bnn.guides.normal import standard_normal
from ppl_bnn.models.drawn import Use

log = logging.getLogger(__name__)

# The least variance: an input of zeros does not make the gradient 0/0, nor a convolution that rounds below 0 a NaN.
_TINY = 1e-16


class LocalReparameterization(Estimator):
    """Pyro handler: y = loc x + b + sqrt(scale^2 x^2) * eps, eps ~ Normal(0, 1) for every output (their eq. 6).

    For a Linear layer on [N, in], used once, the outputs have exactly the distribution of independent weight draws for
    each example. Elsewhere each output has the right mean and variance, and covariances within an example are wrong,
    so the ELBO is biased; `plain`, `flipout` and `groups` are not:

    * A linear map of [N, ..., in]: eps is one number for each example and output unit, shared over the positions in
      between. The noise at two positions t and u then has correlation 1 instead of the true
      sum_j scale_j^2 x_tj x_uj / sqrt(sum_j scale_j^2 x_tj^2 * sum_j scale_j^2 x_uj^2): the noise of a mean over
      positions is too large, or right where the positions are equal up to a positive factor.
    * Convolutions: eps is drawn for each position, so covariances over space are 0: the noise of a mean over space is
      too small.
    * A weight that a forward pass uses twice has independent noise in its two uses.

    Weights of layers are not sampled at all: in the guide's trace the site's value is its loc. The objective takes the
    KL from the distributions, not from that value, so it stays correct. A weight that is used otherwise is drawn there.
    One that no function uses would lose its noise, and is refused by name at the next step.
    """

    takes_variance = True

    def __init__(self) -> None:
        super().__init__()
        self._unused: set[str] = set()
        self._warned = False

    def _pyro_sample(self, msg: dict) -> None:
        # A random bias is a vector; it is sampled as it is. So is a site that is known to have the plain draw.
        if msg["done"] or msg["is_observed"] or msg["name"] in self.plain_sites:
            return
        if "posterior" in msg["infer"] and msg["fn"].event_dim > 1:
            if msg["name"] in self._unused:
                raise UserError(
                    f"site {msg['name']!r} is no random parameter of a bayesian network that the model uses, so local "
                    "reparameterization cannot give it noise; use the plain or flipout estimator"
                )
            self._unused.add(msg["name"])
            msg["value"], msg["done"] = msg["infer"]["posterior"].loc, True

    def layer(self, site: str, use: Use) -> Tensor:
        """See `Estimator`."""
        self._unused.discard(site)
        x, _, bias, function = use.layer_arguments()
        positions = x.dim() - 2 if use.function is F.linear else 0
        if positions and not self._warned:
            self._warned = True
            log.warning(
                "local is biased for layer %s, whose input is %s: its noise has correlation 1 between the positions of "
                "an example. plain, groups and flipout are right there.",
                site.removesuffix(".weight"), list(x.shape),
            )  # fmt: skip
        q = self.posterior[site]
        if use.function is F.linear and x.dim() == 2 and not torch.is_autocast_enabled(x.device.type):
            noise = standard_normal(x.new_empty(len(x), len(q.loc)))
            return _Linear.apply(x, q.loc, q.variance, bias, noise)  # type: ignore[no-any-return]
        mean = function(x, q.loc, bias)
        # x * x: autocast computes a power in float32, on a GPU.
        variance = function(x * x, q.variance, None)
        noise = standard_normal(mean[(slice(None), *[slice(1)] * positions)])
        return torch.addcmul(mean, variance.clamp_min(_TINY).sqrt(), noise)

    def plain_use(self, use: Use) -> Any:
        """See `Estimator`: draws the weights that have none."""
        draws = {}
        for site in use.sites:
            self._unused.discard(site)
            if site in self.posterior and site not in self.plain_sites:
                kept = self.kept(site)
                if "draw" not in kept:
                    kept["draw"] = self.posterior[site].rsample()
                draws[site] = kept["draw"]
        return use.plainly(draws)


class _Linear(torch.autograd.Function):
    """x loc^T + bias + sqrt(x^2 variance^T) * noise: what autograd makes of it, in half the operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loc: Tensor, variance: Tensor, bias: Tensor | None, noise: Tensor) -> Tensor:
        squares = x * x
        # A sum of squares is no less than 0; a bias costs less than a bound.
        root = F.linear(squares, variance, x.new_full(loc.shape[:1], _TINY)).sqrt_()
        ctx.save_for_backward(x, squares, loc, variance, noise, root)
        return F.linear(x, loc, bias).addcmul_(root, noise)

    @staticmethod
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, ...]:
        x, squares, loc, variance, noise, root = ctx.saved_tensors
        to_variance = torch.div(noise, root).mul_(to_y).mul_(0.5)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.addcmul(to_y @ loc, x, to_variance @ variance, value=2)
        to_bias = to_y.sum(0) if ctx.needs_input_grad[3] else None
        return to_x, to_y.t() @ x, to_variance.t() @ squares, to_bias, None
