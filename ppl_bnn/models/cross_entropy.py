"""The KL from a Normal to a Student-t and to a scale mixture, which have no closed form: without a draw.

KL(q || p) = -H(q) - E_q[log p]. The second part, the cross entropy, is to about 1e-6 of 1 + its size, and so are its
derivatives. Pyro's and torch's own `kl_divergence` know both. `cross_entropy_operation` is for a training step.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT, kl_divergence, register_kl

from ppl_bnn.models.priors import GaussianScaleMixture, elementwise, varies
from ppl_bnn.native.arithmetic import OPERATIONS, Operation, scale_mixture
from ppl_bnn.native.expectations import expected_log, expected_softplus, grid


def kl_by_weight(loc: Tensor, scale: Tensor, prior: Distribution) -> Tensor:
    """KL(Normal(loc, scale) || prior) of each single weight, nats, of loc's shape.

    It is what `kl_divergence` knows; for other priors, 16-point Gauss-Hermite quadrature of the expected log density.
    """
    base, q = elementwise(prior), Normal(loc, scale, validate_args=False)
    try:
        return kl_divergence(q, base)
    except NotImplementedError:
        # KL = -H(q) - E_q[log p]. Gauss-Hermite: E[f(w)] = sum_k weight_k / sqrt(pi) f(loc + sqrt(2) scale node_k).
        total = -q.entropy()
    for node, weight in zip(*np.polynomial.hermite.hermgauss(16), strict=True):
        at = torch.add(loc, scale, alpha=math.sqrt(2) * float(node))
        total = total - float(weight) / math.sqrt(math.pi) * base.log_prob(at)
    return total


def prior_parameters(base: Distribution) -> tuple[Tensor, ...]:
    """The parameters of a Student-t (df, loc, scale) or a scale mixture (weight, scale1, scale2); none of another."""
    if isinstance(base, StudentT):
        return base.df, base.loc, base.scale
    return (base.weight, base.scale1, base.scale2) if isinstance(base, GaussianScaleMixture) else ()


def cross_entropy_operation(
    prior: Distribution, *, dtype: torch.dtype = torch.float32
) -> tuple[Operation, tuple[Tensor, ...]] | None:
    """The operation for the cross entropy of weights to a prior, and its scalars after k; None for another prior.

    ``operation(to_loc, to_u, loc, u, k, *scalars)`` adds k times the gradients of sum_j -E_q[log p(w_j)], nats, to
    to_loc and to_u in place. It returns that sum, and a 0 behind it. q is Normal(loc, softplus(u) + 1.2e-7).

    Args:
        prior: of all the weights: a Student-t or a scale mixture whose parameters are the same for all and not learnt.
        dtype: of loc and u.
    """
    base = elementwise(prior)
    parameters = prior_parameters(base)
    if not parameters or any(one.requires_grad or varies(one) for one in parameters):
        return None
    # In double precision: a difference of log-gammas loses digits.
    numbers = [torch.tensor(float(one[(0,) * one.dim()]), dtype=torch.float64) for one in parameters]
    operation, scalars = OPERATIONS["student_t"], _student_t(*numbers)
    if isinstance(base, GaussianScaleMixture):
        scalars = _scale_mixture(*numbers)
        step, points = grid(scalars[0])
        operation, scalars = scale_mixture(_even(points)), (*scalars, step)
    return operation, tuple(scalar.to(device=parameters[0].device, dtype=dtype) for scalar in scalars)


@register_kl(Normal, StudentT)
def _kl_student_t(q: Normal, p: StudentT) -> Tensor:
    center, width, power, offset = _student_t(*prior_parameters(p))
    value = _differentiable(expected_log, (q.loc - center) / width, q.scale / width)
    return power * value + offset - q.entropy()


@register_kl(Normal, GaussianScaleMixture)
def _kl_scale_mixture(q: Normal, p: GaussianScaleMixture) -> Tensor:
    c, root, precision, offset = _scale_mixture(*prior_parameters(p))
    step, points = grid(c.detach())

    def expectation(loc: Tensor, scale: Tensor, repeated: Tensor) -> tuple[Tensor, ...]:
        # The function's values on its grid are the same for all weights of one c.
        return expected_softplus(loc, scale, c.detach(), step, _even(points.max()))

    value = _differentiable(expectation, root * q.loc, root * q.scale, c)
    return 0.5 * precision * (q.loc.square() + q.scale.square()) + offset - value - q.entropy()


def _student_t(df: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """(center, width, power, offset): -log p(w) = offset + power log(1 + ((w - center) / width)^2)."""
    width, power = scale * df.sqrt(), (df + 1) / 2
    return loc, width, power, (df / 2).lgamma() - power.lgamma() + width.log() + 0.5 * math.log(math.pi)


def _scale_mixture(weight: Tensor, scale1: Tensor, scale2: Tensor) -> tuple[Tensor, ...]:
    """(c, root, precision, offset): -log p(w) = offset + precision w^2 / 2 - log(1 + e^(c - (root w)^2)).

    It is the density of the component of larger scale, and what the other one adds.
    """
    # A component of weight 0 has the weight e^-60.
    logs = weight.log().clamp_min(-60.0), torch.log1p(-weight).clamp_min(-60.0)
    first = scale1 >= scale2
    wide, narrow = (torch.where(first, *pair) for pair in ((scale1, scale2), (scale2, scale1)))
    log_wide, log_narrow = (torch.where(first, *pair) for pair in (logs, logs[::-1]))
    precision = wide**-2
    # Not quite 0 for equal scales, where the root has no derivative.
    root = (0.5 * (narrow**-2 - precision) + 1e-12 * precision).sqrt()
    offset = 0.5 * math.log(2 * math.pi) + wide.log() - log_wide
    return log_narrow - log_wide + wide.log() - narrow.log(), root, precision, offset


def _even(points: Tensor) -> int:
    return 2 * math.ceil(float(points) / 2)


def _differentiable(function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> Tensor:
    """The first result of `function`, whose others are the derivatives of each element by its arguments."""
    return _Differentiable.apply(function, *torch.broadcast_tensors(*arguments))  # type: ignore[no-any-return,no-untyped-call]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> Tensor:
        value, *derivatives = function(*arguments)
        ctx.save_for_backward(*derivatives)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, to_value: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(to_value * derivative for derivative in ctx.saved_tensors))
