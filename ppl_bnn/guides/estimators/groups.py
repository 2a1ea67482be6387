"""Sign-flipped groups: flipout's decorrelation between groups of examples, at close to the cost of one convolution."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators.base import Estimator, kept_noise
from ppl_bnn.guides.normal import outer_shapes, signs
from ppl_bnn.models.drawn import Use
from ppl_bnn.native.arithmetic import OPERATIONS


class GroupedFlips(Estimator):
    """Pyro handler: the batch is cut into groups, and group g uses w_g = loc + (r_g s_g^T) * (w - loc).

    w is the guide's draw of the step, s_g in {-1, +1}^in and r_g in {-1, +1}^out are drawn for each pair of groups;
    the second group of a pair takes the opposite perturbation (antithetic). Every w_g has the distribution of w, so
    the ELBO's expectation is unchanged, as in flipout (Wen et al. 2018, eq. 3), which draws signs for every example
    and pays a second convolution for it; here each example is convolved once, with its group's weights. Different
    pairs are uncorrelated; within a pair the part of the noise that is odd in the weights cancels.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. A random bias
    is shared by the batch. What it computes, and what has the plain draw, see `ppl_bnn.guides.estimators.base`.

    Args:
        groups: number of groups, at least 2; a batch with fewer examples has a group for each.
    """

    def __init__(self, groups: int = 4) -> None:
        if groups < 2:
            raise UserError(f"groups must be at least 2, got {groups}; one group is the plain estimator")
        super().__init__()
        self.groups = self.copies = groups

    def layer(self, site: str, use: Use) -> Tensor:
        """See `Estimator`."""
        x, weight, bias, function = use.layer_arguments()
        parts = x.split(math.ceil(len(x) / self.groups))
        # w itself has the distribution of a flipped w, so the first pair needs no signs.
        q, kept = self.posterior[site], self.kept(site)
        if q.copies:
            weights: tuple[Tensor, ...] = (weight, *q.copies)
        else:
            flips = [kept_noise(kept, pair, lambda: _outer_signs(weight)) for pair in range((len(parts) - 1) // 2)]
            weights = weight, *_Flipped.apply(weight, q.loc, *flips)  # type: ignore[no-untyped-call]
        # An odd number of groups leaves the last weights unused.
        return torch.cat([function(part, own, bias) for part, own in zip(parts, weights, strict=False)])


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
    outputs, inputs = outer_shapes(weight)
    return signs(weight, outputs) * signs(weight, inputs)
