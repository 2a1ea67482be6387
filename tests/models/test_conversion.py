"""Conversion keeps what the user wrote, or refuses it by name."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from converted_networks import X, Y, sites, trained
from pyro import poutine
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, predict
from ppl_bnn.models import layer_table, site_priors
from ppl_bnn.models.random_network import random_sites
from ppl_bnn.prediction.plain import NotTraceable, plain


class Listed(nn.Module):
    """Layers that the forward pass reaches through a Python list and a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.first, self.rest = [self.a], {"head": self.b}

    def forward(self, x):
        return self.rest["head"](self.first[0](x).relu())


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(input=self.norm(input=self.a(input=x)).relu())


def test_layers_in_lists_and_dicts_are_the_converted_ones():
    net = Listed()
    bnn = bayesian(net)
    assert bnn.first[0] is bnn.a
    assert bnn.rest["head"] is bnn.b
    assert sites(bnn) == ["a.weight", "b.weight"]
    assert type(net.first[0]) is nn.Linear
    assert type(net) is Listed
    with poutine.condition(data={"a.weight": net.a.weight, "b.weight": net.b.weight}):
        torch.testing.assert_close(bnn(X), net(X))


def test_hooks_of_converted_layers_stay_and_those_of_a_module_see_the_copy():
    seen = []

    class Watching(Listed):
        def __init__(self):
            super().__init__()
            self.a.register_forward_hook(self.look)

        def look(self, module, inputs, output):
            seen.append((self, module))

    net = Watching()
    net.b.register_forward_pre_hook(lambda *_: seen.append("before"))
    net.b.register_full_backward_hook(lambda *_: seen.append("backward"))
    bnn = bayesian(net)
    bnn(X).sum().backward()
    assert seen == [(bnn, bnn.a), "before", "backward"]


def test_prediction_runs_the_hooks_that_training_ran():
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].register_forward_hook(lambda module, inputs, output: output * 0)
    bnn = bayesian(net)
    with pytest.raises(NotTraceable, match="forward hook on '0'"):
        plain(bnn)
    found = predict(bnn, MeanFieldNormal(bnn, X), X, Y, num_samples=2, progress=False)
    torch.testing.assert_close(torch.as_tensor(found.probs), torch.full((2, 12, 3), 1 / 3), rtol=0, atol=1e-6)


def test_layers_called_with_keywords_train_and_predict():
    net = bayesian(Keywords())
    guide = trained(net)
    network = plain(net)
    draw = guide.draw(0)
    for site, weight in draw.items():
        network.parameter(site).data.copy_(network.place(site, weight, weight)[0])
    with torch.no_grad(), poutine.condition(data=draw):
        torch.testing.assert_close(network.net(X), net.eval()(X))
    assert torch.isfinite(torch.as_tensor(predict(net, guide, X, Y, num_samples=2, progress=False).probs)).all()


def test_tied_parameters_are_one_site():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["b"].bias = net["a"].bias
    net["b"].weight = net["a"].weight

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net

        def forward(self, x):
            return self.parts["b"](self.parts["a"](x).relu())

    bnn = bayesian(Tied(), bayesian_bias=True)
    assert sites(bnn) == ["parts.a.weight", "parts.a.bias"]
    draw = {"parts.a.weight": torch.eye(4) * 2, "parts.a.bias": torch.ones(4)}
    with poutine.condition(data=draw):
        torch.testing.assert_close(bnn(X), (2 * X + 1).relu() * 2 + 1)
    guide = trained(bnn)
    draw = guide.draw(0)
    with torch.no_grad(), poutine.condition(data=draw):
        expected = bnn.eval()(X).softmax(-1)
    found = predict(bnn, guide, X, Y, num_samples=1, method="draws", progress=False)
    torch.testing.assert_close(torch.as_tensor(found.probs[0]), expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "site"),
    [
        (spectral_norm, "1.weight_orig"),
        (weight_norm, "1.weight_v"),
        (lambda layer: prune.random_unstructured(layer, "weight", 1), "1.weight_orig"),
        (parametrizations.spectral_norm, "1.parametrizations.weight.original"),
        (parametrizations.weight_norm, "1.parametrizations.weight.original1"),
    ],
)
def test_a_weight_that_other_parameters_make_has_their_draws(wrap, site):
    net = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 3))).eval()
    net(X).sum().backward()
    bnn = bayesian(net)
    assert site in sites(bnn)
    own = {name: value for name, value in net.named_parameters() if name in sites(bnn)}
    with poutine.condition(data=own):
        torch.testing.assert_close(bnn(X), net(X))
    guide = trained(bnn)
    found = predict(bnn, guide, X, Y, num_samples=1, method="draws", progress=False)
    with torch.no_grad(), poutine.condition(data=guide.draw(0)):
        torch.testing.assert_close(torch.as_tensor(found.probs[0]), bnn.eval()(X).softmax(-1))


