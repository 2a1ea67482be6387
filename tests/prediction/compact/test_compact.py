"""A compact network computes what the pruned network computes, draw by draw."""

import numpy as np
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, UserError, bayesian, build, predict, predictor, prune
from ppl_bnn.models.random_network import given
from ppl_bnn.prediction.compact.forms import choose_layers
from ppl_bnn.prediction.compact.layerwise import compact_draws
from ppl_bnn.prediction.compact.network import compact
from ppl_bnn.prediction.compact.sparse_layers import sparse_layer
from ppl_bnn.prediction.plain import plain


def dense(draws):
    widths = [int(draws.integers(2, 12)) for _ in range(int(draws.integers(2, 5)))]
    layers = [nn.Flatten()]
    for at, width in enumerate(widths):
        layers += [nn.Linear(widths[at - 1] if at else 12, width, bias=bool(draws.integers(2))), nn.ReLU()]
        layers += [nn.Dropout()] * int(draws.integers(2))
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3)), (3, 2, 2)


def convolutional(draws):
    layers, channels, side = [], 2, 12
    for _ in range(int(draws.integers(1, 4))):
        width, kernel = int(draws.integers(1, 7)), int(draws.choice([1, 3])) if side > 2 else 1
        padding, stride = int(draws.integers(0, 2)) * (kernel // 2), int(draws.choice([1, 1, 2]))
        layers += [nn.Conv2d(channels, width, kernel, stride, padding, bias=bool(draws.integers(4)))]
        layers += [nn.BatchNorm2d(width)] * int(draws.integers(2)) + [nn.ReLU()]
        side, channels = (side + 2 * padding - kernel) // stride + 1, width
        if side >= 4 and draws.integers(2):
            layers += [[nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)][int(draws.integers(3))]]
            side = (side - 1) // 2 + 1 if layers[-1].padding == 1 else side // 2
    layers += [nn.Flatten(), nn.Linear(channels * side * side, 5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers), (2, 12, 12)


def guided(net, shape, **settings):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.add_(torch.rand_like(tensor) - 0.3 * (tensor is module.bias.data))
    return MeanFieldNormal(Classifier(net, 2), torch.rand(2, *shape), torch.zeros(2).long(), init_loc="he", **settings)


def randomly_pruned(guide, draws):
    """Weights kept at random, and whole units of a layer, on either of its sides, gone."""
    keep = {}
    for site in guide.sites:
        shape = guide.loc_scale(site)[0].shape
        keep[site] = torch.from_numpy(draws.random(tuple(shape)) < draws.choice([0.02, 0.1, 0.3, 0.8, 1.0]))
        for axis in range(min(2, len(shape))):
            alive = torch.from_numpy(draws.random(shape[axis]) < draws.choice([0.0, 0.4, 0.8, 1.0]))
            keep[site] &= alive.view([-1 if at == axis else 1 for at in range(len(shape))])
    return guide.pruned(keep)


def reference(network, draw, x):
    """What the plain network computes, every weight in its place."""
    for site, weight in draw.items():
        network.parameter(site).copy_(network.place(site, weight, weight)[0])
    return network.net(x)


@pytest.mark.parametrize("architecture", [dense, convolutional])
@pytest.mark.parametrize("bayesian_bias", [False, True])
def test_the_same_draw_gives_the_same_outputs_whatever_is_pruned(architecture, bayesian_bias):
    shrunk = 0
    for seed in range(30):
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        net, shape = architecture(draws)
        net = bayesian(net, bayesian_bias=bayesian_bias).eval()
        guide, network = randomly_pruned(guided(net, shape), draws), plain(net)
        small = compact(network, guide)
        x = torch.rand(4, *shape)
        for index in range(2):
            draw = guide.draw(index)
            expected = reference(network, draw, x)
            small.set_weights(network)
            torch.testing.assert_close(small.net(small.select(x)), expected, rtol=1e-4, atol=1e-5)
        weights = sum(small.net.get_submodule(layer.path).weight.numel() for layer in small.layers)
        shrunk += weights < sum(guide.loc_scale(site)[0].numel() for site in guide.sites if "weight" in site)
        assert len(small.loc) <= sum(int((guide.loc_scale(site)[1] > 0).sum()) for site in guide.sites)
    assert shrunk > 15


def test_a_residual_network_shrinks_inside_its_branches_alone():
    net = build("resnet18", bayesian_bias=True).eval()
    guide = guided(net, (3, 32, 32))
    keep = {site: torch.ones_like(guide.loc_scale(site)[0], dtype=torch.bool) for site in guide.sites}
    for name in ("block1.conv1", "block2.conv2", "block3.shortcut"):
        keep[f"{name}.weight"][:20] = False
        keep[f"{name}.bias"][:20] = False
    keep["block4.conv2.weight"][:, 7:30] = False
    guide, network = guide.pruned(keep), plain(net)
    small = compact(network, guide)
    shape = {layer.path: list(small.net.get_submodule(layer.path).weight.shape[:2]) for layer in small.layers}
    assert shape["block4.conv1"] == [512 - 23, 256]
    assert shape["block4.conv2"] == [512, 512 - 23]
    assert (shape["block2.conv1"], shape["block2.conv2"]) == ([128, 64], [128, 128])
    x, draw = torch.rand(2, 3, 32, 32), guide.draw(0)
    expected = reference(network, draw, x)
    small.set_weights(network)
    torch.testing.assert_close(small.net(small.select(x)), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_draw_has_the_posteriors_moments_and_is_reproducible():
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    guide = prune(guided(net, (6,), init_scale=0.3), fraction=0.5).guide
    small = compact(plain(net), guide)
    found = []
    for index in range(4000):
        small.draw(index, seed=3)
        found.append(small.weights.clone())
    found = torch.stack(found)
    error = small.scale / 4000**0.5
    assert ((found.mean(0) - small.loc).abs() < 4.5 * error).all()
    torch.testing.assert_close(found.std(0), small.scale, rtol=0.06, atol=0)
    small.draw(17, seed=3)
    torch.testing.assert_close(small.weights, found[17])


def test_a_network_that_lost_every_weight_still_runs():
    net = bayesian(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)))
    guide = guided(net, (1, 8, 8))
    gone = {site: torch.zeros_like(guide.loc_scale(site)[0], dtype=torch.bool) for site in guide.sites}
    small = compact(plain(net), guide.pruned(gone))
    assert len(small.loc) == 0
    small.draw(0)
    torch.testing.assert_close(small.net(torch.rand(2, 1, 8, 8)), net[4].bias.detach().expand(2, 3))


