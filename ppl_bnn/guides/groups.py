"""Sign-flipped groups: flipout's decorrelation between groups of examples, at close to the cost of one convolution."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.guides.flipout import signs


class GroupedFlips(Messenger):
    """Pyro handler: the batch is cut into groups, and group g uses w_g = loc + (r_g s_g^T) * (w - loc).

    w is the guide's draw of the step, s_g in {-1, +1}^in and r_g in {-1, +1}^out are drawn for each pair of groups;
    the second group of a pair takes the opposite perturbation (antithetic). Every w_g has the distribution of w, so
    the ELBO's expectation is unchanged, as in flipout (Wen et al. 2018, eq. 3), which draws signs for every example
    and pays a second convolution for it; here each example is convolved once, with its group's weights. Different
    pairs are uncorrelated; within a pair the part of the noise that is odd in the weights cancels.

    Correct when q is symmetric around loc and independent between weights, as the mean-field Normal is. A site
    without a loc from the guide is left as a plain draw. A random bias is shared by the batch.

    Args:
        groups: number of groups, at least 2; a batch with fewer examples has a group for each.
    """

    def __init__(self, groups: int = 4) -> None:
        if groups < 2:
            raise ValueError(f"groups must be at least 2, got {groups}; one group is the plain estimator")
        super().__init__()
        self.groups = groups

    def __enter__(self) -> "GroupedFlips":
        self._loc: dict[str, Tensor | None] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        self._loc[msg["name"]] = msg["infer"].get("loc")

    def _pyro_bayes_linear(self, msg: dict) -> None:
        self._by_group(msg, F.linear)

    def _pyro_bayes_conv2d(self, msg: dict) -> None:
        self._by_group(msg, F.conv2d)

    def _by_group(self, msg: dict, function: Callable[..., Tensor]) -> None:
        loc = self._loc.get(msg["name"])
        if loc is not None:
            x, weight, bias, *settings = msg["args"]
            noise = weight - loc
            outputs, flips = [], torch.ones((), dtype=x.dtype, device=x.device)
            for group, part in enumerate(x.split(math.ceil(len(x) / self.groups))):
                # w itself has the distribution of a flipped w, so the first pair needs no signs.
                if group % 2:
                    flips = -flips
                elif group:
                    flips = _outer_signs(noise)
                flipped = torch.addcmul(loc, noise, flips) if group else weight
                outputs.append(function(part, flipped, bias, *settings))
            msg["value"] = torch.cat(outputs)
            msg["done"] = True


def _outer_signs(weight: Tensor) -> Tensor:
    # [out, in, 1, ...]: a rank-one pattern over outputs and inputs, constant over a kernel's positions.
    shape = weight.shape
    return signs(weight, (shape[0], *[1] * (len(shape) - 1))) * signs(weight, (1, shape[1], *[1] * (len(shape) - 2)))
