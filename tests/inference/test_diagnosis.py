"""Is it Bayesian yet? The table against closed forms, and its verdict on posteriors that did and did not move."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from ppl_bnn import Classifier, GaussianScaleMixture, MeanFieldNormal, bayesian
from ppl_bnn.guides.normal import inverse_scale
from ppl_bnn.inference.diagnosis import layer_posteriors, render_diagnosis, verdict

X, Y = torch.rand(4, 30), torch.tensor([0, 1, 0, 1])


def posterior(prior=None, *, scale=0.05):
    net = bayesian(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 2)), prior)
    model = Classifier(net, 4)
    return model, MeanFieldNormal(model, X, Y, init_loc=0.2, init_scale=scale)


def moved(guide, factor, *, sites=None):
    """A copy whose scales are multiplied by `factor` at `sites`."""
    other = copy.deepcopy(guide)
    with torch.no_grad():
        for site in sites or guide.sites:
            unconstrained = dict(other.unconstrained_scale.named_parameters())[site]
            unconstrained.copy_(inverse_scale(guide.loc_scale(site)[1] * factor))
    return other


@pytest.mark.parametrize(
    "prior", [dist.Normal(0.1, 0.5), dist.Laplace(0.0, 0.4), GaussianScaleMixture(0.5, 1.0, 0.3)], ids=str
)
def test_the_kl_is_that_of_the_closed_form_or_of_many_draws(prior):
    model, guide = posterior(prior)
    layer = layer_posteriors(model, guide, guide, X, Y)[0]
    loc, scale = (part.detach() for part in guide.loc_scale("0.weight"))
    q = dist.Normal(loc, scale)
    try:
        expected, error = kl_divergence(q, prior).mean().item(), 2e-4
    except NotImplementedError:
        draws = q.sample((3000,))
        each = (q.log_prob(draws) - prior.log_prob(draws)).mean((1, 2))
        expected, error = each.mean().item(), 5 * each.std().item() / math.sqrt(len(each))
    assert layer.kl == pytest.approx(expected, abs=error)
    assert layer.initial_kl == layer.kl
    assert layer.weights == 1200


def test_what_moved_and_by_how_much():
    model, guide = posterior()
    after = moved(guide, 3.0, sites=["2.weight"])
    first, last = layer_posteriors(model, after, guide, X, Y)
    assert first.scale_moved == pytest.approx(0, abs=1e-4)
    assert last.scale_moved == pytest.approx(math.log(3), abs=1e-3)
    assert last.scale / last.initial_scale == pytest.approx(3, rel=1e-3)
    text = verdict([first, last])
    assert text == "The posterior has moved, but not in 0.weight: the scale there is its initialization's."
    # Scales that go up in two fifths of the weights and down in two others have moved too.
    loc = after.loc_scale("2.weight")[0]
    signs = torch.tensor([2.0, 2.0, 1.0, 0.5, 0.5])[torch.arange(loc.numel()) % 5].view_as(loc)
    assert layer_posteriors(model, moved(guide, signs, sites=["2.weight"]), guide, X, Y)[1].scale_moved > 0.6


def test_the_studys_start_is_called_what_it_is():
    model, guide = posterior(scale=math.log1p(math.exp(-9)))
    layers = layer_posteriors(model, guide, guide, X, Y)
    assert layers[0].nearly_deterministic == 1
    assert layers[0].kl > 7
    text = verdict(layers)
    assert "The posterior has not moved: in every layer" in text
    assert "100.0% of the weights carry noise below 1%" in text
    assert text in render_diagnosis(layers)


@pytest.mark.parametrize(
    ("prior", "factor"), [(dist.Normal(0.0, 0.5), 10.0), (dist.StudentT(1.0, 0.0, 0.3), 9.0)], ids=str
)
def test_a_posterior_at_its_prior_is_called_that(prior, factor):
    model, guide = posterior(prior)
    at_prior = moved(guide, factor)
    with torch.no_grad():
        for loc in at_prior.loc.parameters():
            loc.zero_()
    layers = layer_posteriors(model, at_prior, guide, X, Y)
    assert all(layer.at_prior > 0.95 for layer in layers)
    text = verdict(layers)
    assert "The posterior has moved in every layer" in text
    assert "are at their prior" in text
