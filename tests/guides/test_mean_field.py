"""The guide: its sites, where it starts, what it refuses, and its draws."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, prune
from ppl_bnn.models import site_priors

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


def test_a_deep_network_has_a_guide_though_its_priors_draws_overflow():
    net = bayesian(nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)]))
    x, y = torch.randn(2, 64), torch.tensor([0, 63])
    with poutine.block():
        assert not torch.isfinite(net(x)).all()
    assert len(MeanFieldNormal(Classifier(net, 2), x, y).sites) == 60
    assert len(site_priors(Classifier(net, 2), x, y)) == 60


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_torchvisions_deep_networks_have_a_guide_at_the_default_prior(name):
    import torchvision

    net = bayesian(getattr(torchvision.models, name)(num_classes=10))
    x, y = torch.rand(1, 3, 32, 32), torch.tensor([3])
    guide = MeanFieldNormal(Classifier(net, 1), x, y)
    layers = [path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert sorted(guide.sites) == sorted(f"{path}.weight" for path in layers)
    assert all(torch.isfinite(loc).all() for loc in guide.parameters())


def test_building_a_guide_changes_neither_the_random_state_nor_the_parameter_store():
    model = Classifier(bayesian(nn.Sequential(nn.Linear(3, 2))), 2)
    before = torch.get_rng_state()
    MeanFieldNormal(model, torch.zeros(1, 3), torch.tensor([0]), init_loc=lambda site, shape: torch.zeros(shape))
    jitter = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(2, 3)
    assert torch.equal(torch.get_rng_state(), jitter)
    assert not list(pyro.get_param_store())


def test_building_a_guide_unfreezes_nothing():
    class Scaled(PyroModule):
        """A user's own Pyro module, which `bayesian` did not make."""

        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(2), requires_grad=False)
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))

        def forward(self, x):
            return x @ self.weight.T * self.factor

    net = bayesian(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    net.requires_grad_(False)
    for model in (Scaled(), net):
        MeanFieldNormal(Classifier(model, 2), torch.zeros(2, 3), torch.tensor([0, 1]))
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_part_of_a_guide_stays_frozen():
    guide = MeanFieldNormal(bayesian(nn.Linear(3, 2)), torch.zeros(1, 3))
    guide.loc.requires_grad_(False)
    guide()
    with poutine.trace():
        guide()
    assert [name for name, value in guide.named_parameters() if value.requires_grad] == ["unconstrained_scale.weight"]


def test_a_model_that_samples_a_site_twice_is_refused():
    def model():
        return pyro.sample("w", dist.Normal(0.0, 1.0)) + pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="samples site 'w' twice"):
        MeanFieldNormal(model)


def test_a_pruned_state_loads_into_a_fresh_guide_and_back():
    net = bayesian(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    whole, x = MeanFieldNormal(net, torch.zeros(1, 5)), torch.zeros(1, 5)
    pruned = prune(whole, fraction=0.5).guide
    buffer = io.BytesIO()
    torch.save(pruned.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = MeanFieldNormal(net, x)
    fresh.load_state_dict(state)
    assert fresh.is_pruned
    torch.testing.assert_close(fresh.state_dict(), pruned.state_dict())
    for other in (
        fresh,
        copy.deepcopy(fresh),
        nn.ModuleDict({"guide": copy.deepcopy(fresh)})["guide"].double().float(),
    ):
        torch.testing.assert_close(other.draw(3), pruned.draw(3))
    # The state of a guide that is not pruned has no masks, and is restored without.
    fresh.load_state_dict(whole.state_dict())
    assert not fresh.is_pruned
    torch.testing.assert_close(fresh.draw(3), whole.draw(3))
    # A part of a state leaves the rest, masks too, as it is.
    again = copy.deepcopy(pruned)
    again.load_state_dict({"loc.0.weight": torch.ones(4, 5)}, strict=False)
    assert torch.equal(again.loc_scale("0.weight")[0], pruned.keep.get_buffer("0.weight").float())
    holder = nn.ModuleDict({"guide": MeanFieldNormal(net, x)})
    holder.load_state_dict(nn.ModuleDict({"guide": pruned}).state_dict())
    torch.testing.assert_close(holder["guide"].draw(3), pruned.draw(3))
    with pytest.raises(RuntimeError, match=r"Missing key.*keep.1.weight"):
        MeanFieldNormal(net, x).load_state_dict({k: v for k, v in state.items() if k != "keep.1.weight"})


def test_a_pruned_guide_is_saved_whole():
    pruned = prune(MeanFieldNormal(bayesian(nn.Linear(5, 4)), torch.zeros(1, 5)), fraction=0.5).guide
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False).draw(1), pruned.draw(1))
