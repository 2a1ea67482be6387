"""The guide: its sites, where it starts, what it refuses, and its draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build

X, Y = torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2])


def test_the_guide_finds_the_sites_and_its_parameters_exist():
    model = Classifier(build("bnn-fc"), 100)
    guide = MeanFieldNormal(model, X, Y)
    assert guide.sites == ["fc1.weight", "fc2.weight", "fc3.weight"]
    names = [name for name, _ in guide.named_parameters()]
    assert "loc.fc1.weight" in names
    assert "unconstrained_scale.fc3.weight" in names
    assert sum(parameter.numel() for parameter in guide.parameters()) == 2 * 268_800


def test_initialization_is_tensorflow_probabilitys_by_default():
    guide = MeanFieldNormal(Classifier(build("bnn-fc"), 100), X, Y)
    loc, unconstrained = guide.loc.fc1.weight, guide.unconstrained_scale.fc1.weight
    n = loc.numel()
    assert abs(loc.std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * n)
    assert abs(unconstrained.mean().item() + 3) < 5 * 0.1 / math.sqrt(n) + 1e-3
    assert abs(unconstrained.std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * n)
    assert guide.loc_scale("fc1.weight")[1].median().item() == pytest.approx(0.0486, rel=0.01)


def test_scale_survives_softplus_for_a_tiny_start():
    guide = MeanFieldNormal(Classifier(build("bnn-fc"), 100), X, Y, init_scale=1e-6, init_jitter=0.0)
    scale = guide.loc_scale("fc1.weight")[1]
    torch.testing.assert_close(scale, torch.full_like(scale, 1e-6), rtol=1e-4, atol=0)


def test_scale_never_reaches_zero():
    guide = MeanFieldNormal(bayesian(nn.Linear(3, 2)), torch.zeros(1, 3))
    with torch.no_grad():
        guide.unconstrained_scale.get_parameter("weight").fill_(-1e4)
        assert guide.loc_scale("weight")[1].min() == pytest.approx(1.2e-7)


def test_loc_from_a_trained_twin():
    twin = build("bnn-fc", deterministic=True)
    guide = MeanFieldNormal(Classifier(bayesian(twin), 100), X, Y, init_loc=twin.state_dict())
    torch.testing.assert_close(guide.loc.fc2.weight, twin.fc2.weight)
    with pytest.raises(ValueError, match=r"no tensor for site 'fc1.weight'"):
        MeanFieldNormal(Classifier(bayesian(twin), 100), X, Y, init_loc={})
    with pytest.raises(ValueError, match="has shape"):
        MeanFieldNormal(Classifier(bayesian(twin), 100), X, Y, init_loc=lambda site, shape: torch.zeros(2))


def test_the_guide_refuses_what_it_cannot_treat():
    model = Classifier(build("bnn-fc"), 100)
    with pytest.raises(ValueError, match="'y' has support"):
        MeanFieldNormal(model, X)
    with pytest.raises(ValueError, match="init_scale"):
        MeanFieldNormal(model, X, Y, init_scale=0.0)
    with pytest.raises(ValueError, match="init_loc"):
        MeanFieldNormal(model, X, Y, init_loc="xavier")
    with pytest.raises(ValueError, match="init_jitter"):
        MeanFieldNormal(model, X, Y, init_jitter=-1.0)


def test_any_pyro_model_has_a_guide():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope + offset, 1.0), obs=y)

    guide = MeanFieldNormal(model, torch.zeros(3, 2), torch.zeros(3))
    assert guide.sites == ["slope", "offset"]
    assert guide.draw(0)["slope"].shape == (2,)


def test_draws_are_the_same_for_the_same_seed_and_index_in_any_order():
    guide = MeanFieldNormal(Classifier(build("bnn-fc"), 100), X, Y)
    third, first = guide.draw(3, seed=1), guide.draw(1, seed=1)
    torch.manual_seed(99)
    torch.testing.assert_close(guide.draw(1, seed=1), first, rtol=0, atol=0)
    torch.testing.assert_close(guide.draw(3, seed=1), third, rtol=0, atol=0)
    # (seed 0, index 1) and (seed 1, index 0) must not be the same network.
    assert not torch.equal(guide.draw(1, seed=0)["fc1.weight"], guide.draw(0, seed=1)["fc1.weight"])


def test_draws_have_the_guides_moments():
    guide = MeanFieldNormal(bayesian(nn.Linear(50, 40)), torch.zeros(1, 50), init_jitter=0.5)
    loc, scale = guide.loc_scale("weight")
    draws = torch.stack([guide.draw(index)["weight"] for index in range(2000)])
    z = (draws - loc) / scale
    assert abs(z.mean().item()) < 5 / math.sqrt(z.numel())
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / z.numel())


def test_moped_starts_each_scale_in_proportion_to_its_weight():
    guide = MeanFieldNormal(
        Classifier(build("bnn-fc"), 100), X, Y, init_loc="he", init_scale=1e-3, init_jitter=0.0, init_relative_scale=0.2
    )
    loc, scale = guide.loc_scale("fc1.weight")
    torch.testing.assert_close(scale, (0.2 * loc.abs()).clamp_min(1e-5), rtol=1e-3, atol=1e-8)
    with pytest.raises(ValueError, match="init_relative_scale"):
        MeanFieldNormal(Classifier(build("bnn-fc"), 100), X, Y, init_relative_scale=0.0)


def test_building_a_guide_leaves_batch_norm_alone():
    net = bayesian(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    # One example is enough: in training mode batch norm would refuse it.
    MeanFieldNormal(net, torch.ones(1, 3))
    assert net[1].num_batches_tracked == 0
    assert net[1].training
