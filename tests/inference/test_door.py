"""What `fit` refuses by name before its first step, and what it makes of inputs and parameters as users have them."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from ppl_bnn import Classifier, GaussianScaleMixture, MeanFieldNormal, bayesian, fit

Y = torch.arange(60) % 3
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))[Y] * 3
TARGETS = X.sum(1).sin()


def layers(*between, outputs=3):
    return nn.Sequential(nn.Linear(4, 8), *between, nn.ReLU(), nn.Linear(8, outputs))


def classifier(net=None, *, num_data=60, seed=0, **keywords):
    torch.manual_seed(seed)
    model = Classifier(bayesian(net or layers(), **keywords), num_data)
    return model, MeanFieldNormal(model, X[:2].to(torch.get_default_dtype()), Y[:2], init_loc="he", init_scale=0.02)


class Regression(nn.Module):
    """y ~ Normal(net(x), scale), written as its user likes: `observe` has the plate and the site."""

    def __init__(self, observe, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.observe = bayesian(layers(outputs=outputs)), observe

    def forward(self, x, y=None):
        return self.observe(self.net(x), x, y)


def regression(observe, y, outputs=1):
    model = Regression(observe, outputs)
    return model, MeanFieldNormal(model, X[:1], y[:1], init_scale=0.02)


def settings(**changes):
    return {"epochs": 2, "batch_size": 20, "lr": 0.01, "progress": False, **changes}


def everything(model, guide):
    """All that a refusal must leave as it was."""
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    tensors = [value for part in modules for value in (*part.parameters(), *part.buffers())]
    store = pyro.get_param_store()
    return {
        "values": [value.detach().clone() for value in tensors],
        "frozen": [value.requires_grad for value in tensors],
        "gradients": [value.grad is None for value in tensors],
        "modes": [module.training for part in modules for module in part.modules()],
        "store": {name: value.detach().clone() for name, value in store.items()},
        "random": torch.get_rng_state(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or bool((one.isnan() == other.isnan()).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def refused(match, model, guide, x=X, y=Y, **changes):
    before, steps = everything(model, guide), []
    with pytest.raises(ValueError, match=match) as error:
        fit(model, guide, x, y, **settings(**changes), should_stop=lambda: bool(steps.append(1)))
    assert type(error.value).__name__ == "UserError"
    assert "\n" not in str(error.value)
    assert not steps
    assert same(before, everything(model, guide))


def parameters(model, guide):
    return [value.detach().clone() for part in (model, guide) for value in part.state_dict().values()]


# -- inputs and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:, None], r"labels y have shape \[60, 1\].*squeeze"),
        (Y.float(), r"labels y have shape \[60\] and dtype float32.*long"),
        (nn.functional.one_hot(Y), r"labels y have shape \[60, 3\].*one-hot.*argmax"),
        (Y[:, None].expand(60, 5), r"labels y have shape \[60, 5\].*reshape"),
        (Y + 1, r"labels y are from 1 to 3; expected integer class labels 0..2 .*subtract 1"),
        (Y + 7, r"labels y are from 7 to 9; .*an output for each class"),
        # Beyond the two rows that the model runs with.
        (Y.index_fill(0, torch.tensor([41]), -100), "labels y are from -100 to 2.*drop the examples"),
        (Y.tolist(), "labels or targets y .* got a list"),
        (np.array(["cat", "dog", "cow"] * 20), "labels or targets y is a numpy array of dtype <U3"),
    ],
    ids=["column", "float", "one-hot", "wide", "one-based", "too large", "unknown", "list", "text"],
)
def test_labels_that_are_not_what_a_categorical_takes_are_refused(labels, message):
    refused(message, *classifier(), y=labels)


def test_labels_of_pandas_are_refused_with_what_to_pass():
    pandas = pytest.importorskip("pandas")
    refused(r"labels or targets y .* got a Series: pass .*to_numpy\(\)", *classifier(), y=pandas.Series(Y.numpy()))


@pytest.mark.parametrize(
    "labels",
    [Y.int(), Y.to(torch.uint8), Y.numpy(), Y.numpy().astype(np.int16), Y.numpy()[::-1][::-1]],
    ids=["int32", "uint8", "numpy", "int16 numpy", "a view of numpy"],
)
def test_integer_labels_are_used_whatever_their_dtype(labels):
    found = []
    for y in (Y, labels):
        model, guide = classifier()
        found.append(fit(model, guide, X, y, **settings())[-1]["loss"])
    assert found[0] == found[1]


def test_numpy_inputs_become_numbers_of_the_models_dtype():
    found = []
    for x in (X, X.double().numpy()):
        model, guide = classifier()
        found.append(fit(model, guide, x, Y, **settings())[-1]["loss"])
    assert found[0] == found[1]


@pytest.mark.parametrize("x", [{"left": X[:, :2], "right": X[:, 2:]}, (X, X)], ids=["dict", "tuple"])
def test_several_inputs_are_refused(x):
    refused("x must be one tensor or numpy array", *classifier(), x=x)


def test_a_network_of_one_output_is_no_classifier():
    refused("1 output, .* at least 2 outputs", *classifier(layers(outputs=1)), y=torch.zeros(60).long())


# -- outputs and targets -----------------------------------------------------------------------------------------


def in_plate(size=60, scale=0.5, squeeze=True):
    def observe(mean, x, y):
        with pyro.plate("data", size, subsample=x):
            pyro.sample("y", dist.Normal(mean.squeeze(1) if squeeze else mean, scale), obs=y)

    return observe


def test_outputs_n_1_with_targets_n_are_refused_as_pyro_does():
    refused(
        r"distribution of shape \[2, 2\] and the targets have shape \[2\]",
        *regression(in_plate(squeeze=False), TARGETS),
        y=TARGETS,
    )


def test_targets_n_1_with_outputs_n_are_refused():
    refused(r"shape \[2\] and the targets have shape \[2, 1\]", *regression(in_plate(), TARGETS), y=TARGETS[:, None])


def test_a_site_that_spans_more_than_its_plate_is_refused():
    def observe(mean, x, y):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    y = TARGETS[:, None].expand(60, 3)
    refused('site "y", invalid log_prob shape', *regression(observe, y, outputs=3), y=y, batch_size=60)


def test_arguments_that_a_distribution_cannot_have_are_refused():
    def observe(outputs, x, y):
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Normal(outputs[:, 0], -1 - outputs[:, 1].square(), validate_args=False), obs=y)

    model, guide = regression(observe, TARGETS, outputs=2)
    refused("Normal needs scale to satisfy .* softplus or exp", model, guide, y=TARGETS)


def test_a_target_that_a_distribution_cannot_have_is_refused_wherever_it_is():
    def observe(rate, x, y):
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Poisson(rate.squeeze(1).exp()), obs=y)

    counts = torch.ones(60)
    counts[37] = -1
    refused("Poisson has the support .* targets are from -1 to 1", *regression(observe, counts.abs()), y=counts)


# -- how many examples there are ---------------------------------------------------------------------------------


def test_num_data_must_be_the_datas():
    refused(
        "plate 'data' has size 60000 and there are 60 examples, .* count 1000 times: make num_data .* 60",
        *classifier(num_data=60_000),
    )


def test_a_plate_of_the_batch_alone_is_refused_but_where_it_is_all_the_data():
    def observe(mean, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean.squeeze(1), 0.5), obs=y)

    model, guide = regression(observe, TARGETS)
    assert len(fit(model, guide, X, TARGETS, **settings(batch_size=60))) == 2
    model, guide = regression(observe, TARGETS)
    refused("plate 'data' has size 2 and there are 60 examples", model, guide, y=TARGETS)


def test_an_observation_outside_a_plate_is_refused_but_where_a_step_has_all_the_data():
    def observe(mean, x, y):
        pyro.sample("y", dist.Normal(mean.squeeze(1), 0.5).to_event(1), obs=y)

    model, guide = regression(observe, TARGETS)
    assert len(fit(model, guide, X, TARGETS, **settings(batch_size=60))) == 2
    model, guide = regression(observe, TARGETS)
    refused("'y' is in no plate of 60 examples", model, guide, y=TARGETS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_of_one_under_batch_norm_is_refused(ranks):
    from ppl_bnn.inference.door import check_training

    # 57 = 28 + 28 + 1 with one rank; 59 = 2 x 28 + 3, of which one rank has 1, with two.
    n = {1: 57, 2: 59}[ranks]
    model, guide = classifier(layers(nn.BatchNorm1d(8)), num_data=n)
    with pytest.raises(ValueError, match=r"batch norm 'net.1' needs at least 2 .* batch_size"):
        check_training(model, guide, X[:n], Y[:n], batch_size=28, ranks=ranks)
    check_training(model, guide, X[:n], Y[:n], batch_size=27, ranks=ranks)
    if ranks == 1:
        refused("batch_size 28 leave a step with 1", model, guide, X[:n], Y[:n], batch_size=28)


def test_a_batch_of_one_is_fine_where_batch_norm_averages_over_space_or_does_not_train():
    images = torch.randn(9, 1, 6, 6)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    model, guide = Classifier(bayesian(net), 9), None
    guide = MeanFieldNormal(model, images[:1], Y[:1])
    assert len(fit(model, guide, images, Y[:9], **settings(batch_size=4))) == 2
    net = bayesian(layers(nn.BatchNorm1d(8)))
    net[1].eval()
    model = Classifier(net, 9)
    guide = MeanFieldNormal(model, X[:2], Y[:2])
    assert len(fit(model, guide, X[:9], Y[:9], **settings(batch_size=4))) == 2


# -- the guide ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["guide", "model"])
def test_parameters_that_are_not_finite_at_the_start_are_named(of, value):
    model, guide = classifier()
    name, parameter = list((guide if of == "guide" else model).named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    refused(f"the parameter {name} of the {of} is not finite", model, guide)


def test_a_guide_without_a_site_of_the_model_is_refused():
    guide = classifier()[1]
    refused("the guide has no site '0.bias'", classifier(bayesian_bias=True)[0], guide)


def test_a_guide_with_a_site_that_the_model_has_not_is_refused():
    guide = classifier(bayesian_bias=True)[1]
    refused("the guide samples '0.bias', which is no latent site", classifier()[0], guide)


def test_a_guide_of_another_network_is_refused():
    guide = classifier(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))[1]
    refused(r"the guide's site '\d.weight' has shape", classifier()[0], guide)


class Heads(nn.Module):
    """A network with a second head: reached in training mode alone, or never."""

    def __init__(self, reached):
        super().__init__()
        self.body, self.head, self.extra, self.reached = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3), reached

    def forward(self, x):
        h = self.body(x).relu()
        return self.head(h) + self.extra(h) if self.reached and self.training else self.head(h)


def test_a_layer_that_training_alone_reaches_is_refused():
    refused("the guide has no site 'extra.weight', which the model samples in training mode", *classifier(Heads(True)))


def test_a_layer_that_no_forward_pass_reaches_is_refused():
    refused("no forward pass in training mode reaches .* of layer 'net.extra'", *classifier(Heads(False)))


class Made(nn.Module):
    """A guide of one site, of any distribution."""

    def __init__(self, distribution):
        super().__init__()
        self.loc, self.distribution = nn.Parameter(torch.zeros(3)), distribution

    def forward(self, x, y=None):
        pyro.sample("b", self.distribution(self.loc))


class Bias(nn.Module):
    """Logits that are one random vector plus a layer of point estimates."""

    def __init__(self, prior=None):
        super().__init__()
        self.net, self.prior = nn.Linear(4, 3), prior or dist.Normal(0.0, 1.0).expand([3]).to_event(1)

    def forward(self, x, y=None):
        logits = self.net(x) + pyro.sample("b", self.prior)
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


class Nameless(dist.TorchDistribution):
    has_rsample = True
    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, loc):
        self.loc = loc
        super().__init__(event_shape=loc.shape)

    def rsample(self, sample_shape=()):
        return self.loc + torch.rand_like(self.loc)


def test_a_guide_whose_gradient_would_be_wrong_is_refused():
    refused(
        "'b' from a .*, which is not reparameterized", Bias(), Made(lambda loc: dist.Poisson(loc.exp()).to_event(1))
    )


def test_a_guide_whose_kl_cannot_be_had_is_refused():
    refused("'b' from a Nameless, which has neither an entropy nor a log_prob", Bias(), Made(Nameless))


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal])
def test_pyros_own_guides_train_though_their_parameters_come_with_the_first_call(kind):
    model = classifier()[0]
    guide = kind(model)
    history = fit(model, guide, X, Y, **settings(epochs=60, lr=0.02))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["accuracy"] == 1
    assert history[0]["kl"] != history[-1]["kl"]
    assert not list(pyro.get_param_store())


def test_parameters_made_by_the_first_call_depend_on_the_seed_alone():
    found = []
    for noise in range(2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        guide = AutoLowRankMultivariateNormal(model := classifier()[0])
        torch.set_rng_state(before)
        fit(model, guide, X, Y, **settings())
        assert torch.equal(before, torch.get_rng_state())
        found.append(parameters(model, guide))
    assert same(*found)


# -- parameters --------------------------------------------------------------------------------------------------


def test_a_trainable_tensor_in_a_prior_is_refused():
    scale = nn.Parameter(torch.tensor(1.0))
    for prior in (
        dist.Normal(0.0, scale),
        {"*": dist.Laplace(0.0, scale)},
        lambda site, shape: dist.Normal(0.0, scale),
    ):
        with pytest.raises(ValueError, match=r"prior of site '0.weight' has a trainable parameter; .*detach it"):
            bayesian(layers(), prior)


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
    # Linear layers cannot compute a batch of weights.
    with pytest.raises(RuntimeError):
        Predictive(model, num_samples=5, parallel=True)(X)
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
