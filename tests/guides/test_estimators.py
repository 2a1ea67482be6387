"""The estimators, against closed forms and against independent weight draws."""

import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from estimator_outputs import CONV, GROUPED, LINEAR, layer_and_guide, outputs
from pyro import poutine
from torch import nn

from ppl_bnn import Flipout, LocalReparameterization, MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS, GroupedFlips
from ppl_bnn.models.random_network import point_parameters


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV, GROUPED], ids=["linear", "conv", "grouped-conv"])
def test_per_example_mean_and_variance_are_those_of_independent_weight_draws(estimator, layer, x):
    net, guide = layer_and_guide(layer, x)
    loc, scale = (value.detach() for value in guide.loc_scale("0.weight"))
    function = F.conv2d if layer.weight.dim() == 4 else F.linear
    settings = (None, 1, 1, 1, layer.groups) if layer.weight.dim() == 4 else ()
    bias = net[0]._parameters["bias"].detach().view(-1, *[1] * (x.dim() - 2))
    mean = function(x, loc, *settings) + bias
    variance = function(x.square(), scale.square(), *settings)
    draws = 6000
    found = outputs(net, guide, x, estimator, draws)
    z_mean = (found.mean(0) - mean) / (variance / draws).sqrt()
    z_variance = (found.var(0) / variance - 1) / math.sqrt(2 / draws)
    # The largest of about 300 standard normal scores stays under 5 but for one case in ten thousand.
    assert z_mean.abs().max() < 5
    assert z_variance.abs().max() < 5


@pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV], ids=["linear", "conv"])
def test_flipout_decorrelates_examples_and_plain_does_not(layer, x):
    same = x[:1].expand(2, *x.shape[1:])
    net, guide = layer_and_guide(layer, same)

    def correlation(estimator):
        first, second = outputs(net, guide, same, estimator, 3000).flatten(2).unbind(1)
        first, second = first - first.mean(0), second - second.mean(0)
        return ((first * second).mean(0) / (first.std(0) * second.std(0))).mean().item()

    assert correlation("plain") == pytest.approx(1, abs=0.01)
    assert abs(correlation("flipout")) < 0.05
    assert abs(correlation("flipout-bfloat16")) < 0.05


def test_flipout_signs_are_plus_minus_one_and_constant_over_space():
    x = torch.ones(8, 2, 7, 7).double()
    layer = nn.Conv2d(2, 3, 1, bias=False)
    net, guide = layer_and_guide(layer, x)
    found = outputs(net, guide, x, "flipout", 1)[0]
    # On a constant image a 1x1 convolution is constant over space, unless the signs change from pixel to pixel.
    torch.testing.assert_close(found, found[:, :, :1, :1].expand_as(found))
    # With one input channel the perturbation is sign_in * sign_out * (w - loc): its size is the same in all examples.
    x = torch.ones(64, 1).double()
    net, guide = layer_and_guide(nn.Linear(1, 1, bias=False), x)
    noise = outputs(net, guide, x, "flipout", 1)[0] - guide.loc_scale("0.weight")[0].detach()
    torch.testing.assert_close(noise.abs(), noise.abs()[:1].expand_as(noise))
    assert {-1.0, 1.0} == set(noise.sign().flatten().tolist())


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "conv"])
def test_flipout_draws_a_sign_for_every_input_and_every_output(convolution):
    def noise(inputs, outputs_):
        shape = (64, inputs, 1, 1) if convolution else (64, inputs)
        layer = nn.Conv2d(inputs, outputs_, 1, bias=False) if convolution else nn.Linear(inputs, outputs_, bias=False)
        x = torch.ones(shape).double()
        net, guide = layer_and_guide(layer, x)
        found = outputs(net, guide, x, "flipout", 1)[0].flatten(1)
        return found - guide.loc_scale("0.weight")[0].detach().flatten(1).sum(1)

    # Two outputs of one input: without signs of their own they would flip together in every example.
    both = noise(1, 2)
    assert {-1.0, 1.0} == set((both[:, 0] * both[:, 1]).sign().tolist())
    # One output of two inputs: without signs of their own the two perturbations would always add.
    assert len({round(size, 9) for size in noise(2, 1).abs().flatten().tolist()}) == 2


@pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV, GROUPED], ids=["linear", "conv", "grouped-conv"])
def test_flipout_with_noise_in_half_precision_is_flipout_to_a_hundredth_of_the_noise(layer, x):
    net, guide = layer_and_guide(layer, x)
    parameters = [*guide.parameters(), *point_parameters(net).values()]

    def found(estimator):
        # The same draws and the same signs for both.
        torch.manual_seed(4)
        with ESTIMATORS[estimator]():
            trace = poutine.trace(guide).get_trace(x)
            y = poutine.replay(net, trace=trace)(x)
        assert y.dtype == torch.float64
        return y, *torch.autograd.grad(F.softplus(y).sum(), parameters)

    with torch.no_grad():
        function = F.conv2d if x.dim() == 4 else F.linear
        settings = (1, 1, 1, layer.groups) if x.dim() == 4 else ()
        mean = function(x, guide.loc_scale("0.weight")[0], net[0]._parameters["bias"], *settings)
    (exact, *gradients), (half, *half_gradients) = found("flipout"), found("flipout-bfloat16")
    assert 0 < (half - exact).norm() < 0.01 * (exact - mean).norm()
    for one, other in zip(gradients, half_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0.01 * float(one.norm()))


def gradients(net, guide, x, target, estimator, draws=4000):
    """Gradients [draws, number of the guide's numbers] of a smooth loss that is not quadratic, so the noise matters."""
    parameters, found = list(guide.parameters()), []
    for _ in range(draws):
        with ESTIMATORS[estimator]():
            trace = poutine.trace(guide).get_trace(x)
            y = poutine.replay(net, trace=trace)(x)
        loss = F.softplus(y - target).sum()
        found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


