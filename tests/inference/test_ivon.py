"""Natural gradients: against the reference package, against the exact posterior, and inside a training."""

import math
from contextlib import nullcontext

import ivon as reference
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian, fit
from ppl_bnn.guides.normal import softplus
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.native import arithmetic as arithmetic_module
from ppl_bnn.native.arithmetic import compiled_arithmetic

# Powers of two: the reference keeps its first curvature in float32.
N, PRECISION_OF_PRIOR, CURVATURE = 40, 1 / 64, 0.25


def regression(activation):
    """y ~ Normal(activation(x w), 1) with a prior that is a weight decay of PRECISION_OF_PRIOR."""

    def model(x, y):
        prior_scale = x.new_full((x.shape[1],), 1 / math.sqrt(N * PRECISION_OF_PRIOR))
        prior = dist.Normal(torch.zeros_like(prior_scale), prior_scale).to_event(1)
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(activation(x @ w), 1.0), obs=y)

    return model


@pytest.fixture
def data():
    return torch.randn(N, 7).double(), torch.randn(N).double()


def ours(model, x, y, start, *, steps, beta1=0.9, beta2=0.99, lr=0.1):
    scale = 1 / math.sqrt(N * (CURVATURE + PRECISION_OF_PRIOR))
    guide = MeanFieldNormal(model, x, y, init_loc={"w": start}, init_scale=scale, init_jitter=0.0)
    optimizer = IVON([(guide.loc.w, guide.unconstrained_scale.w)], lr=lr, beta1=beta1, beta2=beta2)
    optimizer.param_groups[0]["kl_per_datum"] = 1 / N
    elbo = KLScaledELBO(N)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()
    return tuple(part.detach() for part in guide.loc_scale("w"))


@pytest.mark.parametrize(("beta1", "tolerance"), [(0.0, 1e-12), (0.9, 0.02)])
def test_it_is_the_reference_implementations(data, beta1, tolerance, monkeypatch):
    """Exactly without momentum; with it the two differ in what is averaged (the prior's gradient here too)."""
    x, y = data
    # The reference's noise, from torch's global generator.
    monkeypatch.setattr("ppl_bnn.guides.normal.standard_normal", lambda like, _: torch.empty_like(like).normal_())
    start = torch.randn(7).double() * 0.1
    w = nn.Parameter(start.clone())
    settings = {"ess": N, "hess_init": CURVATURE, "weight_decay": PRECISION_OF_PRIOR}
    optimizer = reference.IVON([w], lr=0.1, beta1=beta1, beta2=0.99, **settings)
    torch.manual_seed(1)
    for _ in range(150):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * (torch.tanh(x @ w) - y).square()).mean().backward()
        optimizer.step()
    scale = 1 / (N * (optimizer.param_groups[0]["hess"] + PRECISION_OF_PRIOR)).sqrt()
    found = ours(regression(torch.tanh), x, y, start, steps=150, beta1=beta1)
    assert (w - start).abs().max() > 0.1
    torch.testing.assert_close(found[0], w.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], scale, rtol=tolerance, atol=0)


def test_it_finds_the_best_mean_field_posterior_of_a_linear_regression(data):
    x, y = data
    precision = x.T @ x + N * PRECISION_OF_PRIOR * torch.eye(7, dtype=torch.float64)
    loc, scale = ours(regression(lambda z: z), x, y, torch.zeros(7).double(), steps=6000, beta2=0.995, lr=0.02)
    torch.testing.assert_close(loc, torch.linalg.solve(precision, x.T @ y), atol=0.03, rtol=0)
    # The mean-field optimum has the diagonal of the exact precision (Bishop 2006, eq. 10.13).
    torch.testing.assert_close(scale, precision.diagonal().rsqrt(), rtol=0.1, atol=0)


def test_training_with_it_learns_and_the_point_estimates_learn_too():
    x = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), dist.Normal(0.0, 1.0))
    model = Classifier(net, len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.05, init_jitter=0.0)
    bias = net[0]._parameters["bias"].detach().clone()
    history = fit(
        model,
        guide,
        x,
        y,
        epochs=60,
        batch_size=20,
        optimizer="ivon",
        lr=0.2,
        beta2=0.99,
        kl_weight=0.1,
        progress=False,
    )
    assert history[-1]["accuracy"] > 0.9
    assert history[-1]["loss"] < history[0]["loss"]
    assert not torch.equal(bias, net[0]._parameters["bias"])
    scale = guide.loc_scale("0.weight")[1]
    # Where the likelihood says little the scale goes towards the prior's, elsewhere it shrinks.
    assert scale.max() > 1.2 * scale.min()


@pytest.mark.parametrize("way", ["C", "blocks", "compiled"])
def test_however_it_is_computed_it_takes_the_same_steps(way, monkeypatch):
    # A scale this small shows every digit that is lost between it and its unconstrained value.
    start = [torch.randn(4, 3, 3, 3) * 0.02, torch.full((4, 3, 3, 3), -9.0)]
    gradients = [[torch.randn(4, 3, 3, 3) * size for size in (1e-1, 1e-4)] for _ in range(20)]

    def steps(context):
        loc, unconstrained = (part.contiguous(memory_format=torch.channels_last).requires_grad_() for part in start)
        optimizer = IVON([(loc, unconstrained)], lr=0.1, beta2=0.999)
        optimizer.param_groups[0]["kl_per_datum"] = 1 / 50_000
        with context:
            for loc.grad, unconstrained.grad in gradients:
                optimizer.step()
        return loc.detach(), unconstrained.detach()

    with monkeypatch.context() as without_c:
        without_c.setattr(arithmetic_module, "library", lambda *of: None)
        expected = steps(nullcontext())
    if way != "C":
        monkeypatch.setattr(arithmetic_module, "library", lambda *of: None)
    if way == "blocks":
        monkeypatch.setattr(arithmetic_module, "_BLOCK", 20)
    found = steps(compiled_arithmetic() if way == "compiled" else nullcontext())
    for plain, other, before in zip(expected, found, start, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
        assert (plain - before).abs().max() > 1e-3


def test_a_guide_without_scales_is_refused():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    model = Classifier(nn.Linear(3, 2), 4)
    guide = MeanFieldNormal(model, x, y)
    with pytest.raises(ValueError, match="ivon learns a mean-field guide's loc and scale"):
        fit(model, guide, x, y, epochs=1, optimizer="ivon", progress=False)


def test_steps_without_gradients_leave_the_scales_where_they_are():
    start = torch.linspace(-14, 12, 9001)
    loc, unconstrained = torch.randn(9001).requires_grad_(), start.clone().requires_grad_()
    optimizer = IVON([(loc, unconstrained)])
    loc.grad, unconstrained.grad = torch.zeros(9001), torch.zeros(9001)
    for _ in range(20):
        optimizer.step()
    # To a float's digits of the scale, which near the smallest are fewer than those of its unconstrained value.
    torch.testing.assert_close(softplus(unconstrained.detach()), softplus(start), rtol=2e-5, atol=1e-12)
