"""Sign-flipped groups: flipout's decorrelation between groups of examples, at close to the cost of one convolution."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators.base import KnowsPosteriors
from ppl_bnn.guides.estimators.flipout import signs
from ppl_bnn.native.arithmetic import OPERATIONS


class GroupedFlips(KnowsPosteriors):
    """Pyro handler: the batch is cut into groups, and group g uses w_g = loc + (r_g s_g^T) * (w - loc).

    w is the guide's draw of the step, s_g in {-1, +1}^in and r_g in {-1, +1}^out are drawn for each pair of groups;
    the second group of a pair takes the opposite perturbation (antithetic). Every w_g has the distribution of w, so
    the ELBO's expectation is unchanged, as in flipout (Wen et al. 2018, eq. 3), which draws signs for every example
    and pays a second convolution for it; here each example is convolved once, with its group's weights. Different
    pairs are uncorrelated; within a pair the part of the noise that is odd in the weights cancels.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. A site
    without a posterior from the guide is left as a plain draw. A random bias is shared by the batch.

    Args:
        groups: number of groups, at least 2; a batch with fewer examples has a group for each.
    """

    def __init__(self, groups: int = 4) -> None:
        if groups < 2:
            raise UserError(f"groups must be at least 2, got {groups}; one group is the plain estimator")
        super().__init__()
        self.groups = groups

    def __enter__(self) -> Self:
        # Of each site in this forward pass: a layer that is used twice has the same weights in both uses.
        self._flips: dict[str, list[Tensor]] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        self._flips.pop(msg["name"], None)
        super()._pyro_post_sample(msg)

    def _pyro_bayes_linear(self, msg: dict) -> None:
        self._by_group(msg, F.linear)

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        self._by_group(msg, F.conv2d)

    def _by_group(self, msg: dict, function: Callable[..., Tensor]) -> None:
        x, weight, bias, *settings = msg["args"]
        # An input without examples, a vector say, is left to the plain draw.
        if msg["name"] not in self.posterior or x.dim() < weight.dim():
            return
        parts = x.split(math.ceil(len(x) / self.groups))
        # w itself has the distribution of a flipped w, so the first pair needs no signs.
        flips = self._flips.setdefault(msg["name"], [])
        needed = (len(parts) - 1) // 2
        flips += [_outer_signs(weight) for _ in range(len(flips), needed)]
        loc = self.posterior[msg["name"]].loc
        weights = weight, *_Flipped.apply(weight, loc, *flips[:needed])  # type: ignore[no-untyped-call]
        # An odd number of groups leaves the last weights unused.
        outputs = [function(part, own, bias, *settings) for part, own in zip(parts, weights, strict=False)]
        msg["value"] = torch.cat(outputs)
        msg["done"] = True


class _Flipped(torch.autograd.Function):
    """loc - noise, and loc + flip * noise, loc - flip * noise for each flip, where noise = weight - loc."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, loc: Tensor, *flips: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*flips)
        opposite, *pairs = (torch.empty_like(weight) for _ in range(1 + 2 * len(flips)))
        OPERATIONS["flipped"](opposite, weight, loc, pairs[::2], pairs[1::2], flips)
        return opposite, *pairs

    @staticmethod
    def backward(ctx: Any, to_opposite: Tensor, *to_pairs: Tensor) -> tuple[Tensor | None, ...]:
        flips = ctx.saved_tensors
        to_weight, to_loc = torch.empty_like(to_opposite), torch.empty_like(to_opposite)
        OPERATIONS["flipped_gradients"](to_weight, to_loc, to_opposite, to_pairs[::2], to_pairs[1::2], flips)
        return to_weight, to_loc, *[None] * len(flips)


def _outer_signs(weight: Tensor) -> Tensor:
    # [out, in, 1, ...]: a rank-one pattern over outputs and inputs, constant over a kernel's positions.
    shape = weight.shape
    return signs(weight, (shape[0], *[1] * (len(shape) - 1))) * signs(weight, (1, shape[1], *[1] * (len(shape) - 2)))
