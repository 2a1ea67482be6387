"""Flipout: a weight perturbation that is pseudo-independent between the examples of a batch (Wen et al. 2018)."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.guides.estimators.base import KnowsPosteriors
from ppl_bnn.guides.normal import standard_normal


class Flipout(KnowsPosteriors):
    """Pyro handler: y_n = loc x_n + r_n * ((w - loc) (s_n * x_n)) + b (Wen et al. 2018, eq. 4).

    w is the guide's draw of the step, so w - loc = scale * eps. s_n in {-1, +1}^in and r_n in {-1, +1}^out are
    independent between examples. Within an example they are constant: over space in a convolution, over all positions
    (tokens, time) of a Linear layer's input [N, ..., in]. So every example has one weight draw,
    loc + r_n s_n^T * (w - loc), with the distribution of a plain draw: the ELBO's expectation is unchanged, and the
    noise of different examples is uncorrelated. Dimension 0 of the input must be the examples. A layer that a forward
    pass uses twice has the same signs in both uses.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. Biased where a
    forward pass uses a layer twice on different numbers of examples: each use then draws its own signs. A site
    without a posterior from the guide (conditioned, or drawn from the prior) is left as a plain draw. A random bias is
    shared by the batch.

    Args:
        noise_dtype: of the second layer, that of the noise (default: x's). With torch.bfloat16 it takes half its time
            where the hardware multiplies bfloat16; rounding is symmetric, so each y_n keeps its mean, and changes the
            noise by less than a hundredth of itself.
    """

    def __init__(self, noise_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.noise_dtype = noise_dtype

    def __enter__(self) -> Self:
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        # A new draw of the weight comes with new signs.
        self._signs.pop(msg["name"], None)
        super()._pyro_post_sample(msg)

    def _pyro_bayes_linear(self, msg: dict) -> None:
        if msg["name"] in self.posterior:
            x, weight, _ = msg["args"]
            examples = (*x.shape[:-1][:1], *[1] * (x.dim() - 2))
            self._flip(msg, F.linear, (*examples, x.shape[-1]), (*examples, len(weight)))

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        if msg["name"] in self.posterior:
            x, weight, *_ = msg["args"]
            self._flip(msg, F.conv2d, (*x.shape[:2], 1, 1), (len(x), len(weight), 1, 1))

    def _flip(self, msg: dict, layer: Callable[..., Tensor], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        x, weight, bias, *settings = msg["args"]
        loc = self.posterior[msg["name"]].loc
        known = self._signs.get(msg["name"])
        if known is None or known[0].shape != inputs or known[0].dtype != x.dtype:
            known = self._signs[msg["name"]] = signs(x, inputs), signs(x, outputs)
        sign_in, sign_out = known
        flipped, noise_weight = x, weight - loc
        if self.noise_dtype is not None:
            flipped, sign_in, noise_weight = (part.to(self.noise_dtype) for part in (flipped, sign_in, noise_weight))
        noise = layer(flipped * sign_in, noise_weight, None, *settings)
        msg["value"] = layer(x, loc, bias, *settings).addcmul_(noise, sign_out)
        msg["done"] = True


def signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent -1 or +1, each with probability 1/2, of `shape` and of `like`'s dtype and device."""
    # Of normal numbers, which are faster to draw than torch's bits.
    noise = standard_normal(torch.empty(shape, dtype=like.dtype, device=like.device))
    return torch.ones_like(noise).copysign_(noise)