@cache
def plain_gradients(name):
    """A layer, its guide, inputs and target, and the plain estimator's gradients, which several are compared with."""
    layer, x = {"linear": LINEAR, "conv": CONV}[name]
    net, guide = layer_and_guide(layer, x)
    target = torch.randn_like(next(iter(outputs(net, guide, x, "plain", 1))))
    return (net, guide, x, target), gradients(net, guide, x, target, "plain")


# Local reparameterization drops a convolution's covariances over space, so only its linear layer has to agree.
@pytest.mark.parametrize(
    ("estimator", "layer"),
    [
        *(("flipout", "linear"), ("flipout", "conv"), ("flipout-bfloat16", "conv")),
        *(("groups", "linear"), ("groups", "conv"), ("local", "linear")),
    ],
)
def test_gradients_have_the_plain_estimators_mean(estimator, layer):
    given, plain = plain_gradients(layer)
    other = gradients(*given, estimator)
    error = ((plain.var(0) + other.var(0)) / len(plain)).sqrt()
    assert ((plain.mean(0) - other.mean(0)) / error).abs().max() < 5
    assert plain.mean(0).abs().max() > 0.1


@pytest.mark.parametrize(("layer", "x"), [LINEAR, CONV], ids=["linear", "conv"])
def test_groups_share_noise_pairs_oppose_and_other_pairs_are_uncorrelated(layer, x):
    same = x[:1].expand(8, *x.shape[1:])
    net, guide = layer_and_guide(layer, same)
    found = outputs(net, guide, same, "groups", 4000).flatten(2)
    mean = F.conv2d if layer.weight.dim() == 4 else F.linear
    loc = guide.loc_scale("0.weight")[0].detach()
    settings = (None, 1, 1) if layer.weight.dim() == 4 else ()
    bias = net[0]._parameters["bias"].detach().view(-1, *[1] * (x.dim() - 2))
    noise = found - (mean(same[:1], loc, *settings) + bias).flatten(1)
    # Four groups of two: 0 0 1 1 2 2 3 3.
    torch.testing.assert_close(noise[:, 0], noise[:, 1])
    torch.testing.assert_close(noise[:, 0], -noise[:, 2])
    torch.testing.assert_close(noise[:, 4], -noise[:, 6])
    products = (noise[:, 0] * noise[:, 4]).mean(0)
    z = products / ((noise[:, 0] * noise[:, 4]).std(0) / math.sqrt(len(noise)))
    assert z.abs().max() < 5
    # The second pair is not the first in disguise: with one sign for all weights it would be + or - the same.
    assert (noise[:, 0].abs() - noise[:, 4].abs()).abs().max() > 0.1


def test_groups_take_batches_of_any_size():
    for examples in (1, 2, 3, 5):
        x = LINEAR[1][:examples]
        net, guide = layer_and_guide(LINEAR[0], x)
        assert outputs(net, guide, x, "groups", 1).shape == (1, examples, 4)
    with pytest.raises(ValueError, match="at least 2"):
        GroupedFlips(1)


def test_flipout_leaves_weights_that_are_not_the_guides_alone():
    x = LINEAR[1]
    net, _ = layer_and_guide(nn.Linear(5, 4), x)
    weights = {"0.weight": torch.randn(4, 5).double()}
    with Flipout(), poutine.condition(data=weights):
        torch.testing.assert_close(net(x), F.linear(x, weights["0.weight"], net[0]._parameters["bias"]))


def test_local_refuses_a_weight_that_no_layer_uses():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
        pyro.sample("y", dist.Normal((x @ w).squeeze(-1), 1.0).to_event(1), obs=y)

    x, y = torch.zeros(4, 3), torch.zeros(4)
    guide = MeanFieldNormal(model, x, y)
    with LocalReparameterization():
        poutine.trace(guide).get_trace(x, y)
        with pytest.raises(ValueError, match="'w' is no random parameter of a bayesian network"):
            poutine.trace(guide).get_trace(x, y)


def test_local_has_finite_gradients_where_nothing_varies():
    x = torch.zeros(2, 5).double()
    net, guide = layer_and_guide(nn.Linear(5, 4), x)
    with LocalReparameterization():
        trace = poutine.trace(guide).get_trace(x)
        poutine.replay(net, trace=trace)(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in guide.parameters())


def test_a_random_bias_is_sampled_under_every_estimator():
    net = bayesian(nn.Sequential(nn.Linear(3, 2)), bayesian_bias=True)
    x = torch.zeros(4, 3)
    guide = MeanFieldNormal(net, x)
    for estimator in ESTIMATORS:
        found = outputs(net, guide, x, estimator, 50)
        assert found.std(0).min() > 0


def test_flipout_gives_a_layer_that_is_used_twice_one_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5, bias=False)

        def forward(self, x):
            return self.layer(x) - self.layer(x)

    net = bayesian(Twice()).double()
    guide = MeanFieldNormal(net, LINEAR[1], init_scale=0.3)
    torch.testing.assert_close(outputs(net, guide, LINEAR[1], "flipout", 3), torch.zeros(3, 6, 5).double())
    # Each step has signs of its own.
    net, guide = layer_and_guide(nn.Linear(1, 1, bias=False), torch.ones(64, 1).double())
    found = outputs(net, guide, torch.ones(64, 1).double(), "flipout", 8) - guide.loc_scale("0.weight")[0].detach()
    assert len({tuple(draw.sign().flatten().tolist()) for draw in found}) == 8
