"""A posterior as the prior of the next network: sequential Bayes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_training import X, Y, small
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, UserError, bayesian, fit, kl_by_site, prune
from ppl_bnn.models import site_priors

NOISE = 0.5


class Line(nn.Module):
    """y ~ Normal(weight x, 0.5), a conjugate model."""

    def __init__(self, prior, num_data):
        super().__init__()
        self.net, self.num_data = bayesian(nn.Linear(1, 1, bias=False), prior), num_data

    def forward(self, x, y=None):
        outputs = self.net(x).squeeze(-1)
        with pyro.plate("data", self.num_data, subsample=x):
            pyro.sample("y", dist.Normal(outputs, NOISE), obs=y)


def fitted(prior, x, y):
    model = Line(prior, len(x))
    guide = MeanFieldNormal(model, x[:1], y[:1])
    # Each run of the model sees all the data, so the noise of 4 draws is all that is random.
    how = {"batch_size": len(x), "num_particles": 4, "lr_schedule": "cosine", "progress": False}
    fit(model, guide, x, y, epochs=400, lr=0.03, **how)
    return guide


def exact(loc, scale, x, y):
    precision = 1 / scale**2 + x.square().sum() / NOISE**2
    return (loc / scale**2 + (x * y).sum() / NOISE**2) / precision, precision.rsqrt()


@pytest.mark.slow
def test_half_of_the_data_after_the_other_half_is_all_of_the_data():
    x = torch.randn(40, 1)
    y = 0.7 * x[:, 0] + NOISE * torch.randn(40)
    first = fitted(dist.Normal(0.0, 1.0), x[:20], y[:20])
    second = fitted(first.as_prior(), x[20:], y[20:])
    at_once = fitted(dist.Normal(0.0, 1.0), x, y)
    expected = exact(0.0, 1.0, x[:, 0], y)
    for guide in (second, at_once):
        loc, scale = (part.detach().squeeze() for part in guide.loc_scale("weight"))
        assert abs(loc - expected[0]) < 0.1 * expected[1]
        assert scale == pytest.approx(float(expected[1]), rel=0.05)
    # Of two halves the first alone knows less.
    assert first.loc_scale("weight")[1].item() > 1.2 * float(expected[1])


def test_it_is_a_copy_that_fits_the_network_and_is_its_posterior():
    model, guide = small()
    prior = guide.as_prior()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    following = Classifier(bayesian(net, prior), len(X))
    expected = {site: [part.clone() for part in guide.loc_scale(site)] for site in guide.sites}
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(1.0)
    found = site_priors(following, X[:1], Y[:1])
    assert found.keys() == expected.keys()
    for site, each in found.items():
        torch.testing.assert_close([each.base_dist.mean, each.base_dist.stddev], expected[site], rtol=0, atol=0)
    assert not any(value.requires_grad for each in prior.values() for value in (each.loc, each.scale))
    assert {name for name, _ in following.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_the_kl_of_a_posterior_from_itself_is_zero():
    _, guide = small()
    model = Classifier(bayesian(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), guide.as_prior()), len(X))
    assert all(abs(kl) < 1e-4 for kl in kl_by_site(model, guide, X[:1], Y[:1]).values())


def test_a_pruned_posterior_is_refused():
    _, guide = small()
    with pytest.raises(UserError, match="a pruned posterior cannot be a prior: its weights at 0 have scale 0"):
        prune(guide, fraction=0.5).guide.as_prior()


def test_a_network_with_another_site_or_shape_is_refused():
    _, guide = small()
    with pytest.raises(
        UserError, match=r"the prior of site '0\.weight' has shape \[8, 6\], which does not fit \[8, 5\]"
    ):
        bayesian(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), guide.as_prior())
    with pytest.raises(UserError, match=r"the prior's pattern '2\.weight' matches no parameter"):
        bayesian(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), guide.as_prior())
