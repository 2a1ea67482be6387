"""Expectations under a Normal against numerical integration, in torch and in C, for any loc and scale."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import wofz
from torch import Tensor

from ppl_bnn.native.arithmetic import OPERATIONS, scale_mixture
from ppl_bnn.native.expectations import expected_log, expected_softplus, grid
from ppl_bnn.native.weights import SMALLEST_SCALE


def largest(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to 1 + the number."""
    return float(((found.double() - exact) / (1 + exact.abs())).abs().amax())


def pairs(locs, scales):
    loc, scale = torch.meshgrid(torch.as_tensor(locs), torch.as_tensor(scales), indexing="ij")
    # As float32 holds them, so that both precisions are asked the same.
    return loc.float().double(), scale.float().double()


def integral(function, loc: Tensor, scale: Tensor) -> Tensor:
    """E function(loc + scale e), for a function that changes near 0: in double, with 2001 points."""
    # w = sinh(t) has points near 0 as well as in the Normal's width.
    ends = [torch.asinh(loc + side * 9 * scale) for side in (-1, 1)]
    total = torch.zeros_like(loc)
    step = (ends[1] - ends[0]) / 2000
    for part in torch.arange(2001).split(200):
        t = ends[0] + part.view(-1, 1, 1) * step
        e = (t.sinh() - loc) / scale
        total += (torch.exp(-0.5 * e * e) * function(t.sinh()) * t.cosh()).sum(0)
    return total * step / scale / math.sqrt(2 * math.pi)


@pytest.fixture(scope="module")
def logs():
    """x, r; E log(1 + (x + r e)^2) and its derivatives by x and r, of each."""
    x, r = pairs([0.0, *np.logspace(-3, 3, 13)], np.logspace(-3, 3, 13))
    zeta = (x + 1j) / r
    slope = torch.from_numpy(-1j * math.sqrt(math.pi / 2) * wofz(zeta.numpy() / math.sqrt(2)))
    return x, r, integral(lambda w: (w * w).log1p(), x, r), 2 * slope.real / r, 2 / r * (1 - (zeta * slope).real)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 2e-7), (torch.float32, 1e-6)], ids=str)
def test_the_expected_log_is_that_of_integration_wherever_the_normal_is(logs, dtype, within):
    x, r, *exact = logs
    value, to_x, to_r = expected_log(x.to(dtype), r.to(dtype))
    for found, expected in zip((value, to_x, to_r, r * to_r), (*exact, r * exact[2]), strict=True):
        assert found.dtype == dtype or dtype == torch.float32
        assert largest(found, expected) < within


def softplus_integrals(c, loc, scale):
    """E log(1 + e^(c - y^2)) and its derivatives by loc, log scale and c."""

    def slope(y):
        return -2 * y * torch.sigmoid(c - y * y)

    functions = (
        lambda y: F.softplus(c - y * y, threshold=100),
        slope,
        lambda y: slope(y) * (y - loc),
        lambda y: torch.sigmoid(c - y * y),
    )
    return [integral(function, loc, scale) for function in functions]


@pytest.mark.parametrize("c", [-30.0, -2.0, 0.0, 1.5, 5.99, 10.0, 16.0])
def test_the_expected_softplus_is_that_of_integration_wherever_the_normal_is(c):
    loc, scale = pairs([*np.linspace(0.0, math.sqrt(max(c, 0)) + 4, 14), 30.0, 1e3], np.logspace(-4, 3, 15))
    exact = softplus_integrals(c, loc, scale)
    for dtype, within in ((torch.float64, 6e-7), (torch.float32, 1.2e-6)):
        at = torch.tensor(c, dtype=dtype)
        step, points = grid(at)
        found = expected_softplus(loc.to(dtype), scale.to(dtype), at, step, math.ceil(points))
        for one, other in zip((found[0], found[1], found[2] * scale, found[3]), exact, strict=True):
            assert largest(one, other) < within


def c_code(name, loc, u, *scalars):
    """What the operation gives in float32: sum, gradients."""
    to_loc, to_u = torch.ones(len(loc)), torch.ones(len(loc))
    total, nothing = OPERATIONS[name](to_loc, to_u, loc.float(), u.float(), *map(torch.tensor, (2.0, *scalars)))
    assert float(nothing) == 0
    return total, (to_loc - 1) / 2, (to_u - 1) / 2


@pytest.fixture
def weights():
    """loc, u and scale of weights from the smallest scale to large ones."""
    loc, u = (part.flatten() for part in pairs(np.linspace(-1, 1, 81), np.linspace(-16.5, 4, 201)))
    return loc, u, F.softplus(u, threshold=100) + SMALLEST_SCALE


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_the_c_code_of_the_student_t_keeps_its_digits_at_any_scale(weights, power):
    loc, u, scale = weights
    value, to_x, to_r = expected_log((loc - 0.25) / 0.01, scale / 0.01)
    total, by_loc, by_u = c_code("student_t", loc, u, 0.25, 0.01, power, -3.0)
    assert largest(total, (power * value - 3).sum()) < 2e-6
    assert largest(by_loc, power * to_x / 0.01) < 2e-6
    assert largest(by_u, power * to_r / 0.01 * torch.sigmoid(u)) < 2e-6


@pytest.mark.parametrize("c", [-3.0, 5.99, 20.0])
def test_the_c_code_of_the_scale_mixture_keeps_its_digits_at_any_scale(weights, c):
    loc, u, scale = weights
    step, points = grid(torch.tensor(c))
    value, to_x, to_r, _ = expected_softplus(
        280 * loc, 280 * scale, torch.tensor(c).double(), step.double(), 2 * math.ceil(points / 2)
    )
    total, by_loc, by_u = c_code("scale_mixture", loc, u, c, 280.0, 1.5, 0.7, float(step))
    assert largest(total, (0.7 + 0.75 * (loc**2 + scale**2) - value).sum()) < 2e-6
    # In the unit of the narrow component.
    assert largest(by_loc / 280, 1.5 * loc / 280 - to_x) < 2e-6
    assert largest(by_u, (1.5 * scale - 280 * to_r) * torch.sigmoid(u)) < 2e-6


@pytest.mark.parametrize("name", ["student_t", "scale_mixture"])
def test_c_code_passes_on_what_is_not_finite(name):
    scalars = {"student_t": (1.0, 0.0, 0.01, 1.0, 0.0), "scale_mixture": (1.0, 6.0, 280.0, 1.0, 0.0, 0.2)}[name]
    for which, number in ((0, math.nan), (1, math.nan), (0, math.inf)):
        parts = [torch.randn(50), torch.randn(50)]
        parts[which][7] = number
        gradients = torch.zeros(50), torch.zeros(50)
        sums = OPERATIONS[name](*gradients, *parts, *map(torch.tensor, scalars))
        assert not sums[0].isfinite()


def test_the_number_of_points_makes_one_operation_each():
    assert scale_mixture(44) is scale_mixture(44) is OPERATIONS["scale_mixture"]
    assert scale_mixture(60).reference is not scale_mixture(44).reference
