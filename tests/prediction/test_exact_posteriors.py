"""`fit` and `predict` against exact posteriors: conjugate models in closed form, others by quadrature.

Each has one weight, or weights whose posterior factorizes: a mean-field Normal can be exact, or has a known best.
"""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from ppl_bnn import Bernoulli, MeanFieldNormal, Model, Normal, Poisson, bayesian, fit, predict

GENERATOR = np.random.default_rng(0)
DRAWS = 2000


def fitted(likelihood, x, y):
    """A linear network without bias, under the prior Normal(0, 1): the model, its guide, loc and scale [D]."""
    torch.manual_seed(0)
    x, y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    model = Model(bayesian(nn.Sequential(nn.Linear(x.shape[1], 1, bias=False))), likelihood, len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_scale=0.2)
    fit(model, guide, x, y, epochs=800, batch_size=len(x), lr=0.05, lr_schedule="cosine", estimator="local",
        progress=False)  # fmt: skip
    loc, scale = (part.detach().double().numpy()[0] for part in guide.loc_scale("0.weight"))
    found = predict(model, guide, x, y, num_samples=DRAWS, method="draws", progress=False)
    return model, loc, scale, found


def assert_within(found, exact, std, *, share=0.0):
    """Means of DRAWS values of this standard deviation, and a share of it for the fit's own error."""
    error = (4 / math.sqrt(DRAWS) + share) * np.asarray(std)
    assert (np.abs(np.asarray(found) - exact) < error + 1e-6).all(), (found, exact, error)


def test_the_mean_of_normal_data_with_known_noise():
    noise, y = 0.5, 0.8 + 0.5 * GENERATOR.standard_normal(20)
    precision = 1 + len(y) / noise**2
    mean, std = y.sum() / noise**2 / precision, precision**-0.5
    _, loc, scale, found = fitted(Normal(noise), np.ones((20, 1)), y)
    assert loc[0] == pytest.approx(mean, abs=0.1 * std)
    assert scale[0] == pytest.approx(std, rel=0.05)
    assert_within(found.mean, mean, std, share=0.1)
    # Variances of DRAWS means have the standard error variance * sqrt(2 / DRAWS).
    assert_within(found.averages["spread"], std**2, math.sqrt(2) * std**2, share=0.1)
    assert_within(found.std**2, noise**2 + std**2, math.sqrt(2) * std**2, share=0.1)
    exact = -stats.norm(mean, math.hypot(noise, std)).logpdf(y).mean()
    assert found.nll == pytest.approx(exact, abs=0.02)


def test_linear_regression_with_learnt_noise_has_the_noise_of_the_largest_evidence():
    """Orthogonal features: the exact posterior factorizes, so the ELBO at its optimum is the evidence."""
    x = np.linalg.qr(GENERATOR.standard_normal((40, 3)))[0] * math.sqrt(40)
    y = x @ [1.0, -0.5, 0.2] + 0.7 * GENERATOR.standard_normal(40)

    def negative_evidence(log_noise):
        return -stats.multivariate_normal(np.zeros(40), x @ x.T + math.exp(2 * log_noise) * np.eye(40)).logpdf(y)

    noise = math.exp(optimize.minimize_scalar(negative_evidence, bounds=(-3, 2), method="bounded").x)
    precision = 1 + 40 / noise**2
    mean, std = x.T @ y / noise**2 / precision, precision**-0.5
    model, loc, scale, found = fitted(Normal("learnt"), x, y)
    learnt = model.likelihood.noise.split(torch.zeros(1), None)[1].item()
    assert learnt == pytest.approx(noise, rel=0.02)
    np.testing.assert_allclose(loc, mean, atol=0.1 * std)
    np.testing.assert_allclose(scale, std, rtol=0.05)
    spread = (x**2).sum(1) * std**2
    assert_within(found.mean, x @ mean, np.sqrt(spread), share=0.2)
    assert_within(found.averages["spread"], spread, math.sqrt(2) * spread, share=0.15)
    assert not found.averages["variance"].requires_grad
    np.testing.assert_allclose(found.averages["variance"], learnt**2, rtol=1e-5)


class Quadrature:
    """One weight under the prior Normal(0, 1) and log p(y | w) = sum_i log p(y_i | w x_i)."""

    def __init__(self, log_likelihood):
        self.log_likelihood = log_likelihood
        self.grid = np.linspace(-4, 4, 8001)
        logs = log_likelihood(self.grid) + stats.norm.logpdf(self.grid)
        self.weights = np.exp(logs - logs.max())
        self.weights /= self.weights.sum()

    def expected(self, function):
        """E[function(w)] under the exact posterior; function: [G, 1] -> [G, N]."""
        return self.weights @ function(self.grid[:, None])

    def best_normal(self):
        """loc and scale of the Normal with the largest ELBO."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        weights = weights / weights.sum()

        def loss(point):
            loc, scale = point[0], math.exp(point[1])
            kl = (scale**2 + loc**2 - 1) / 2 - point[1]
            return kl - weights @ self.log_likelihood(loc + scale * nodes)

        loc, log_scale = optimize.minimize(loss, [0.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-6}).x
        return loc, math.exp(log_scale)


def check_by_quadrature(likelihood, exact, x, y, mean_of):
    """`mean_of`: E[y | w x], of an array."""
    best_loc, best_scale = exact.best_normal()
    _, loc, scale, found = fitted(likelihood, x[:, None], y)
    assert loc[0] == pytest.approx(best_loc, abs=0.1 * best_scale)
    assert scale[0] == pytest.approx(best_scale, rel=0.06)
    mean = exact.expected(lambda w: mean_of(w * x))
    spread = exact.expected(lambda w: mean_of(w * x) ** 2) - mean**2
    # The best Normal is not the posterior: its means are off by less than a tenth of their standard deviation.
    assert_within(found.mean, mean, np.sqrt(spread), share=0.2)
    assert_within(found.averages["spread"], spread, math.sqrt(2) * spread, share=0.25)
    return found, mean, spread


def test_poisson_regression_with_one_weight():
    x = np.linspace(-1.5, 1.5, 30)
    y = GENERATOR.poisson(np.exp(0.8 * x)).astype(float)
    exact = Quadrature(lambda w: stats.poisson.logpmf(y, np.exp(w[:, None] * x)).sum(1))
    found, mean, spread = check_by_quadrature(Poisson(), exact, x, y, np.exp)
    # Var[y] = E[rate] + Var[rate].
    assert_within(found.std**2, mean + spread, np.sqrt(spread) + math.sqrt(2) * spread, share=0.25)


def test_logistic_regression_with_one_weight():
    x = np.linspace(-2, 2, 40)
    y = (GENERATOR.random(40) < 1 / (1 + np.exp(-1.2 * x))).astype(float)
    exact = Quadrature(lambda w: stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-w[:, None] * x))).sum(1))
    found, mean, _ = check_by_quadrature(Bernoulli(), exact, x, y, lambda logits: 1 / (1 + np.exp(-logits)))
    assert found.nll == pytest.approx(-stats.bernoulli.logpmf(y, mean).mean(), abs=0.01)
