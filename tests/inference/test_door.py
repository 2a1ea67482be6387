"""fit's check at the door: what is wrong with inputs, labels, outputs, counts or the guide is refused before a step."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from door_models import TARGETS, Bias, Heads, X, Y, classifier, layers, parameters, refused, regression, same, settings
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit
from ppl_bnn.errors import UserError

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


@pytest.mark.parametrize("x", [X.double(), X.to(torch.uint8), X.double().numpy().astype(np.uint8)])
def test_inputs_of_a_dtype_that_the_network_does_not_take_are_refused(x):
    kind = str(x.dtype).removeprefix("torch.")
    refused(rf"x has dtype {kind} and the network's parameters have float32, .*torch.float32\)$", *classifier(), x=x)


def test_inputs_of_a_shape_that_the_network_does_not_take_are_refused():
    refused(r"the network fails on x of float32 \[N, 3\] \(RuntimeError: mat1 and mat2", *classifier(), x=X[:, :3])


def test_integer_inputs_of_an_embedding_are_trained_on():
    model = Classifier(bayesian(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))), 60)
    tokens = torch.arange(120).reshape(60, 2) % 5
    guide = MeanFieldNormal(model, tokens[:1], Y[:1])
    fit(model, guide, tokens, Y, **settings())
    with pytest.raises(UserError, match=r"fails on x of int64 \[N, 2\] \(IndexError: index out of range"):
        fit(model, guide, tokens + 5, Y, **settings())
    # Floating-point tokens fail in the parameters' dtype too.
    with pytest.raises(UserError, match=r"fails on x of float64 \[N, 2\] \(RuntimeError: .*indices"):
        fit(model, guide, tokens.double(), Y, **settings())


@pytest.mark.parametrize("x", [{"left": X[:, :2], "right": X[:, 2:]}, (X, X)], ids=["dict", "tuple"])
def test_several_inputs_of_a_network_that_takes_one_are_refused(x):
    refused(f"x is a {type(x).__name__} of tensors, and the network does not take it", *classifier(), x=x)


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


def test_a_layer_that_training_alone_reaches_is_trained():
    model, guide = classifier(Heads(True))
    before = guide.loc.extra.weight.detach().clone()
    fit(model, guide, X, Y, **settings())
    assert not torch.equal(guide.loc.extra.weight, before)


def test_a_layer_that_no_forward_pass_reaches_is_refused():
    refused(
        "would not train the random parameter 'extra.weight': the forward pass in training mode does not",
        *classifier(Heads(False)),
    )


class Made(nn.Module):
    """A guide of one site, of any distribution."""

    def __init__(self, distribution):
        super().__init__()
        self.loc, self.distribution = nn.Parameter(torch.zeros(3)), distribution

    def forward(self, x, y=None):
        pyro.sample("b", self.distribution(self.loc))


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
