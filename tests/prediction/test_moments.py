import pytest
import torch
from small_posteriors import X, Y, dense
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, metrics, predict
from ppl_bnn.prediction.moments import larger, moment_network, moment_predictive, softmax_moments, standard_normals
from ppl_bnn.prediction.plain import plain


def guided(net, x, scale=0.2):
    net = bayesian(net, bayesian_bias=True)
    return net, MeanFieldNormal(net, x, init_loc=0.4, init_scale=scale)


def draw(net, guide, x, draws):
    """The logits [draws, N, ...] of the plain network, all draws at once."""
    found = plain(net)
    weights = {}
    for site in guide.sites:
        loc, scale = (part.detach() for part in guide.loc_scale(site))
        weights[site] = found.place(site, loc + scale * torch.randn(draws, *loc.shape), scale)[0]
    return torch.func.vmap(lambda drawn: torch.func.functional_call(found.net, drawn, (x,)))(weights)


def by_draws(net, guide, x, draws=20_000):
    logits = draw(net, guide, x, draws)
    return logits.mean(0), logits.var(0)


def agree(found, draws, samples):
    """Mean within 5 standard errors; variance within 5 of those of a Normal's, doubled for heavier tails."""
    mean, variance = draws
    assert ((found[0] - mean).abs() <= 5 * (variance / samples).sqrt() + 1e-6).all()
    torch.testing.assert_close(found[1], variance, rtol=10 * (2 / samples) ** 0.5, atol=1e-9)


def test_the_larger_of_two_normals():
    mean, other_mean = torch.meshgrid(torch.linspace(-3, 3, 7), torch.linspace(-2, 2, 5), indexing="ij")
    noise = torch.randn(2, 400_000, 1, 1)
    draws = torch.maximum(mean + 0.7 * noise[0], other_mean + 1.3 * noise[1])
    agree(larger(mean, torch.tensor(0.49), other_mean, torch.tensor(1.69)), (draws.mean(0), draws.var(0)), 400_000)


def test_a_rectified_normal_far_out_and_certain():
    mean = torch.tensor([-50.0, 50.0, -2.0, 2.0, 0.0, 1e4], dtype=torch.float32)
    variance = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1e-4])
    found, spread = larger(mean, variance, 0.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 50.0, 0.0, 2.0, 0.0, 1e4]), rtol=0, atol=1e-11)
    torch.testing.assert_close(spread, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1e-4]), atol=1e-9, rtol=1e-6)
    assert spread[2:5].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("layer", "tolerance"),
    [
        (nn.ReLU(), 0.03),
        (nn.Flatten(), 0.03),
        (nn.ZeroPad2d(1), 0.03),
        (nn.AvgPool2d(2), 0.03),
        (nn.AvgPool2d(3, 2, 1), 0.03),
        (nn.AdaptiveAvgPool2d(1), 0.03),
        (nn.BatchNorm2d(3), 0.03),
        # Clark's formulas take the larger of two for a Normal again.
        (nn.MaxPool2d(2), 0.05),
        (nn.MaxPool2d(3, 2, 1), 0.1),
    ],
    ids=str,
)
def test_a_layer_on_independent_normals(layer, tolerance):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Unflatten(1, (3, 4, 4)), layer)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_var.add_(torch.rand(3))
        layer.bias.data.add_(1)
    x = torch.eye(48)[:1]
    net, guide = guided(net, x, scale=0.5)
    steps = moment_network(net, guide)
    # Independent by construction: each unit of the dense layer has its own weights.
    right_mean, right_variance = by_draws(net, guide, x, 5000)
    with torch.no_grad():
        mean, variance = steps(x)
    assert float(((mean - right_mean).abs() / (right_variance.sqrt() + 1e-6)).max()) < 0.06 + tolerance
    torch.testing.assert_close(variance.mean(), right_variance.mean(), rtol=tolerance, atol=0)


def test_a_linear_network_is_exact():
    net, guide = guided(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.rand(1, 4))
    x = torch.randn(5, 4)
    with torch.no_grad():
        mean, variance = moment_network(net, guide)(x)
        (w1, s1), (b1, t1), (w2, s2), (b2, t2) = (
            guide.loc_scale(site) for site in ("0.weight", "0.bias", "1.weight", "1.bias")
        )
        hidden, spread = x @ w1.T + b1, x**2 @ s1.T**2 + t1**2
        torch.testing.assert_close(mean, hidden @ w2.T + b2)
        torch.testing.assert_close(variance, hidden**2 @ s2.T**2 + spread @ (w2.T**2 + s2.T**2) + t2**2)
    agree((mean, variance), by_draws(net, guide, x), 20_000)


def test_a_convolution_is_exact_where_its_input_is_certain():
    x = torch.rand(2, 3, 6, 6)
    net, guide = guided(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1)), x)
    with torch.no_grad():
        agree(moment_network(net, guide)(x), by_draws(net, guide, x), 20_000)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm, self.last = (
            nn.Linear(4, 6), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x) + self.second(x))))


