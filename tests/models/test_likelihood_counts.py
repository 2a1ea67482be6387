"""Counts: Poisson and NegativeBinomial against scipy, at ordinary and at extreme outputs."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from likelihood_conformance import check_likelihood
from scipy import stats

from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import NegativeBinomial, Poisson
from ppl_bnn.models.likelihoods.counts import LogNegativeBinomial, LogPoisson

OUTPUTS = 0.5 * torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0)) + 0.5
COUNTS = torch.tensor([0, 2, 1, 5, 0])


def variance(samples):
    return samples.double().var(0)


def refused(outputs):
    bad = (-COUNTS - 1, COUNTS + 0.5, COUNTS * float("nan"), COUNTS[:, None], ["a"] * 5)
    return [(outputs[0], values) for values in bad]


@pytest.mark.parametrize("shape", [(), (1,)], ids=["N", "N1"])
def test_poisson_keeps_the_contract(shape):
    outputs = OUTPUTS[..., 0].unflatten(1, (5, *shape))
    check_likelihood(Poisson(), outputs, COUNTS.numpy(), refused(outputs), total_of_draws=variance)


def test_poisson_of_several_counts_keeps_the_contract():
    y = torch.stack([COUNTS, COUNTS + 1], 1).byte()
    check_likelihood(Poisson(), OUTPUTS, y, [(OUTPUTS[0], COUNTS)], total_of_draws=variance)


@pytest.mark.parametrize("overdispersion", [0.4, "learnt", "predicted"])
def test_negative_binomial_keeps_the_contract(overdispersion):
    outputs = OUTPUTS if overdispersion == "predicted" else OUTPUTS[..., 0]
    likelihood = NegativeBinomial(overdispersion, start=0.3).requires_grad_(False)
    check_likelihood(likelihood, outputs, COUNTS, refused(outputs), total_of_draws=variance)


def test_densities_and_moments_are_scipys():
    y, log_mean, overdispersion = torch.arange(30), torch.linspace(-2, 4, 30), torch.linspace(0.01, 3, 30)
    rate, r = log_mean.double().exp(), 1 / overdispersion.double()
    poisson, other = stats.poisson(rate), stats.nbinom(r, r / (r + rate))
    for own, theirs in ((LogPoisson(log_mean), poisson), (LogNegativeBinomial(log_mean, overdispersion), other)):
        np.testing.assert_allclose(own.log_prob(y), theirs.logpmf(y.numpy()), rtol=1e-5)
        np.testing.assert_allclose(own.mean, theirs.mean(), rtol=1e-5)
        np.testing.assert_allclose(own.variance, theirs.var(), rtol=1e-5)


def test_densities_stay_exact_where_the_rate_leaves_single_precision():
    log_rate = torch.tensor([-200.0, -200.0, 88.5, 16.0])
    y = torch.tensor([0.0, 3.0, 2.0, 8886110.0])
    exact = y.double() * log_rate.double() - log_rate.double().exp() - (y.double() + 1).lgamma()
    torch.testing.assert_close(LogPoisson(log_rate).log_prob(y).double(), exact, rtol=1e-6, atol=1e-6)
    # Without overdispersion to speak of it is the Poisson; log Gamma(1e6 + y) - log Gamma(1e6) needs double precision.
    almost = LogNegativeBinomial(torch.tensor([1.0]), torch.tensor([1e-6])).log_prob(torch.tensor([3.0]))
    torch.testing.assert_close(almost, LogPoisson(torch.tensor([1.0])).log_prob(torch.tensor([3.0])), rtol=1e-5, atol=0)


def test_gradients_of_the_densities_are_right():
    values = [
        torch.linspace(-3, 3, 5, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.3).double().requires_grad_(),
    ]
    y = COUNTS.double()
    assert torch.autograd.gradcheck(lambda log_rate: LogPoisson(log_rate).log_prob(y), values[:1])
    assert torch.autograd.gradcheck(lambda *both: LogNegativeBinomial(*both).log_prob(y), values)


@pytest.mark.parametrize("log_rate", [10.0, 40.0, 44.0, 60.0])
def test_samples_of_large_rates_have_their_mean_and_variance(log_rate):
    torch.manual_seed(0)
    samples = LogPoisson(torch.full((4000,), log_rate, dtype=torch.float64)).sample()
    rate = math.exp(log_rate)
    z = (samples - rate) / math.sqrt(rate)
    assert abs(z.mean()) < 5 / math.sqrt(4000)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / 4000)
    assert torch.equal(samples, samples.round())


def test_what_is_no_overdispersion_is_refused():
    for value in (0.0, -1.0, float("nan"), "learned"):
        with pytest.raises(UserError, match="overdispersion must be"):
            NegativeBinomial(value)
    with pytest.raises(UserError, match="the prior of overdispersion needs positive support"):
        NegativeBinomial(dist.Normal(0, 1))
    with pytest.raises(UserError, match=r"overdispersion 'predicted' needs two output columns .* gives \[5, 3\]"):
        NegativeBinomial("predicted").check(torch.zeros(5, 3))
    with pytest.raises(UserError, match="targets y are from -1 to 5; a Poisson likelihood has the support"):
        Poisson().observed(COUNTS - (COUNTS == 0).long(), torch.zeros(5))