def test_a_network_is_converted_once():
    with pytest.raises(ValueError, match="'inner' has random parameters already"):
        bayesian(nn.ModuleDict({"inner": bayesian(nn.Sequential(nn.Linear(4, 4)))}))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_convolutions_pad_as_they_are_told(mode):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(32, 3))
    bnn, images = bayesian(net), torch.rand(12, 1, 4, 4)
    own = {name: net.get_parameter(name) for name in sites(bnn, images)}
    with poutine.condition(data=own):
        torch.testing.assert_close(bnn(images), net(images))
    guide = MeanFieldNormal(bnn, images[:1])
    found = predict(bnn, guide, images, Y, num_samples=1, method="draws", progress=False)
    with torch.no_grad(), poutine.condition(data=guide.draw(0)):
        torch.testing.assert_close(torch.as_tensor(found.probs[0]), bnn.eval()(images).softmax(-1))


def test_a_hook_on_a_parameter_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 3))
    handle = net[0].bias.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=r"parameter '0.bias' has a hook"):
        bayesian(net)
    handle.remove()
    net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"parameter '0.weight' has a hook"):
        bayesian(net)


def test_slices_of_a_sequential_keep_the_names_of_sites():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            self.g = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x):
            x = self.f[2:](self.f[:2](x))
            for layer in self.g[1:]:
                x = layer(x)
            return self.g[0](x)

    net = bayesian(Sliced())
    for _ in range(2):
        assert sites(net) == ["f.0.weight", "f.2.weight", "g.0.weight", "g.1.weight"]


def test_a_place_without_a_module_stays_empty():
    net = nn.Sequential(nn.Linear(4, 3))
    net.register_module("down", None)
    assert bayesian(net).down is None


def test_conversion_keeps_attributes_state_and_copies():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 3, bias=False)))
    net[0].note = "mine"
    bnn = bayesian(net)
    assert bnn[0].note == "mine"
    torch.testing.assert_close(bnn.state_dict(), net.state_dict())
    assert list(bnn.state_dict()) == list(net.state_dict())
    assert isinstance(bnn, nn.Sequential)
    assert [type(module) for module in bnn.modules()][1:] == [type(module) for module in net.modules()][1:]
    assert type(bnn).__name__ == "BayesianSequential"
    buffer = io.BytesIO()
    torch.save(bnn, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(bnn), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in bnn.modules()]
        torch.testing.assert_close(other.state_dict(), bnn.state_dict())
        assert sites(other) == ["0.weight", "2.0.weight"]


def test_conversion_draws_the_random_numbers_of_new_layers():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3, bias=False))
    torch.manual_seed(5)
    bayesian(net)
    found = torch.rand(3)
    torch.manual_seed(5)
    nn.Conv2d(1, 2, 3), nn.Linear(8, 3, bias=False)
    assert torch.equal(found, torch.rand(3))


def test_weights_without_gradients_are_refused_where_the_data_should_train_them():
    class Detached(Listed):
        def forward(self, x):
            with torch.no_grad():
                x = self.a(x).relu()
            return self.b(x)

    model = Classifier(bayesian(Detached()), 12)
    guide = MeanFieldNormal(model, X, Y)
    with pytest.raises(ValueError, match=r"would not train the random parameter 'a.weight'"):
        fit(model, guide, X, Y, epochs=1, batch_size=4, progress=False)
    for part in (guide.loc.a, guide.unconstrained_scale.a):
        part.requires_grad_(False)
    fit(model, guide, X, Y, epochs=1, batch_size=4, progress=False)


def test_a_vectorized_call_leaves_the_prior_as_it_was_also_if_it_fails():
    model = Classifier(bayesian(nn.Sequential(nn.Linear(4, 3))), 12)
    assert pyro.infer.Predictive(model, num_samples=7, parallel=True)(X)["y"].shape == (7, len(X))
    assert site_priors(model, X, Y)["0.weight"].sample().shape == (3, 4)
    images, convolution = torch.randn(3, 1, 4, 4), bayesian(nn.Sequential(nn.Conv2d(1, 2, 3)))
    found = pyro.infer.Predictive(convolution, num_samples=7, parallel=True, return_sites=["_RETURN", "0.weight"])(
        images
    )
    assert found["_RETURN"].shape == (7, 3, 2, 2, 2)
    assert site_priors(convolution, images)["0.weight"].sample().shape == (2, 1, 3, 3)
    assert MeanFieldNormal(model, X, Y).loc_scale("0.weight")[0].shape == (3, 4)


def test_the_layer_table_counts_parameters_of_the_networks_own_modules():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.lin = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x + self.token)

    rows = {row.layer: row for row in layer_table(bayesian(Scaled()), X)}
    assert rows["Scaled"].trainable == 4
    assert rows["lin"].kind == "BayesianLinear"
    assert sum(row.trainable for row in rows.values()) == 4 + 3 + 2 * 12


def test_hooks_of_layers_stay():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2))
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    bnn = bayesian(net, dist.Normal(0.0, 0.1))
    with poutine.condition(data={"0.weight": net[0].weight}):
        torch.testing.assert_close(bnn(torch.ones(1, 2, 5, 5)), net(torch.ones(1, 2, 5, 5)))
    assert len(seen) == 2


def test_a_prior_may_be_the_text_that_settings_have():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for prior, scales in (
        ("normal(0, 0.1)", {"0.weight": 0.1, "2.weight": 0.1}),
        ({"0.weight": "normal(0, 0.3)", "2.weight": None}, {"0.weight": 0.3}),
    ):
        found = {
            name: random.prior.stddev.flatten()[0] for name, (_, random) in random_sites(bayesian(net, prior)).items()
        }
        assert found == {name: pytest.approx(scale) for name, scale in scales.items()}
