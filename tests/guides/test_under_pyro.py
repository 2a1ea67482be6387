"""The mean-field guide under Pyro's own tools: its ELBOs, SVI and both modes of Predictive, with latents and pruned."""

import math

import pyro
import pytest
import torch
from latent_models import LATENTS, WEIGHTS, Noise, Regression, X, Y
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from ppl_bnn import MeanFieldNormal, bayesian, fit, prune
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.models import site_priors
from ppl_bnn.models.priors import elementwise


@pytest.fixture(params=["whole", "pruned"])
def posterior(request):
    pyro.clear_param_store()
    model = Regression()
    torch.manual_seed(1)
    guide = MeanFieldNormal(model, X[:1], Y[:1], init_loc=0.5, init_scale=0.1)
    fit(model, guide, X, Y, epochs=30, batch_size=20, lr=0.02, progress=False)
    return model, guide if request.param == "whole" else prune(guide, fraction=0.4).guide


def test_pyros_elbos_agree_with_ours(posterior):
    model, guide = posterior
    ours = KLScaledELBO(40)
    losses = {"ours": [ours.loss(model, guide, X, Y) for _ in range(400)]}
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        losses[type(elbo).__name__] = [elbo.loss(model, guide, X, Y) / 40 for _ in range(400)]
    # A pruned weight has no part in our KL. Without a closed form Pyro counts its prior's density at 0: a constant.
    priors = site_priors(model, X[:1], Y[:1])
    constant = 0.0
    for site in guide.sites if guide.is_pruned else ():
        at_zero = elementwise(priors[site]).log_prob(torch.zeros(()))
        constant -= float((at_zero * ~guide.distribution(site).keep).sum()) / 40
    assert (constant > 0) == guide.is_pruned
    for name, values in losses.items():
        values = torch.tensor(values)
        assert values.isfinite().all()
        spread = math.hypot(values.std().item(), torch.tensor(losses["ours"]).std().item()) / math.sqrt(400)
        expected = sum(losses["ours"]) / 400 + (constant if name == "Trace_ELBO" else 0)
        assert values.mean().item() == pytest.approx(expected, abs=4 * spread + 1e-6)


def test_a_pruned_weight_has_its_density_at_zero_alone(posterior):
    _, guide = posterior
    for site in guide.sites:
        q = guide.distribution(site)
        draw = q.rsample()
        keep = torch.ones_like(draw, dtype=torch.bool) if q.keep is None else q.keep
        of_kept = torch.distributions.Normal(q.loc[keep], q.scale[keep]).log_prob(draw[keep]).sum()
        torch.testing.assert_close(q.log_prob(draw), of_kept)
        if not keep.all():
            assert q.log_prob(draw + (~keep)) == -math.inf


def test_the_loss_is_pyros_at_the_same_seed_where_every_kl_has_a_closed_form():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bayesian(nn.Linear(2, 1))

        def forward(self, x, y=None):
            gain = pyro.sample("gain", LATENTS["gain"])
            mean = self.net(x).squeeze(-1) * gain
            with pyro.plate("data", 40, subsample=x):
                return pyro.sample("y", pyro.distributions.Normal(mean, 0.5), obs=y)

    model = Gain()
    guide = MeanFieldNormal(model, X[:1], Y[:1])
    losses = []
    for elbo, scale in ((KLScaledELBO(40), 1), (TraceMeanField_ELBO(), 40)):
        torch.manual_seed(3)
        losses.append(elbo.loss(model, guide, X, Y) / scale)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO(), KLScaledELBO(40)])
def test_svi_trains_weights_and_latents(elbo):
    pyro.clear_param_store()
    model = Noise()
    torch.manual_seed(1)
    guide = MeanFieldNormal(model, X[:1], Y[:1])
    before = guide.draw(0)
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
    losses = [svi.step(X, Y) for _ in range(200)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert not any(torch.equal(value, before[site]) for site, value in guide.draw(0).items())


def test_both_modes_of_predictive_have_the_same_distribution(posterior):
    model, guide = posterior
    found = {}
    for parallel in (False, True):
        torch.manual_seed(2)
        samples = Predictive(model, guide=guide, num_samples=800, parallel=parallel)(X)
        assert samples["y"].shape == (800, 40)
        found[parallel] = samples
    for site, values in found[False].items():
        other = found[True][site]
        spread = values.std(0) / 800**0.5
        assert ((values.mean(0) - other.mean(0)).abs() <= 6 * spread + 1e-6).all(), site
        torch.testing.assert_close(other.std(0), values.std(0), rtol=0.25, atol=1e-6)
    for site in WEIGHTS:
        kept = found[True][site].std(0).flatten() > 0
        assert kept.all() != guide.is_pruned


def assert_given_draws_are_exact(net, guide, x, *, draws, parallel=True):
    draws = [guide.draw(index) for index in range(draws)]
    stacked = {site: torch.stack([draw[site] for draw in draws]) for site in guide.sites}
    outputs = Predictive(net, stacked, return_sites=("_RETURN",), parallel=parallel)(x)["_RETURN"]
    for draw, output in zip(draws, outputs, strict=True):
        with pyro.poutine.condition(data=draw):
            torch.testing.assert_close(output, net(x))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_given_draws_is_exact(posterior, parallel):
    model, guide = posterior
    assert guide.sites == list(WEIGHTS)
    assert_given_draws_are_exact(model.net, guide, X, draws=5, parallel=parallel)


def test_parallel_draws_with_random_biases():
    net = bayesian(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)), bayesian_bias=True)
    guide = MeanFieldNormal(net, X[:1], init_scale=0.5)
    assert_given_draws_are_exact(net, guide, X, draws=4)


def test_convolutions_take_many_draws_at_once():
    net = bayesian(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)))
    x = torch.randn(3, 1, 4, 4)
    guide = MeanFieldNormal(net, x[:1])
    assert Predictive(net, guide=guide, num_samples=2, return_sites=("_RETURN",))(x)["_RETURN"].shape == (2, 3, 2)
    assert_given_draws_are_exact(net, guide, x, draws=3)
