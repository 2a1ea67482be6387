"""What predict and predictor refuse before the first draw, by name and in one line."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small_posteriors import X, Y, dense
from torch import nn
from torch.distributions import constraints

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, predictor
from ppl_bnn.errors import UserError
from ppl_bnn.models import layer_table
from ppl_bnn.prediction import drawing, without_draws
from ppl_bnn.prediction.onnx import export
from ppl_bnn.prediction.plain import plain


@pytest.fixture
def no_draws(monkeypatch):
    def drawn(*arguments):
        pytest.fail("a draw was made")

    monkeypatch.setattr(drawing, "drawn_blocks", drawn)
    monkeypatch.setattr(without_draws, "moment_predictive", drawn)


def other(**changes):
    """The small network with one thing changed."""
    net, guide = dense()
    for name, value in changes.items():
        part, path = name.split("__")
        parameter = {"net": net, "guide": guide}[part].get_parameter(path)
        with torch.no_grad():
            parameter.view(-1)[0] = value
    return net, guide


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["guide__loc.0.weight", "guide__unconstrained_scale.2.weight", "net__2.bias"])
@pytest.mark.usefixtures("no_draws")
def test_values_that_are_not_finite_are_refused(name, value, tmp_path):
    """The predictive of NaN probabilities had an ECE of 0."""
    net, guide = other(**{name: value})
    path = name.partition("__")[2]
    for method in ("draws", "layerwise", "moments"):
        with pytest.raises(UserError, match=f"'{path}' of the (posterior|network) has NaN or infinite values"):
            predict(net, guide, X, Y, method=method, progress=False)
    with pytest.raises(UserError, match="has NaN or infinite values"):
        predictor(net, guide, X)
    with pytest.raises(UserError, match="has NaN or infinite values"):
        export(tmp_path / "x.onnx", net, guide, X)


def test_a_draw_that_overflows_is_refused_when_it_is_made():
    net, guide = dense()
    with torch.no_grad():
        guide.get_parameter("loc.0.weight").fill_(1e38)
        guide.get_parameter("loc.2.weight").fill_(1e38)
    with pytest.raises(UserError, match="draw 0 gives NaN"):
        predict(net, guide, X, Y, num_samples=2, method="draws", progress=False)


@pytest.mark.usefixtures("no_draws")
def test_a_guide_of_another_model_is_refused_by_its_sites():
    net, guide = dense()
    with_biases, guide_with_biases = dense(bayesian_bias=True)
    wider = bayesian(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    for answer in (lambda *pair: predict(*pair, X, Y, progress=False), lambda *pair: predictor(*pair, X)):
        with pytest.raises(UserError, match=r"no draws for the network's random sites '0.bias', '2.bias'; build"):
            answer(with_biases, guide)
        with pytest.raises(UserError, match=r"has sites that the network lacks, '0.bias', '2.bias'; build"):
            answer(net, guide_with_biases)
        with pytest.raises(
            UserError, match=r"site '0.weight' is \[9, 5\] in the network and \[8, 5\] in the posterior"
        ):
            answer(wider, guide)
        with pytest.raises(UserError, match=r"no draws for the network's random sites '0.weight', '2.weight'"):
            answer(net, MeanFieldNormal(Classifier(nn.Linear(5, 3), 30), X[:1], Y[:1]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"x": X}, r"BayesianSequential fails on x, a dict of 'x'.*give it the inputs that its forward pass takes"),
        ((X, X), r"BayesianSequential fails on x, a tuple of 2"),
        ({"x": X, "z": X[:9]}, "the same number of examples, got 30 and 9"),
        ((), "inputs must be a tensor"),
        (X[0, 0], r"x must be a tensor of at least 1 example"),
        (X[:0], "at least 1 example"),
        (X.index_fill(0, torch.tensor([4, 7]), -math.inf), "2 examples have NaN or infinite values, the first is 4"),
    ],
)
@pytest.mark.usefixtures("no_draws")
def test_inputs_that_are_no_tensor_of_finite_numbers_are_refused(x, message):
    net, guide = dense()
    with pytest.raises(UserError, match=message):
        predict(net, guide, x, Y, progress=False)
    with pytest.raises(UserError, match=message):
        predictor(net, guide, x)


def test_a_predictor_takes_tensors():
    with pytest.raises(UserError, match=r"x must be one tensor.*got a numpy.ndarray: pass torch.as_tensor\(x\)"):
        predictor(*dense(), X.numpy())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y.float(), "class labels 0..2.*values are from 0 to 2"),
        (torch.eye(3)[Y], "class labels"),
        (Y + 1, "labels y are from 1 to 3; expected integer class labels 0..2"),
        (Y.index_fill(0, torch.tensor([1]), -100), "labels y are from -100 to 2; expected integer class labels 0..2"),
        (Y[:-1], "x and y need the same number of examples.*got 30 and 29"),
    ],
)
@pytest.mark.parametrize("method", ["draws", "moments"])
@pytest.mark.usefixtures("no_draws")
def test_what_is_no_label_is_refused(y, message, method):
    with pytest.raises(UserError, match=message):
        predict(*dense(), X, y, method=method, progress=False)


def test_labels_of_numpy_and_int32_predict_as_torchs_do():
    net, guide = dense()
    expected = predict(net, guide, X, Y, num_samples=3, progress=False)
    for labels in (Y.int(), Y.numpy(), Y.numpy().astype(np.uint8)):
        found = predict(net, guide, X, labels, num_samples=3, progress=False)
        assert torch.equal(found.log_likelihood, expected.log_likelihood)
        assert found.labels.dtype == torch.int64


@pytest.mark.usefixtures("no_draws")
def test_a_regression_network_is_told_that_class_labels_are_needed():
    net = bayesian(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    guide = MeanFieldNormal(net, X[:1])
    with pytest.raises(UserError, match=r"Categorical likelihood needs at least 2 outputs.*regression network"):
        predict(net, guide, X, X[:, 0], progress=False)
    with pytest.raises(UserError, match="Categorical likelihood needs at least 2 outputs"):
        predictor(net, guide, X)


@pytest.mark.usefixtures("no_draws")
def test_outputs_of_another_kind_are_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    for net, message in ((Pair(), "one tensor.*got a tuple"), (nn.Flatten(0), "one row an example")):
        with pytest.raises(UserError, match=message):
            predict(net, MeanFieldNormal(net, X[:1]), X, Y, progress=False)


@pytest.mark.usefixtures("no_draws")
def test_parameters_on_the_meta_device_are_refused():
    net, guide = dense()
    away = copy.deepcopy(net).to("meta")
    with pytest.raises(UserError, match=r"'0.weight' of the network is on the meta device and has no values"):
        predict(away, guide, X, Y, progress=False)


def test_a_mistake_in_the_users_forward_pass_is_raised_as_it_is():
    """It was taken for a network without a fixed graph, and the slow way met it once more."""

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.leyer(x)

    net = bayesian(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
    guide = MeanFieldNormal(net, X[:1])
    net.add_module("wrong", Wrong())
    for call in (lambda: predict(net, guide, X, Y, progress=False), lambda: plain(net)):
        with pytest.raises(AttributeError, match="leyer"):
            call()


def test_the_slow_way_says_so(caplog):
    class Shifted(nn.Sequential):
        def forward(self, x):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            return super().forward(x if shift is None else x + shift)

    net = bayesian(Shifted(nn.Linear(5, 3)))
    guide = MeanFieldNormal(net, X[:1])
    found = predict(net, guide, X, Y, num_samples=1, method="draws", progress=False)
    assert "draws go through Pyro, several times slower: the network samples 'shift'" in caplog.text
    with torch.no_grad(), poutine.condition(data=guide.draw(0)):
        torch.testing.assert_close(torch.as_tensor(found.probs[0]), net.eval()(X).softmax(-1))


def test_a_classifier_predicts_as_its_network_does():
    net, guide = dense()
    by_net = predict(net, guide, X, Y, num_samples=4, progress=False)
    by_model = predict(Classifier(net, 30), guide, X, Y, num_samples=4, progress=False)
    assert torch.equal(by_net.probs, by_model.probs)
    assert by_net.summary()["nll"] == by_model.summary()["nll"]
    answers = [predictor(one, guide, X, num_samples=4)(X)[0] for one in (net, Classifier(net, 30))]
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.usefixtures("no_draws")
def test_inputs_of_a_dtype_that_the_network_does_not_take_are_refused(dtype):
    kind = str(dtype).removeprefix("torch.")
    message = rf"x has dtype {kind} and the network's parameters have float32, .*: pass x.to\(torch.float32\)$"
    for answer in (lambda *pair: predict(*pair, X.to(dtype), Y, progress=False), lambda *p: predictor(*p, X.to(dtype))):
        with pytest.raises(UserError, match=message):
            answer(*dense())


@pytest.mark.usefixtures("no_draws")
def test_inputs_of_a_shape_that_the_network_does_not_take_are_refused():
    for answer in (lambda *pair: predict(*pair, X[:, :3], Y, progress=False), lambda *p: predictor(*p, X[:, :3])):
        with pytest.raises(UserError, match=r"the network fails on x of float32 \[N, 3\] \(RuntimeError: mat1 and"):
            answer(*dense())


def test_integer_inputs_of_an_embedding_are_predicted():
    net = bayesian(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)))
    tokens = torch.arange(60).reshape(30, 2) % 5
    guide = MeanFieldNormal(net, tokens[:1])
    assert predict(net, guide, tokens, Y, num_samples=2, progress=False).probs.shape == (2, 30, 3)
    with pytest.raises(UserError, match=r"fails on x of int64 \[N, 2\] \(IndexError: index out of range"):
        predict(net, guide, tokens + 5, Y, num_samples=2, progress=False)
    # Floating-point tokens fail in every dtype of the network's.
    with pytest.raises(UserError, match=r"fails on x of float64 \[N, 2\] \(RuntimeError: .*indices"):
        predict(net, guide, tokens.double(), Y, num_samples=2, progress=False)


class Scaled(nn.Module):
    """Logits times a ``pyro.param``; `branches` makes a network that torch.fx cannot trace."""

    def __init__(self, *initial, branches=False):
        super().__init__()
        self.layer, self.initial, self.branches = nn.Linear(5, 3), initial, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return self.layer(-x)
        return self.layer(x) * pyro.param("factor", *self.initial, constraint=constraints.positive)


@pytest.mark.parametrize("branches", [False, True])
def test_a_pyro_param_of_the_network_has_the_callers_value(branches):
    """It had its first value again, or there was a KeyError: the draws had a store of their own."""
    pyro.clear_param_store()
    pyro.param("factor", torch.tensor(3.0), constraint=constraints.positive)
    torch.manual_seed(0)
    net = bayesian(Scaled(torch.tensor(1.0), branches=branches))
    guide = MeanFieldNormal(net, X[:1])
    found = predict(net, guide, X, Y, num_samples=2, method="draws", progress=False)
    expected = [(3 * (X @ guide.draw(s, seed=0)["layer.weight"].T + net.layer.bias)).softmax(-1) for s in range(2)]
    torch.testing.assert_close(found.probs, torch.stack(expected).detach())
    lacking = bayesian(Scaled(branches=branches))
    predict(lacking, MeanFieldNormal(lacking, X[:1]), X, Y, num_samples=2, progress=False)
    assert layer_table(lacking, X[:1])[-1].output_shape == (3,)


@pytest.mark.parametrize("branches", [False, True])
def test_a_prediction_leaves_no_pyro_param_in_the_callers_store(branches):
    pyro.clear_param_store()
    net = bayesian(Scaled(torch.tensor(1.0), branches=branches))
    predict(net, MeanFieldNormal(net, X[:1]), X, Y, num_samples=2, progress=False)
    assert not list(pyro.get_param_store())
