"""The arithmetic of a training step over all the weights of a site, in torch: what weights.c is held to.

Each function works element by element on tensors of one shape and writes into the first of them. It returns None, or a
vector [2] of sums over the elements.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SCALE = 1.2e-7


def softplus(u: Tensor) -> Tensor:
    """The scale of an unconstrained scale: log(1 + e^u) + 1.2e-7."""
    return F.softplus(u).add_(SMALLEST_SCALE)


def inverse_scale(scale: Tensor) -> Tensor:
    """The unconstrained scale of a scale above 1.2e-7: softplus^-1(scale - 1.2e-7)."""
    scale = (scale - SMALLEST_SCALE).clamp_min_(1e-9)
    # s + log(1 - e^-s), which keeps its digits for small s and does not overflow for large.
    return scale.add_((-scale).expm1_().neg_().log_())


def scale(scale: Tensor, u: Tensor, loc: Tensor) -> Tensor:
    """scale = softplus(u); returns the sums of loc^2 + scale^2 and of log scale."""
    torch.add(F.softplus(u), SMALLEST_SCALE, out=scale)
    squares = torch.linalg.vector_norm(loc).square() + torch.linalg.vector_norm(scale).square()
    return torch.stack((squares, scale.log().sum()))


def scale_gradients(
    to_loc: Tensor, to_u: Tensor, loc: Tensor, u: Tensor, to_scale: Tensor, to_half_squares: Tensor, to_logs: Tensor
) -> None:
    """Gradients of `scale` from those of the scale, of half the first sum and of the second."""
    scale = softplus(u)
    torch.mul(loc, to_half_squares, out=to_loc)
    torch.mul(torch.sigmoid(u), (scale * to_half_squares).addcdiv_(to_logs, scale).add_(to_scale), out=to_u)


def draw(draw: Tensor, loc: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """draw = loc + softplus(u) * noise; returns the sums that `scale` does."""
    own = torch.empty_like(u)
    sums = scale(own, u, loc)
    torch.addcmul(loc, own, noise, out=draw)
    return sums


def draw_gradients(
    to_loc: Tensor, to_u: Tensor, loc: Tensor, u: Tensor, noise: Tensor, to_draw: Tensor, to_half_squares: Tensor,
    to_logs: Tensor,
) -> None:  # fmt: skip
    """Gradients of `draw` from those of the draw, of half the first sum and of the second."""
    scale_gradients(to_loc, to_u, loc, u, to_draw * noise, to_half_squares, to_logs)
    to_loc.add_(to_draw)


def flipped(
    opposite: Tensor, weight: Tensor, loc: Tensor, plus: Sequence[Tensor], minus: Sequence[Tensor],
    flips: Sequence[Tensor],
) -> None:  # fmt: skip
    """opposite = loc - noise, plus = loc + flip * noise and minus = loc - flip * noise, where noise = weight - loc."""
    noise = weight - loc
    torch.sub(loc, noise, out=opposite)
    for one, other, flip in zip(plus, minus, flips, strict=True):
        own = noise * flip
        torch.add(loc, own, out=one)
        torch.sub(loc, own, out=other)


def flipped_gradients(
    to_weight: Tensor, to_loc: Tensor, to_opposite: Tensor, to_plus: Sequence[Tensor], to_minus: Sequence[Tensor],
    flips: Sequence[Tensor],
) -> None:  # fmt: skip
    """Gradients of `flipped` from those of its results."""
    torch.neg(to_opposite, out=to_weight)
    to_loc.copy_(to_opposite)
    for one, other, flip in zip(to_plus, to_minus, flips, strict=True):
        to_weight.addcmul_(one - other, flip)
        to_loc.add_(one).add_(other)
    to_loc.sub_(to_weight)


def ivon_step(
    loc: Tensor, u: Tensor, momentum: Tensor, to_loc: Tensor, to_u: Tensor, rate: Tensor, c: Tensor, beta1: Tensor
) -> None:
    """A step of `ppl_bnn.inference.ivon` on loc, unconstrained scale and momentum."""
    loc.sub_(ivon_change(u, momentum, to_loc, to_u, c, beta1).mul_(rate))


def ivon_change(u: Tensor, momentum: Tensor, to_loc: Tensor, to_u: Tensor, c: Tensor, beta1: Tensor | float) -> Tensor:
    """`ivon_step` of unconstrained scale and momentum alone; returns what loc moves back by at a rate of 1."""
    momentum.lerp_(to_loc, 1 - beta1)
    # softplus(u), and below its derivative, a sigmoid, which to_u holds: of one exponential, half the time of two.
    t = u.abs().neg_().exp_()
    scale = t.log1p().add_(u.clamp_min(0)).add_(SMALLEST_SCALE)
    change = (to_u * (1 + t)).div_(torch.where(u > 0, 1, t)).mul_(scale).mul_(c)
    scale.mul_(change.square().mul_(0.5).add_(change).add_(1).rsqrt_())
    change = scale.square().mul_(momentum)
    u.copy_(inverse_scale(scale))
    return change
