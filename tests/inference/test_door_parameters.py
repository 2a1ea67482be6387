"""fit's check at the door: every trainable parameter is trained, and what is frozen or in evaluation mode stays so."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from door_models import (
    TARGETS,
    Bias,
    Heads,
    X,
    Y,
    classifier,
    everything,
    layers,
    parameters,
    refused,
    regression,
    same,
    settings,
)
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from ppl_bnn import Classifier, GaussianScaleMixture, MeanFieldNormal, bayesian, fit

# -- parameters --------------------------------------------------------------------------------------------------


def test_a_trainable_tensor_that_nothing_trains_is_refused():
    scale = torch.tensor(1.0, requires_grad=True)
    model = Bias(dist.Normal(torch.zeros(3), scale).to_event(1))
    refused(
        r"a tensor of shape \[\] that requires a gradient .* no parameter", model, MeanFieldNormal(model, X[:1], Y[:1])
    )


def test_lazy_layers_are_made_by_the_first_call_and_train():
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), bayesian(nn.Linear(8, 3)))
    model = Classifier(net, 60)
    guide = AutoNormal(model)
    history = fit(model, guide, X, Y, **settings(epochs=30, lr=0.02))
    assert history[-1]["loss"] < history[0]["loss"]
    assert net[0].weight.shape == (8, 4)
    # Three steps an epoch, and none of the look.
    assert net[1].num_batches_tracked == 90


def test_a_lazy_layer_that_no_pass_reaches_is_named():
    net = Heads(False)
    net.extra = nn.LazyLinear(3)
    model = Classifier(net, 60)
    with pytest.raises(ValueError, match=r"net.extra.* is uninitialized after a call"):
        fit(model, AutoNormal(model), X, Y, **settings())


def noisy(mean, x, y):
    scale = pyro.param("noise", torch.tensor(3.0), constraint=dist.constraints.positive)
    with pyro.plate("data", 60, subsample=x):
        pyro.sample("y", dist.Normal(mean.squeeze(1), scale), obs=y)


def test_pyro_params_are_trained_and_left_in_the_callers_store():
    pyro.param("mine", torch.tensor(2.0))
    # The run of a cell, and the second, which goes on from the value that is there, as pyro.param says.
    for start in (3.0, None):
        model, guide = regression(noisy, TARGETS)
        before = start or pyro.param("noise").item()
        history = fit(model, guide, X, TARGETS, **settings(epochs=30))
        assert pyro.param("noise").item() < before - 0.3
        assert set(pyro.get_param_store()) == {"mine", "noise"}
        assert pyro.param("mine").item() == 2
    assert history[-1]["nll"] < history[0]["nll"]


def test_pyro_params_resume_bitwise_from_a_checkpoint(tmp_path):
    from ppl_bnn.errors import Interrupted

    def train(folder, stop_at=100):
        pyro.clear_param_store()
        model, guide = regression(noisy, TARGETS)
        steps = iter(range(1, 100))
        fit(model, guide, X, TARGETS, **settings(), folder=folder, should_stop=lambda: next(steps) == stop_at)
        return [pyro.param("noise").detach(), *parameters(model, guide)]

    with pytest.raises(Interrupted):
        train(tmp_path / "cut", stop_at=4)
    assert same(train(tmp_path / "cut"), train(tmp_path / "whole"))


def test_a_training_that_its_folder_refuses_leaves_the_callers_store(tmp_path):
    model, guide = regression(noisy, TARGETS)
    fit(model, guide, X, TARGETS, **settings(), folder=tmp_path)
    pyro.clear_param_store()
    refused("holds a training with lr 0.01", model, guide, y=TARGETS, folder=tmp_path, lr=0.02)
    assert not list(pyro.get_param_store())


def test_functions_train_with_the_modules_they_hold():
    net = nn.Linear(4, 3)
    before = net.weight.detach().clone()

    def model(x, y=None):
        pyro.module("net", net)
        logits = net(x) + pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def guide(x, y=None):
        scale = pyro.param("scale", torch.full((3,), 0.1), constraint=dist.constraints.positive)
        pyro.sample("b", dist.Normal(pyro.param("loc", torch.zeros(3)), scale).to_event(1))

    # Another module's parameter of that name must not be trained instead.
    pyro.module("net", nn.Linear(4, 3))
    history = fit(model, guide, X, Y, **settings(epochs=40))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert (net.weight - before).abs().min() > 0.01
    assert pyro.param("net$$$weight") is net.weight
    assert (pyro.param("scale") != 0.1).all()


def test_a_module_trains_its_own_parameters_whatever_the_store_holds_under_their_names():
    class Shifted(PyroModule):
        def __init__(self):
            super().__init__()
            self.shift = PyroParam(torch.zeros(3))
            self.layer = PyroModule[nn.Linear](4, 3)

        def forward(self, x):
            return self.layer(x) + self.shift

    others = {"shift": torch.full((3,), 50.0), "layer.weight": torch.full((3, 4), 50.0)}
    for name, value in others.items():
        pyro.param(name, value)
    net = Shifted()
    model = Classifier(net, 60)
    fit(model, lambda x, y: None, X, Y, **settings())
    assert net.shift.abs().max() < 1
    assert (net.shift != 0).any()
    assert same({name: value.clone() for name, value in others.items()}, everything(model, net)["store"])


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "ivon"])
def test_what_is_frozen_stays_as_it_is_and_frozen(optimizer):
    model, guide = classifier(layers(nn.BatchNorm1d(8)))
    frozen = [*model.net[1].parameters(), *(value for name, value in guide.named_parameters() if "0.weight" in name)]
    assert len(frozen) == 4
    for value in frozen:
        value.requires_grad_(False)
    before = copy.deepcopy(frozen)
    other = guide.loc_scale("3.weight")[0].detach().clone()
    fit(model, guide, X, Y, **settings(optimizer=optimizer))
    assert not any(value.requires_grad for value in frozen)
    assert all(map(torch.equal, before, frozen))
    assert not torch.equal(other, guide.loc_scale("3.weight")[0])


def test_ivon_refuses_half_a_frozen_pair():
    model, guide = classifier()
    guide.loc.get_parameter("0.weight").requires_grad_(False)
    refused("one alone of '0.weight' is frozen: freeze both or neither", model, guide, optimizer="ivon")


def test_a_training_of_nothing_is_refused():
    model, guide = classifier()
    model.requires_grad_(False)
    guide.requires_grad_(False)
    refused("nothing is left to train", model, guide)


# -- modes and state ---------------------------------------------------------------------------------------------


def test_a_backbone_in_evaluation_mode_stays_in_it():
    backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    net = bayesian(nn.Sequential(backbone, nn.BatchNorm1d(8), nn.Linear(8, 3)))
    model = Classifier(net, 60)
    guide = MeanFieldNormal(model, X[:2], Y[:2])
    net[0].eval().requires_grad_(False)
    kept, trained, modes = net[0][1].running_mean, net[1].running_mean, set()
    net[0].register_forward_hook(lambda module, *_: modes.add((module.training, net[1].training)))
    # Once more: then all of the model is in evaluation mode, as fit leaves it.
    for _ in range(2):
        before = trained.clone()
        fit(model, guide, X, Y, **settings())
        assert torch.equal(kept, torch.zeros(8))
        assert not torch.equal(trained, before)
        assert not any(module.training for module in model.modules())
    assert modes == {(False, True)}


def test_the_look_leaves_statistics_modes_and_random_state_as_they_were():
    from ppl_bnn.inference.door import check_training

    model, guide = classifier(layers(nn.BatchNorm1d(8), nn.Dropout(0.5)))
    model.net[1].eval()
    before = everything(model, guide)
    found = check_training(model, guide, X, Y.int(), batch_size=20)
    assert same(before, everything(model, guide))
    assert found.model is model
    assert found.x is X
    assert found.y.dtype == torch.int64
    assert not found.params


def test_a_vectorized_call_of_pyro_leaves_the_priors_as_they_were():
    model, guide = classifier()
    assert Predictive(model, num_samples=5, parallel=True)(X)["y"].shape == (5, len(X))
    assert poutine.trace(model).get_trace(X).nodes["0.weight"]["value"].shape == (8, 4)
    assert len(fit(model, guide, X, Y, **settings())) == 2


@pytest.mark.parametrize("prior", [None, GaussianScaleMixture(0.5, 1.0, 0.1)], ids=["normal", "mixture"])
def test_double_precision_by_default_trains(prior):
    torch.set_default_dtype(torch.float64)
    try:
        model, guide = classifier(prior=prior)
        history = fit(model, guide, X.double().numpy(), Y, **settings(epochs=20))
    finally:
        torch.set_default_dtype(torch.float32)
    assert history[-1]["nll"] < history[0]["nll"]
    assert all(value.dtype == torch.float64 for part in (model, guide) for value in part.parameters())
