"""Right uses of Pyro that the check at the door must let through, and numbers that it must get right."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, UserError, bayesian, fit

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1).sin()


def trained(model, guide=None, *, y=Y, **settings):
    guide = guide or MeanFieldNormal(model, X, y)
    return fit(model, guide, X, y, **{"epochs": 2, "lr": 1e-2, "progress": False, **settings})


def regression(observe, inside=lambda x: None):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
        inside(x)
        observe(x @ w, x, y)

    return model


def whole_plate(mean, x, y):
    with pyro.plate("data", 40):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def batch_plate(mean, x, y):
    with pyro.plate("data", 40, subsample=x):
        pyro.deterministic("mean", mean)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def scaled_plate(mean, x, y):
    with poutine.scale(scale=40 / len(x)), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def test_a_plate_of_all_the_data_trains_with_whole_batches():
    assert math.isfinite(trained(regression(whole_plate), batch_size=40)[-1]["loss"])


def test_a_model_that_needs_more_than_two_rows_trains():
    needs_three = regression(batch_plate, inside=lambda x: x.topk(3, 0))
    assert math.isfinite(trained(needs_three, batch_size=10)[-1]["loss"])


def test_deterministic_sites_and_own_scales_are_let_through():
    for observe in (batch_plate, scaled_plate):
        assert math.isfinite(trained(regression(observe), batch_size=10)[-1]["loss"])


@pytest.mark.parametrize(
    "prior", [dist.Laplace(0.0, 1.0), dist.StudentT(5.0, 0.0, 1.0), dist.Normal(torch.zeros(3), torch.ones(3))], ids=str
)
def test_a_latent_in_a_plate_has_the_kl_of_its_weights(prior):
    def model(x, y=None):
        with pyro.plate("weights", 3):
            w = pyro.sample("w", prior)
        batch_plate(x @ w, x, y)

    def in_one_event(x, y=None):
        w = pyro.sample("w", prior.expand([3]).to_event(1))
        batch_plate(x @ w, x, y)

    kl = []
    for each in (model, in_one_event):
        guide = MeanFieldNormal(each, X, Y, init_loc={"w": torch.tensor([0.3, -0.2, 1.0])}, init_jitter=0.0)
        elbo = KLScaledELBO(40)
        terms = []
        for seed in range(200):
            torch.manual_seed(seed)
            elbo.loss(each, guide, X, Y)
            terms.append(elbo.terms.kl)
        kl.append(np.mean(terms))
    assert kl[0] == pytest.approx(kl[1], rel=0.02)


def test_groups_give_a_layer_that_is_used_twice_one_weight_and_leave_vectors_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.fc(x)
            assert torch.equal(h, self.fc(x))
            return self.out(h) + self.out(h.mean(0))

    labels = (Y > 0).long()
    model = Classifier(bayesian(Twice()), 40)
    assert math.isfinite(trained(model, MeanFieldNormal(model, X[:1], labels[:1]), y=labels, batch_size=40)[-1]["loss"])


def test_a_batch_norm_that_stayed_in_evaluation_mode_stays_in_the_next_training():
    labels = (Y > 0).long()
    net = bayesian(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    net[1].eval()
    model = Classifier(net, 40)
    guide = MeanFieldNormal(model, X[:2], labels[:2])
    before = net[1].running_mean.clone()
    for _ in range(2):
        trained(model, guide, y=labels)
        assert torch.equal(net[1].running_mean, before)


def test_numpy_scalars_and_folders_as_text_are_taken(tmp_path):
    labels = (Y > 0).long()
    model = Classifier(bayesian(nn.Sequential(nn.Linear(3, 2))), 40)
    guide = MeanFieldNormal(model, X[:1], labels[:1])
    settings = {"batch_size": np.int64(10), "lr": np.float32(1e-3), "folder": str(tmp_path)}
    assert len(trained(model, guide, y=labels, **settings)) == 2
    with pytest.raises(UserError, match="kl_weight must be a number or a function"):
        trained(model, guide, y=labels, kl_weight=None)


def test_binary_labels_must_be_floating_point():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    guide = MeanFieldNormal(model, X, (Y > 0).float())
    assert math.isfinite(trained(model, guide, y=(Y > 0).float())[-1]["loss"])
    with pytest.raises(UserError, match=r"pass y.float\(\)"):
        trained(model, guide, y=(Y > 0).long())


def test_a_buffer_that_is_a_view_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 2))
    net.register_buffer("mask", torch.ones(1, 1).expand(8, 3))
    model, labels = Classifier(bayesian(net), 40), (Y > 0).long()
    assert len(trained(model, MeanFieldNormal(model, X[:1], labels[:1]), y=labels)) == 2