@pytest.mark.parametrize("architecture", [dense, convolutional])
def test_sparse_layers_compute_what_the_dense_ones_do(architecture):
    replaced = 0
    for seed in range(15):
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        net, shape = architecture(draws)
        net = bayesian(net).eval()
        guide = randomly_pruned(guided(net, shape), draws)
        dense_network, sparse_network = compact(plain(net), guide), compact(plain(net), guide)
        for layer in sparse_network.layers:
            module = sparse_network.net.get_submodule(layer.path)
            values = sparse_network.weights[layer.matrix]
            sparse = sparse_layer(module, layer.entries.position, values, module.bias)
            if sparse is not None:
                sparse_network.net.set_submodule(layer.path, sparse)
                replaced += 1
        x = dense_network.select(torch.rand(int(draws.integers(1, 200)), *shape))
        for index in range(2):
            dense_network.draw(index)
            sparse_network.draw(index)
            torch.testing.assert_close(sparse_network.net(x), dense_network.net(x), rtol=1e-4, atol=1e-5)
    assert replaced > 20


def test_either_form_may_be_chosen_and_the_outputs_stay():
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)))
    guide = prune(guided(net, (784,)), fraction=0.97).guide
    small, x = compact(plain(net), guide), torch.rand(300, 784)
    small.draw(5)
    before = small.net(small.select(x))
    chosen = choose_layers(small, len(x))
    assert set(chosen.values()) <= {"dense", "sparse"}
    assert list(chosen) == ["1", "3"]
    torch.testing.assert_close(small.net(small.select(x)), before, rtol=1e-4, atol=1e-5)


def forced(monkeypatch, sparse):
    monkeypatch.setattr("ppl_bnn.prediction.compact.forms.sparse_pays", lambda *run: sparse)
    monkeypatch.setattr("ppl_bnn.prediction.compact.layerwise.sparse_pays", lambda *run: sparse)


@pytest.mark.parametrize("architecture", [dense, convolutional])
def test_chains_of_sparse_layers_compute_what_the_dense_ones_do(architecture, monkeypatch):
    chained = 0
    for seed in range(15):
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        net, shape = architecture(draws)
        guide = randomly_pruned(guided(bayesian(net).eval(), shape), draws)
        expected, small = compact(plain(net), guide), compact(plain(net), guide)
        x = small.select(torch.rand(int(draws.choice([1, 7, 33, 150])), *shape))
        forced(monkeypatch, True)
        assert "sparse" in choose_layers(small, len(x)).values()
        chained += len(small.net.graph.nodes) < len(expected.net.graph.nodes)
        for index in range(2):
            small.draw(index)
            expected.draw(index)
            torch.testing.assert_close(small.net(x), expected.net(x), rtol=1e-4, atol=1e-5)
    assert chained > 10


