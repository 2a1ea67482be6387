"""The mean-field guide recovers posteriors that are known: in closed form, or by a sum over a grid."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from ppl_bnn import MeanFieldNormal, bayesian, fit

N = 60
X = torch.linspace(-1, 1, N)


def fitted(model, y, *, epochs=600, x=X, estimator="plain"):
    torch.manual_seed(0)
    guide = MeanFieldNormal(model, x[:1], y[:1])
    fit(
        model, guide, x, y, epochs=epochs, batch_size=len(x), lr=0.1, lr_schedule="cosine", num_particles=4,
        estimator=estimator, progress=False,
    )  # fmt: skip
    return guide


def moments(guide, site, count=4000):
    draws = torch.stack([guide.draw(index)[site] for index in range(count)])
    return draws.mean(0).item(), draws.std(0).item()


def test_a_posterior_that_is_log_normal_is_found_exactly():
    """y ~ LogNormal(log rate, 0.7) with a LogNormal prior: log rate has a Normal posterior, so this guide is exact."""
    loc, scale, noise = -1.0, 0.8, 0.7
    torch.manual_seed(4)
    y = dist.LogNormal(0.4, noise).sample((N,))

    def model(x, y=None):
        rate = pyro.sample("rate", dist.LogNormal(loc, scale))
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.LogNormal(rate.log(), noise), obs=y)

    guide = fitted(model, y)
    precision = 1 / scale**2 + N / noise**2
    exact = (loc / scale**2 + y.log().sum().item() / noise**2) / precision, precision**-0.5
    found = [value.item() for value in guide.unconstrained_loc_scale("rate")]
    assert found[0] == pytest.approx(exact[0], abs=0.03 * exact[1])
    assert found[1] == pytest.approx(exact[1], rel=0.05)
    mean, std = moments(guide, "rate")
    posterior = dist.LogNormal(*exact)
    assert mean == pytest.approx(posterior.mean.item(), abs=4 * std / 4000**0.5 + 0.03 * std)
    assert std == pytest.approx(posterior.stddev.item(), rel=0.09)


@pytest.mark.parametrize(
    "prior",
    [
        dist.LogNormal(0.0, 1.0),
        pytest.param(dist.Gamma(2.0, 2.0), marks=pytest.mark.slow),
    ],
)
def test_a_mean_and_a_noise_scale_agree_with_a_sum_over_a_grid_and_with_nuts(prior):
    torch.manual_seed(5)
    y = 0.6 + 0.5 * torch.randn(N)

    def model(x, y=None):
        mu, sigma = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("sigma", prior)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    mu, sigma = torch.meshgrid(torch.linspace(0, 1.2, 400), torch.linspace(0.3, 0.9, 400), indexing="ij")
    density = dist.Normal(0.0, 2.0).log_prob(mu) + prior.log_prob(sigma)
    weights = (density + dist.Normal(mu[..., None], sigma[..., None]).log_prob(y).sum(-1)).flatten().softmax(0)
    guide = fitted(model, y)
    assert (guide.sites, guide.latents) == (["mu"], ["sigma"])
    exact = {}
    for site, values in (("mu", mu.flatten()), ("sigma", sigma.flatten())):
        mean = (weights * values).sum()
        exact[site] = mean.item(), (weights * (values - mean).square()).sum().sqrt().item()
        found = moments(guide, site)
        # Nearly independent: mean field has hardly less spread than the posterior.
        assert found[0] == pytest.approx(exact[site][0], abs=0.15 * exact[site][1])
        assert found[1] == pytest.approx(exact[site][1], rel=0.08)
    if isinstance(prior, dist.Gamma):
        mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
        mcmc.run(X, y)
        for site, values in mcmc.get_samples().items():
            assert values.mean().item() == pytest.approx(exact[site][0], abs=0.25 * exact[site][1])
            assert values.std().item() == pytest.approx(exact[site][1], rel=0.2)


def test_a_probability_agrees_with_the_beta_posterior():
    torch.manual_seed(6)
    y = (torch.rand(N) < 0.3).float()

    def model(x, y=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    exact = dist.Beta(2 + y.sum(), 2 + N - y.sum())
    mean, std = moments(fitted(model, y), "p")
    assert mean == pytest.approx(exact.mean.item(), abs=0.1 * exact.stddev.item())
    assert std == pytest.approx(exact.stddev.item(), rel=0.08)


def test_shares_agree_with_the_dirichlet_posterior():
    torch.manual_seed(7)
    y = dist.Categorical(torch.tensor([0.5, 0.3, 0.2])).sample((N,))

    def model(x, y=None):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Categorical(p.expand(len(x), 3)), obs=y)

    exact = dist.Dirichlet(1 + torch.bincount(y, minlength=3))
    guide = fitted(model, y)
    draws = torch.stack([guide.draw(index)["p"] for index in range(4000)])
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0, atol=0.15 * exact.stddev.min().item())
    torch.testing.assert_close(draws.std(0), exact.stddev, rtol=0.1, atol=0)


def test_the_noise_of_a_linear_network_is_found_with_its_weights():
    """A Bayesian linear layer with a latent noise scale: weights and noise of data that were made so."""
    torch.manual_seed(8)
    x = torch.randn(200, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(200)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bayesian(nn.Linear(3, 1, bias=False))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Gamma(2.0, 4.0))
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", 200, subsample=x):
                return pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    guide = fitted(Linear(), y, x=x, estimator="local")
    noise = moments(guide, "sigma", 1000)
    # Given sigma, the weights are exactly Normal; their posterior correlations are small for independent inputs.
    precision = torch.eye(3) + x.T @ x / noise[0] ** 2
    exact = torch.linalg.solve(precision, x.T @ y / noise[0] ** 2)
    loc, scale = guide.loc_scale("weight")
    deviations = precision.diagonal().rsqrt()
    assert ((loc[0] - exact).abs() < 0.1 * deviations).all()
    torch.testing.assert_close(scale[0].detach(), deviations, rtol=0.08, atol=0)
    # The scale estimate of n residuals has a standard deviation of sigma / sqrt(2 n).
    residual = (y - x @ exact).square().mean().sqrt().item()
    assert noise[0] == pytest.approx(residual, abs=0.3 * residual / math.sqrt(400) + 0.006)
    assert noise[1] == pytest.approx(residual / math.sqrt(400), rel=0.12)
