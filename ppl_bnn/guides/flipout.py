"""Flipout: a weight perturbation that is pseudo-independent between the examples of a batch (Wen et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.guides.normal import standard_normal
from ppl_bnn.guides.posteriors import KnowsPosteriors


class Flipout(KnowsPosteriors):
    """Pyro handler: y_n = loc x_n + r_n * ((w - loc) (s_n * x_n)) + b (Wen et al. 2018, eq. 4).

    w is the guide's draw of the step, so w - loc = scale * eps. s_n in {-1, +1}^in and r_n in {-1, +1}^out are
    independent for every example and, in a convolution, constant over space. The marginal distribution of each
    y_n is that of a plain draw, so the ELBO's expectation is unchanged; the noise of different examples is
    uncorrelated.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. A site
    without a posterior from the guide (conditioned, or drawn from the prior) is left as a plain draw. A random bias is
    shared by the batch.
    """

    def _pyro_bayes_linear(self, msg: dict) -> None:
        if msg["name"] in self.posterior:
            x, weight, bias = msg["args"]
            loc = self.posterior[msg["name"]].loc
            sign_in, sign_out = signs(x), signs(x, x.shape[:-1] + weight.shape[:1])
            noise = F.linear(x * sign_in, weight - loc)
            msg["value"] = F.linear(x, loc, bias).addcmul_(noise, sign_out)
            msg["done"] = True

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        if msg["name"] in self.posterior:
            x, weight, bias, *settings = msg["args"]
            loc = self.posterior[msg["name"]].loc
            sign_in, sign_out = signs(x, (*x.shape[:2], 1, 1)), signs(x, (len(x), len(weight), 1, 1))
            noise = F.conv2d(x * sign_in, weight - loc, None, *settings)
            msg["value"] = F.conv2d(x, loc, bias, *settings).addcmul_(noise, sign_out)
            msg["done"] = True


def signs(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Independent -1 or +1, each with probability 1/2, of `like`'s shape (or `shape`), dtype and device."""
    # Of normal numbers, which are faster to draw than torch's bits.
    noise = standard_normal(torch.empty(like.shape if shape is None else shape, dtype=like.dtype, device=like.device))
    return torch.ones_like(noise).copysign_(noise)
