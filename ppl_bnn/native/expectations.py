"""Expectations under a Normal that the heavy-tailed priors need, in torch: what expectations.h is held to.

Each function works element by element, on any device. It returns the expectation and its derivatives by its arguments.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn.native.weights import softplus

# Of `expected_log`: l of the series, and their lengths. Errors are below 2e-7, relative to 1 + the number.
_L, _TERMS = 4.0, 16
# Of `expected_softplus`: the step where the Normal is narrow, in its scales, and the steps to either side.
_STEP, _REACH = 0.67, 8
_POINTS = [_STEP * j for j in range(-_REACH, _REACH + 1)]
_RULE = [(e, _STEP * math.exp(-0.5 * e * e) / math.sqrt(2 * math.pi)) for e in _POINTS]


def _series() -> tuple[list[float], list[float]]:
    """The coefficients of R and Q, from the lowest power."""
    count = 256
    angle = np.arange(-count + 1, count) * (math.pi / count)
    square = (_L * np.tan(angle / 2)) ** 2
    # Weideman's coefficients a_1, a_2, ... of w.
    a = np.fft.fft(np.fft.fftshift(np.concatenate(([0.0], np.exp(-square) * (_L**2 + square))))).real / (2 * count)
    a = a[1 : count // 2] * (2 * math.sqrt(math.pi) / _L)
    # R = (1 - h) / (1 + Z) with h = sum_n a_n+1 Z^n; Q = 2 (P(Z) - P(-1)) / (1 + Z) with P the antiderivative of h.
    signs = (-1.0) ** np.arange(len(a) + 1)
    rest = -a
    rest[0] += 1
    rise = np.concatenate(([0.0], 2 * a / np.arange(1, len(a) + 1)))
    rise[0] = -(rise * signs).sum()
    divided = [signs[: len(part)] * np.cumsum(signs[: len(part)] * part) for part in (rest, rise)]
    rest, rise = divided[0][: _TERMS - 1], divided[1][:_TERMS]
    # Q(-1) is exact, so that for small r the error falls with r^2: a Student-t of many degrees of freedom asks for it.
    rise[0] += 2 - (rise * signs[:_TERMS]).sum()
    return rest.tolist(), rise.tolist()


_REST, _RISE = _series()


def expected_log(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E log(1 + (x + r e)^2) with e ~ Normal(0, 1), its derivative by x, and by r.

    It is 2 Re E log(zeta + e) + log r^2 at zeta = (x + i) / r, whose derivative by zeta is -i sqrt(pi/2) w(zeta /
    sqrt 2), with w Faddeeva's function. Weideman (1994, SIAM J. Numer. Anal. 31, eq. 38) expands w into powers of
    Z = (l + iz) / (l - iz), which can be integrated: with v = 1 / (1 + q - ix), q = sqrt(2) l r and t = q v,

        Z = 2t - 1
        E = log |v|^-2 - Re t Q(Z)
        dE/dx = 2 Im v (1 + t - 2 t^2 R(Z))
        dE/dr = 2 sqrt(2) l Re t v (1 + 2 (1 - t) R(Z))

    where Q and R have real coefficients. Nothing cancels: not for r far below 1, nor for r far above it.
    """
    q = math.sqrt(2) * _L * r
    v_real, v_imaginary = _divided(1 + q, x)
    t_real, t_imaginary = q * v_real, q * v_imaginary
    z_real, z_imaginary = 2 * t_real - 1, 2 * t_imaginary
    R, Q = (_polynomial(series, z_real, z_imaginary) for series in (_REST, _RISE))
    value = (q * (2 + q) + x * x).log1p() - (t_real * Q[0] - t_imaginary * Q[1])
    # t R, then 1 + t - 2 t (t R) and 1 + 2 (R - t R).
    tR = _times(t_real, t_imaginary, *R)
    ttR = _times(t_real, t_imaginary, *tR)
    to_x = 2 * _times(v_real, v_imaginary, 1 + t_real - 2 * ttR[0], t_imaginary - 2 * ttR[1])[1]
    tv = _times(t_real, t_imaginary, v_real, v_imaginary)
    to_r = 2 * math.sqrt(2) * _L * _times(*tv, 1 + 2 * (R[0] - tR[0]), 2 * (R[1] - tR[1]))[0]
    return value, to_x, to_r


def grid(c: Tensor) -> tuple[Tensor, Tensor]:
    """The step of `expected_softplus` at c, and the least number of points, which may be a fraction."""
    c = c.clamp_min(0.0)
    # The function's poles are at y^2 = c +- i pi; the rule's error is about e^(-2 pi / 0.34), their distance in steps.
    step = 0.34 * math.pi / (2 * (c + (c * c + math.pi**2).sqrt())).sqrt()
    # Outside the grid the function is below softplus(-15) = 3e-7.
    return step, 2 * (c + 15).sqrt() / step


