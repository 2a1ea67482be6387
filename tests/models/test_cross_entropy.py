"""The KL to a Student-t and to a scale mixture: integration, limits that are known, gradients, shapes, Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from ppl_bnn import GaussianScaleMixture, MeanFieldNormal
from ppl_bnn.guides.normal import FactorizedNormal
from ppl_bnn.models import cross_entropy_operation, parse_prior
from ppl_bnn.models.cross_entropy import kl_by_weight
from ppl_bnn.native import arithmetic as arithmetic_module
from ppl_bnn.native.arithmetic import OPERATIONS
from ppl_bnn.native.weights import softplus

# The shipped recipes', and others.
PRIORS = [
    "student_t(1, 0, 0.01)", "student_t(7, 0.3, 0.5)", "scale_mixture(0.5, 1, 0.0025)",
    "scale_mixture(0.001, 1, 0.0025)", "scale_mixture(0.999, 1, 0.0025)", "scale_mixture(0.25, 0.02, 0.3)",
]  # fmt: skip


def a_double(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def in_double(text):
    """The prior of a text, in double precision."""
    prior = parse_prior(text)
    return type(prior)(**{name: getattr(prior, name).double() for name in prior.arg_constraints})


def integral(loc, scale, prior):
    """KL(Normal(loc, scale) || prior): in double, over 9 standard deviations, points close together near 0."""
    ends = [torch.asinh((loc + side * 9 * scale) / 1e-3) for side in (-1, 1)]
    t = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, 4001, dtype=torch.float64).view(-1, *[1] * loc.dim())
    w = 1e-3 * t.sinh()
    q = dist.Normal(loc, scale).log_prob(w)
    return torch.trapezoid(q.exp() * (q - prior.log_prob(w)) * 1e-3 * t.cosh(), t, dim=0)


@pytest.mark.parametrize("text", PRIORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_kl_of_each_weight_is_that_of_integration(text, dtype):
    locs = torch.tensor([0.0, 0.002, 0.01, 0.05, 0.3, 1.0, 4.0])
    loc, scale = torch.meshgrid(locs, torch.logspace(-5, 1, 19), indexing="ij")
    exact = integral(loc.double(), scale.double(), in_double(text))
    prior = in_double(text) if dtype == torch.float64 else parse_prior(text)
    found = kl_by_weight(loc.to(dtype), scale.to(dtype), prior)
    assert float(((found - exact) / (1 + exact.abs())).abs().max()) < (1e-6 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("text", [PRIORS[0], PRIORS[2]])
@pytest.mark.parametrize("way", ["C", "whole", "blocks"])
def test_the_guides_kl_and_its_gradient_are_those_of_single_weights(text, way, monkeypatch):
    if way != "C":
        monkeypatch.setattr(arithmetic_module, "library", lambda *of: None)
    if way == "blocks":
        monkeypatch.setattr(arithmetic_module, "_BLOCK", 20)
    prior = parse_prior(text)
    loc, u = torch.randn(4, 6, 3, 3) * 0.05, torch.randn(4, 6, 3, 3) - 5
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [part.contiguous(memory_format=layout).requires_grad_() for part in (loc, u)]
        exact = [part.detach().double().requires_grad_() for part in leaves]
        expected = kl_divergence(dist.Normal(exact[0], softplus(exact[1])), in_double(text)).sum()
        found = kl_divergence(FactorizedNormal(*leaves), prior.expand([4, 6, 3, 3]).to_event(4))
        gradients = torch.autograd.grad(2 * found, leaves)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        for one, other in zip(gradients, torch.autograd.grad(2 * expected, exact), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


def test_no_number_is_drawn_for_the_kl_and_two_are_equal():
    loc, u = torch.randn(50), torch.randn(50) - 4
    for text in PRIORS:
        prior, before = parse_prior(text).expand([50]).to_event(1), torch.get_rng_state()
        found = [kl_divergence(FactorizedNormal(loc, u), prior) for _ in range(2)]
        assert torch.equal(*found)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_student_t_of_many_degrees_of_freedom_is_a_normal():
    loc, scale = torch.meshgrid(torch.tensor([0.0, 0.3, 2.0]), torch.logspace(-3, 1, 9), indexing="ij")
    q = dist.Normal(loc.double(), scale.double())
    normal = kl_divergence(q, dist.Normal(0.1, 0.5))
    for nu, within in ((1e4, 0.2), (1e6, 2e-3), (1e8, 2e-4)):
        found = kl_divergence(q, dist.StudentT(*(torch.tensor(x).double() for x in (nu, 0.1, 0.5))))
        # The difference falls as 1 / nu, by the fourth power of a deviation.
        assert float(((found - normal).abs() / (1 + (loc**2 + scale**2) ** 2)).max()) < within


def test_a_mixture_that_is_one_normal_has_its_kl():
    loc, scale = torch.meshgrid(torch.tensor([0.0, 0.01, 0.3, 2.0]), torch.logspace(-4, 1, 11), indexing="ij")
    q = dist.Normal(loc.double(), scale.double())
    for mixture, normal in (
        ((0.3, 0.5, 0.5), 0.5),
        ((1.0, 0.5, 0.01), 0.5),
        ((1 - 1e-9, 0.5, 0.01), 0.5),
        ((1e-9, 0.01, 0.5), 0.5),
        ((0.0, 0.02, 0.5), 0.5),
    ):
        found = kl_divergence(q, GaussianScaleMixture(*(torch.tensor(x).double() for x in mixture)))
        torch.testing.assert_close(found, kl_divergence(q, dist.Normal(0.0, normal)), rtol=1e-6, atol=1e-6)


def test_the_order_of_a_mixtures_components_does_not_matter():
    q = dist.Normal(torch.randn(20).double(), torch.rand(20).double())
    one, other = GaussianScaleMixture(0.3, 1.0, 0.05), GaussianScaleMixture(0.7, 0.05, 1.0)
    torch.testing.assert_close(kl_divergence(q, one), kl_divergence(q, other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scales", [(1.0, 0.05), (0.05, 1.0), (0.4, 0.4)])
def test_the_gradients_are_those_of_differences_also_of_what_the_prior_learns(scales):
    loc, scale = (torch.tensor(part, dtype=torch.float64) for part in ([0.0, 0.1, -0.7, 2.0], [0.003, 0.2, 0.4, 1.5]))
    q = loc.requires_grad_(), scale.requires_grad_()

    def kl_student_t(loc, scale, *prior):
        return kl_divergence(dist.Normal(loc, scale), dist.StudentT(*prior, validate_args=False))

    def kl_mixture(loc, scale, *prior):
        return kl_divergence(dist.Normal(loc, scale), GaussianScaleMixture(*prior, validate_args=False))

    assert torch.autograd.gradcheck(kl_student_t, (*q, *a_double(3.0, 0.1, scales[0])), eps=1e-5, atol=2e-5)
    assert torch.autograd.gradcheck(kl_mixture, (*q, *a_double(0.3, *scales)), eps=1e-5, atol=2e-4)


def test_parameters_by_weight_are_each_weights_own():
    loc, u = torch.randn(3, 4), torch.randn(3, 4) - 3
    df, scale, weight = torch.rand(3, 1) + 1, torch.rand(4) + 0.1, torch.rand(3, 4)
    student_t, mixture = dist.StudentT(df, loc * 2, scale), GaussianScaleMixture(weight, scale, 0.3)
    q = FactorizedNormal(loc, u)
    for prior in (student_t, mixture):
        assert cross_entropy_operation(prior) is None
        names = prior.arg_constraints
        single = [
            kl_divergence(
                dist.Normal(loc[i, j], q.scale[i, j]),
                type(prior)(**{name: getattr(prior, name).expand(3, 4)[i, j] for name in names}),
            )
            for i in range(3)
            for j in range(4)
        ]
        torch.testing.assert_close(kl_divergence(q, prior.to_event(2)), torch.stack(single).sum())
        # Rows as a batch of the prior (a plate) and columns as an event.
        torch.testing.assert_close(kl_divergence(q, prior.to_event(1)), torch.stack(single).sum())


def test_a_prior_whose_parameters_change_is_asked_anew():
    loc, u = torch.randn(30), torch.randn(30) - 3
    scale = torch.tensor(0.1)
    prior = dist.StudentT(2.0, 0.0, scale)
    first = kl_divergence(FactorizedNormal(loc, u), prior.expand([30]).to_event(1))
    with torch.no_grad():
        prior.scale.mul_(3)
    second = kl_divergence(FactorizedNormal(loc, u), prior.expand([30]).to_event(1))
    expected = kl_divergence(FactorizedNormal(loc, u), dist.StudentT(2.0, 0.0, 0.3).expand([30]).to_event(1))
    assert not torch.isclose(first, second)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("text", PRIORS)
def test_pruned_weights_do_not_count(text):
    leaves = [(torch.randn(6, 7) * 0.1).requires_grad_(), (torch.randn(6, 7) - 4).requires_grad_()]
    keep, prior = torch.rand(6, 7) < 0.5, parse_prior(text)
    found = kl_divergence(FactorizedNormal(*leaves, keep), prior.expand([6, 7]).to_event(2))
    left = [part[keep] for part in leaves]
    expected = kl_divergence(FactorizedNormal(*left), prior.expand([len(left[0])]).to_event(1))
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert not one[~keep].any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_constant_student_ts_and_mixtures_have_an_operation():
    for prior in (dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 1.0), dist.StudentT(2.0, torch.zeros(3), 1.0)):
        assert cross_entropy_operation(prior) is None
    assert cross_entropy_operation(dist.StudentT(2.0, 0.0, torch.tensor(1.0, requires_grad=True))) is None
    operation, scalars = cross_entropy_operation(dist.StudentT(2.0, 0.0, 1.0).expand([5, 4]).to_event(2))
    assert operation is OPERATIONS["student_t"]
    assert len(scalars) == operation.scalars - 1
    operation, scalars = cross_entropy_operation(
        GaussianScaleMixture(0.5, 1.0, 0.0025).expand([9]), dtype=torch.float64
    )
    assert operation is OPERATIONS["scale_mixture"]
    assert len(scalars) == operation.scalars - 1
    assert all(scalar.dtype == torch.float64 and not scalar.dim() for scalar in scalars)


@pytest.mark.parametrize("text", [PRIORS[0], PRIORS[2]])
def test_pyros_own_elbo_takes_the_kl_without_a_draw(text):
    prior, elbo = parse_prior(text), TraceMeanField_ELBO()

    def model():
        pyro.sample("w", prior.expand([3, 40]).to_event(2))

    def with_plate():
        model()
        with pyro.plate("rows", 5):
            pyro.sample("v", prior)

    def normals():
        pyro.sample("w", dist.Normal(0.1, 0.05).expand([3, 40]).to_event(2))
        with pyro.plate("rows", 5):
            pyro.sample("v", dist.Normal(-0.2, 0.01))

    guide = MeanFieldNormal(model, init_loc=0.1, init_scale=0.01, init_jitter=0.1)
    losses = [[elbo.loss(*pair) for _ in range(3)] for pair in ((model, guide), (with_plate, normals))]
    w, v = (kl_by_weight(*map(torch.tensor, pair), prior) for pair in ((0.1, 0.05), (-0.2, 0.01)))
    own = float(kl_by_weight(*(part.detach() for part in guide.loc_scale("w")), prior).sum())
    assert losses[0] == pytest.approx([own] * 3, rel=1e-5)
    assert losses[1] == pytest.approx([float(120 * w + 5 * v)] * 3, rel=1e-5)


def test_a_prior_without_a_kl_has_quadrature():
    loc, scale = torch.randn(6), torch.rand(6) + 0.5
    # A Cauchy is a Student-t of one degree of freedom, under a name without a KL.
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.Normal(loc, scale), dist.Cauchy(0.0, 2.0))
    cauchy = kl_by_weight(loc, scale, dist.Cauchy(0.0, 2.0))
    torch.testing.assert_close(cauchy, kl_by_weight(loc, scale, dist.StudentT(1.0, 0.0, 2.0)), rtol=1e-3, atol=1e-3)
