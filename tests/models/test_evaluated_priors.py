"""Priors that are functions with Pyro statements: hyper-priors, and parameters in Pyro's store."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from prior_models import classifier, learnt_of, scales
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from small_training import X, Y, settings, small
from torch import nn

from ppl_bnn import Classifier, UserError, bayesian, fit
from ppl_bnn.guides import median_latents
from ppl_bnn.inference import checkpoint
from ppl_bnn.models import (
    hierarchical,
    horseshoe,
    learnt_normal,
    site_priors,
)
from ppl_bnn.models.random_network import priors_of
from ppl_bnn.models.sites import latent_sites


def own_scale(site, shape):
    return dist.Normal(0.0, pyro.param(f"{site}_scale", torch.tensor(0.3), constraint=dist.constraints.positive))


def test_a_function_may_call_pyro_param_which_fit_trains_and_checkpoints(tmp_path):
    model, guide = small(prior=own_scale)
    assert not pyro.get_param_store().keys()
    assert priors_of(model.net)["0.weight"] == "Normal given pyro.param 0.weight_scale"
    expected, expected_guide = small(prior=learnt_normal(0.3))
    history = fit(model, guide, X, Y, **settings(), folder=tmp_path)
    # It is the same prior as a learnt one, by another road.
    assert [row["loss"] for row in history] == pytest.approx(
        [row["loss"] for row in fit(expected, expected_guide, X, Y, **settings())], rel=1e-6
    )
    torch.testing.assert_close(scales(model), scales(expected), rtol=1e-5, atol=0)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).part("params").keys() == {
        "0.weight_scale",
        "2.weight_scale",
    }


def shared_scale(site, shape):
    return dist.Normal(0.0, pyro.sample("tau", dist.HalfNormal(1.0)))


def test_a_site_that_two_priors_sample_is_drawn_once_a_pass():
    model = classifier(shared_scale)
    for _ in range(2):
        trace = pyro.poutine.trace(model).get_trace(X, Y)
        tau = trace.nodes["tau"]["value"]
        for site in ("0.weight", "2.weight"):
            assert (trace.nodes[site]["fn"].base_dist.stddev == tau).all()
    assert {name for name in trace.stochastic_nodes if name != "data"} == {"tau", "0.weight", "2.weight"}


class Pair(PyroModule):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_two_networks_in_one_model_have_hyper_parameters_of_their_own():
    pair = Pair(*(bayesian(nn.Sequential(nn.Linear(6, 2)), prior) for prior in (hierarchical(), own_scale)))
    trace = pyro.poutine.trace(pair).get_trace(X)
    assert {"first.0.weight_scale", "second.0.weight_scale", "first.0.weight", "second.0.weight"} <= set(trace.nodes)
    assert trace.nodes["second.0.weight_scale"]["type"] == "param"
    assert pyro.get_param_store().keys() == {"first.0.bias", "second.0.bias", "second.0.weight_scale"}


def test_a_layer_by_itself_takes_such_priors():
    layers = bayesian(nn.Linear(6, 2), hierarchical()), bayesian(nn.Conv2d(3, 4, 3), learnt_normal(0.1, per="input"))
    trace = pyro.poutine.trace(layers[0]).get_trace(X)
    assert list(trace.stochastic_nodes) == ["weight_scale", "weight"]
    assert layers[1](torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert dict(layers[1].named_parameters())["weight_prior_unconstrained_scale"].shape == (1, 3, 1, 1)


def test_hyper_parameters_have_the_layers_dtype_and_device():
    model = classifier(hierarchical(0.5, per="unit"))
    trace = pyro.poutine.trace(model.double()).get_trace(X.double(), Y)
    assert {site["value"].dtype for name, site in trace.iter_stochastic_nodes() if name != "data"} == {torch.double}


@pytest.mark.parametrize(
    "prior",
    [
        hierarchical(),
        horseshoe(slab=1.0),
        own_scale,
        learnt_normal(0.1),
        dist.Normal(nn.Parameter(torch.zeros(3, 6)), 1.0),
    ],
)
def test_a_prior_goes_where_its_layer_goes(prior):
    layer = bayesian(nn.Linear(6, 3), prior).to("meta")
    found = layer._random["weight"].prior(layer).base_dist
    assert {value.device.type for value in (found.mean, found.stddev, found.sample())} == {"meta"}


def test_pyros_predictive_runs_a_hierarchical_model():
    net = bayesian(nn.Linear(6, 1), hierarchical(0.5, per="input"))

    def model(x, y=None):
        outputs = net(x).squeeze(-1)
        with pyro.plate("data", len(X), subsample=x):
            return pyro.sample("y", dist.Normal(outputs, 1.0), obs=y)

    guide = AutoNormal(model)
    guide(X, Y.float())
    found = Predictive(model, guide=guide, num_samples=7)(X)
    assert found["y"].shape == (7, len(X))
    assert found["weight_scale"].numel() == 7 * 6


@pytest.mark.parametrize("prior", [hierarchical(), hierarchical(per="input"), horseshoe(), horseshoe(slab=2.0)])
def test_many_draws_of_the_hyper_parameters_at_once_give_as_many_priors(prior):
    layer = bayesian(nn.Linear(6, 3), prior)
    names = layer._random["weight"].prior.latents
    drawn = {name: torch.rand(7, 1, *shape) for name, shape in names.items()}
    for index in (None, 2):
        values = drawn if index is None else {name: value[index, 0] for name, value in drawn.items()}
        with pyro.poutine.condition(data=values):
            found = layer._random["weight"].prior(layer)
        assert found.event_shape == (3, 6)
        if index is None:
            assert found.batch_shape == (7, 1)
            whole = found
    torch.testing.assert_close(found.base_dist.stddev, whole.base_dist.stddev[2, 0])


def test_priors_that_do_not_change_are_what_they_were():
    # No function runs and no parameter is read in a step: Pyro keeps the distribution itself.
    for prior in (dist.Normal(0.0, 1.0), {"*": dist.Laplace(0.0, 1.0)}, lambda site, shape: dist.Normal(0.0, 0.1)):
        model, _ = small(prior=prior)
        kept = [random.prior for random in model.net._random.values()]
        assert all(isinstance(each, dist.Independent) for each in kept)
        assert not learnt_of(model)
        trace = pyro.poutine.trace(model).get_trace(X, Y)
        assert trace.nodes["0.weight"]["fn"] is kept[0]


def test_a_prior_that_needs_hyper_parameters_is_given_them_or_refused():
    model = classifier(hierarchical())
    with pytest.raises(UserError, match=r"'0\.weight' depends on the hyper-parameter '0\.weight_scale': pass"):
        site_priors(model, X[:1], Y[:1])
    given = {"0.weight_scale": torch.tensor(0.25), "2.weight_scale": torch.tensor(4.0)}
    found = site_priors(model, X[:1], Y[:1], given=given)
    assert [float(found[site].base_dist.stddev.unique()) for site in ("0.weight", "2.weight")] == [0.25, 4.0]


class LogNormals:
    """The latents of a posterior whose logarithms are Normal(1, 2)."""

    sites = ()
    latents = ("0.weight_scale", "2.weight_scale")

    def draw(self, index, *, seed=0):
        return self.draw_latents(index, seed=seed)

    def draw_latents(self, index, *, seed=0, sign=1.0):
        torch.manual_seed(seed)
        return {name: (1.0 + sign * 2.0 * torch.randn(())).exp() for name in self.latents}


def test_hyper_parameters_are_taken_at_their_posterior_median():
    model = classifier(hierarchical())
    given = median_latents(model, LogNormals(), X[:1], Y[:1])
    torch.testing.assert_close(given, dict.fromkeys(LogNormals.latents, torch.tensor(1.0).exp()))
    for prior in site_priors(model, X[:1], Y[:1], given=given).values():
        if prior.event_shape:
            torch.testing.assert_close(prior.base_dist.stddev.unique()[0], torch.tensor(1.0).exp())
    assert median_latents(model, AutoNormal(model), X[:1], Y[:1]) == {}


def test_building_a_guide_meets_no_scale_of_zero():
    model = Classifier(bayesian(nn.Linear(6, 2), hierarchical()), len(X))
    sites = latent_sites(model, X[:1], Y[:1])
    assert float(sites["weight_scale"]["value"]) > 0
    assert sites["weight"]["fn"].log_prob(torch.zeros(2, 6)).isfinite()