def expected_softplus(
    loc: Tensor, scale: Tensor, c: Tensor, step: Tensor, points: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E log(1 + e^(c - y^2)) with y ~ Normal(loc, scale), and its derivatives by loc, scale and c.

    By the trapezoid rule, on a grid of `points` numbers around 0 where scale is large, on one around loc elsewhere.
    `grid` gives c's step and the least points. c and step have loc's shape, or broadcast to it.
    """
    wide = scale * _STEP >= step
    # Each rule is used everywhere; where the other one counts, at a scale for which it is finite.
    found = (
        _on_the_functions_grid(loc, torch.where(wide, scale, 1.0), c, step, points),
        _on_the_normals_grid(loc, torch.where(wide, 0.0, scale), c),
    )
    value, to_loc, to_scale, to_c = (torch.where(wide, *pair) for pair in zip(*found, strict=True))
    return value, to_loc, to_scale, to_c


def _on_the_functions_grid(loc: Tensor, scale: Tensor, c: Tensor, step: Tensor, points: int) -> list[Tensor]:
    y = step * (torch.arange(points, dtype=loc.dtype, device=loc.device) - (points - 1) / 2).view(-1, *[1] * step.dim())
    at, weight = c - y * y, step / math.sqrt(2 * math.pi)
    values, to_c = F.softplus(at) * weight, torch.sigmoid(at) * weight
    slopes = -2 * y * to_c
    inverse = 1 / scale
    start = -loc * inverse
    value, to_loc, to_scale, derivative = (torch.zeros_like(loc) for _ in range(4))
    for point, own, own_slope, own_c in zip(y.unbind(), values.unbind(), slopes.unbind(), to_c.unbind(), strict=True):
        e = torch.addcmul(start, inverse, point)
        density = torch.exp(-0.5 * e * e)
        slope = own_slope * density
        value, to_loc, to_scale = torch.addcmul(value, own, density), to_loc + slope, torch.addcmul(to_scale, slope, e)
        derivative = torch.addcmul(derivative, own_c, density)
    return [total * inverse for total in (value, to_loc, to_scale, derivative)]


def _on_the_normals_grid(loc: Tensor, scale: Tensor, c: Tensor) -> list[Tensor]:
    value, to_loc, to_scale, to_c = (torch.zeros_like(loc) for _ in range(4))
    for e, probability in _RULE:
        y = torch.add(loc, scale, alpha=e)
        at = torch.addcmul(c, y, y, value=-1)
        own_c = torch.sigmoid(at)
        slope = y * own_c
        value, to_c = torch.add(value, F.softplus(at), alpha=probability), torch.add(to_c, own_c, alpha=probability)
        to_loc, to_scale = (
            torch.add(total, slope, alpha=-2 * probability * factor) for total, factor in ((to_loc, 1), (to_scale, e))
        )
    return [value, to_loc, to_scale, to_c]


def student_t(
    to_loc: Tensor, to_u: Tensor, loc: Tensor, u: Tensor, k: Tensor, center: Tensor, width: Tensor, power: Tensor,
    offset: Tensor,
) -> Tensor:  # fmt: skip
    """Add k times the gradients of the cross entropy to a Student-t; returns its sum (the second number is 0).

    The cross entropy of a weight is -E_q log p = offset + power E log(1 + ((w - center) / width)^2).
    """
    value, to_x, to_r = expected_log((loc - center) / width, softplus(u) / width)
    factor = k * power / width
    to_loc.add_(to_x * factor)
    to_u.add_(to_r * factor * torch.sigmoid(u))
    return _alone((value * power + offset).sum())


@cache
def scale_mixture(points: int) -> Callable[..., Tensor]:
    """The operation `scale_mixture` on a grid of so many points."""

    def scale_mixture(
        to_loc: Tensor, to_u: Tensor, loc: Tensor, u: Tensor, k: Tensor, c: Tensor, root: Tensor, precision: Tensor,
        offset: Tensor, step: Tensor,
    ) -> Tensor:  # fmt: skip
        """Add k times the gradients of the cross entropy to a scale mixture; returns its sum (the second number is 0).

        The cross entropy of a weight is -E_q log p = offset + precision E w^2 / 2 - E log(1 + e^(c - (root w)^2)).
        """
        scale = softplus(u)
        value, slope, to_scale, _ = expected_softplus(root * loc, root * scale, c, step, points)
        to_loc.add_((precision * loc - root * slope) * k)
        to_u.add_((precision * scale - root * to_scale) * k * torch.sigmoid(u))
        return _alone((offset + 0.5 * precision * (loc * loc + scale * scale) - value).sum())

    return scale_mixture


def _polynomial(series: list[float], z_real: Tensor, z_imaginary: Tensor) -> tuple[Tensor, Tensor]:
    # Real coefficients at a complex point: Knuth's recurrence, two multiplications a coefficient.
    twice, square = 2 * z_real, z_real * z_real + z_imaginary * z_imaginary
    one, other = torch.full_like(z_real, series[-1]), torch.zeros_like(z_real)
    for coefficient in series[-2:0:-1]:
        one, other = torch.addcmul(coefficient + twice * one, square, other, value=-1), one
    return series[0] + z_real * one - square * other, z_imaginary * one


def _divided(real: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (real - ix)."""
    inverse = 1 / (real * real + x * x)
    return real * inverse, x * inverse


def _times(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(a + ib) (c + id)."""
    return a * c - b * d, a * d + b * c


def _alone(total: Tensor) -> Tensor:
    return torch.stack((total, torch.zeros_like(total)))