def test_a_sum_of_branches_with_batch_norm_behind_it():
    net = Residual()
    for tensor in (net.norm.running_mean, net.norm.running_var, net.norm.weight.data, net.norm.bias.data):
        tensor.add_(torch.rand(6))
    x = torch.rand(3, 4)
    net, guide = guided(net, x)
    with torch.no_grad():
        agree(moment_network(net, guide)(x), by_draws(net, guide, x), 20_000)


@pytest.mark.parametrize("name", ["bnn-fc", "lenet", "resnet18"])
def test_without_noise_it_is_the_deterministic_network(name, monkeypatch):
    x = torch.rand(2, *((3, 32, 32) if name == "resnet18" else (1, 28, 28)))
    net = build(name)
    guide = MeanFieldNormal(Classifier(net, 2), x, torch.zeros(2, dtype=torch.long), init_loc="he")
    locs = {site: guide.loc_scale(site)[0].detach() for site in guide.sites}
    monkeypatch.setattr(guide, "loc_scale", lambda site: (locs[site], torch.zeros_like(locs[site])))
    expected = plain(net)
    for site, loc in locs.items():
        expected.parameter(site).copy_(expected.place(site, loc, loc)[0])
    with torch.no_grad():
        mean, variance = moment_network(net, guide)(x)
        torch.testing.assert_close(mean, expected.net(x), rtol=0, atol=0)
    assert not variance.any()


def test_a_deterministic_network_has_no_variance():
    net = build("bnn-fc", deterministic=True)
    x = torch.rand(2, 1, 28, 28)
    mean, variance = moment_network(net, MeanFieldNormal(net, x))(x)
    torch.testing.assert_close(mean, net(x).detach())
    assert variance.shape == (2, 10)
    assert not variance.any()


@pytest.mark.parametrize(
    ("layer", "named"),
    [(nn.Tanh(), r"layer '1' \(Tanh"), (nn.MaxPool2d(2, ceil_mode=True), "layer '1'"), (nn.LPPool2d(2, 2), "LPPool2d")],
)
def test_a_layer_it_cannot_do_is_refused_by_name(layer, named):
    x = torch.rand(1, 1, 6, 6)
    net, guide = guided(nn.Sequential(nn.Conv2d(1, 2, 3), layer), x)
    with pytest.raises(ValueError, match=named):
        moment_network(net, guide)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda one, other: one * other, "mul"),
        (lambda one, other: one + 1.0, "add"),
        (lambda one, other: torch.add(one, other, alpha=2), "add"),
    ],
)
def test_an_operation_it_cannot_do_is_refused_by_name(operation, name):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return operation(self.linear(x), self.linear(x))

    net, guide = guided(Product(), torch.rand(1, 3))
    with pytest.raises(ValueError, match=f"'{name}'"):
        moment_network(net, guide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_has_no_part_in_the_larger(dtype):
    one = torch.ones(1, dtype=dtype)
    mean, variance = larger(-1e30 * one, 0 * one, 0.3 * one, one)
    torch.testing.assert_close(mean, 0.3 * one, rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, one)


@pytest.mark.parametrize(("count", "distance"), [(32, 0.03), (1024, 0.005)])
def test_the_softmax_of_normals(count, distance):
    mean = 3 * torch.randn(50, 6)
    variance = 4 * torch.rand(50, 6)
    draws = (mean + variance.sqrt() * torch.randn(20_000, 50, 6)).softmax(-1)
    probs, entropy = softmax_moments(mean, variance, standard_normals(6, count))
    assert (probs - draws.mean(0)).abs().sum(-1).mean() / 2 < distance
    torch.testing.assert_close(probs.sum(-1), torch.ones(50))
    assert (entropy - metrics.entropy(draws).mean(0)).abs().mean() < 2 * distance


def test_the_predictive_of_one_hidden_layer_is_the_draws():
    x = torch.rand(20, 5)
    net, guide = guided(nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 4)), x, scale=0.1)
    probs = draw(net, guide, x, 5000).softmax(-1)
    found, entropy = moment_predictive(net, guide, x, batch_size=7)
    assert float((found - probs.mean(0)).abs().sum(-1).mean()) / 2 < 0.02
    torch.testing.assert_close(entropy, metrics.entropy(probs).mean(0), rtol=0.05, atol=0.02)


def test_moments_are_a_predictive_without_draws():
    net, guide = dense(0.1)
    found = predict(net, guide, X, Y, num_samples=50, method="moments", keep=torch.tensor([3]), progress=False)
    probs, entropy = moment_predictive(net, guide, X)
    torch.testing.assert_close(found.mean_probs, probs.double())
    torch.testing.assert_close(found.mean_entropy, entropy.double())
    torch.testing.assert_close(found.probs, probs[None, [3]])
    assert found.method == "moments"
    assert found.draws.tolist() == [0] * len(X)
    assert found.mc_error.isnan().all()
    assert found.summary()["nll"] == pytest.approx(-probs[range(len(X)), Y].log().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"labels y are from 3 to 5; expected integer class labels 0..2"):
        predict(net, guide, X, Y + 3, method="moments", progress=False)