def test_blocks_of_columns_add_up(monkeypatch):
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(900, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU()))
    guide = prune(guided(net, (900,)), fraction=0.3).guide
    small, expected, x = compact(plain(net), guide), compact(plain(net), guide), torch.randn(70, 900)
    forced(monkeypatch, True)
    choose_layers(small, len(x))
    assert small.net.get_submodule("1").blocks > 2
    torch.testing.assert_close(small.net(small.select(x)), expected.net(expected.select(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"need float32 on a CPU, got torch\.float64"):
        small.net(small.select(x).double())


def test_layerwise_computes_the_same_from_the_same_noise_dense_and_sparse(monkeypatch):
    for seed in range(10):
        torch.manual_seed(seed)
        draws = np.random.default_rng(seed)
        net, shape = dense(draws)
        small = compact(plain(net), randomly_pruned(guided(bayesian(net).eval(), shape, init_scale=0.3), draws))
        x = small.select(torch.randn(int(draws.integers(1, 4)), *shape))
        found = []
        for sparse in (True, False):
            forced(monkeypatch, sparse)
            function = compact_draws(small, len(x))
            found.append(function(x, 37, seed=seed))
            # Noise that is kept is the noise that is made on the way.
            assert torch.equal(found[-1], function.logits(x, function.noise(37, seed), 37))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_without_a_compiler_layers_stay_dense(monkeypatch):
    for module in ("native.normals", "prediction.compact.sparse_layers"):
        monkeypatch.setattr(f"ppl_bnn.{module}.library", lambda *of: None)
    forced(monkeypatch, True)
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)))
    small, x = compact(plain(net), prune(guided(net, (9,)), fraction=0.5).guide), torch.rand(5, 9)
    small.draw(0)
    assert set(choose_layers(small, len(x)).values()) == {"dense"}
    assert compact_draws(small, len(x))(small.select(x), 6).shape == (6, 5, 3)


def test_layerwise_draws_have_the_distribution_of_weight_draws():
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    guide = guided(net, (6,), init_scale=0.3)
    keep = {site: torch.rand(guide.loc_scale(site)[0].shape) < 0.6 for site in guide.sites}
    keep["1.weight"][:3] = False  # constant units, one of them relu(bias) > 0: its noise goes into the next bias
    net[1].bias.data[:3] = torch.tensor([0.7, -0.5, 1.1])
    small = compact(plain(net), guide.pruned(keep))
    assert len(small.layers[1].entries.shift_row) > 0
    x, draws = torch.rand(3, 6), 20_000
    function = compact_draws(small, len(x))
    found = function(small.select(x), draws, seed=1)
    assert found.shape == (draws, 3, 2)
    expected = []
    for index in range(draws // 4):
        small.draw(index)
        expected.append(small.net(small.select(x)))
    expected = torch.stack(expected)
    error = expected.std(0) * (1 / draws + 4 / draws) ** 0.5
    assert ((found.mean(0) - expected.mean(0)).abs() < 4.5 * error).all()
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.06, atol=0)
    torch.testing.assert_close(found[:, 1].T.cov(), expected[:, 1].T.cov(), rtol=0.15, atol=0.02)
    assert torch.equal(found, function(small.select(x), draws, seed=1))


def test_layerwise_refuses_convolutions():
    net = bayesian(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 2)))
    small = compact(plain(net), guided(net, (1, 8, 8)))
    with pytest.raises(ValueError, match="Linear layers and ReLU alone, the network has 0"):
        compact_draws(small, 2)


OTHER = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 200)), {}),
    "ConvTranspose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Flatten(), nn.Linear(32, 200)), {}),
    "LSTM": (lambda: Recurrent(), {}),
    "biases alone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 200)), {"select": "*.bias"}),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 200)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("name", OTHER)
def test_a_network_with_other_random_parameters_has_no_compact_form_and_its_draws_stay(name):
    make, how = OTHER[name]
    model = Classifier(bayesian(make(), **how), 3)
    x, y = torch.randn(3, 2, 6), torch.zeros(3).long()
    guide = prune(MeanFieldNormal(model, x, y, init_loc=0.5, init_scale=0.3), fraction=0.9).guide
    found = predict(model, guide, x, y, num_samples=3, method="draws", progress=False)
    for index, probs in enumerate(found.means):
        with given(model, guide.draw(index)):
            torch.testing.assert_close(probs, model.net(x).softmax(-1).detach(), rtol=1e-5, atol=1e-6)
    whole = predict(model, guide, x, num_samples=5, progress=False).mean
    torch.testing.assert_close(predictor(model, guide, x, num_samples=5)(x)[0].double(), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="parameters are of Linear and Conv2d layers"):
        predict(model, guide, x, y, compact="yes", method="draws", progress=False)
