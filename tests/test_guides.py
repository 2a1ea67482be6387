"""The guide and the estimators, against closed forms and against independent weight draws."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

from ppl_bnn import Classifier, Flipout, LocalReparameterization, MeanFieldNormal, bayesian, build
from ppl_bnn.guides import ESTIMATORS, GroupedFlips
from ppl_bnn.guides import arithmetic as arithmetic_module
from ppl_bnn.guides.arithmetic import arithmetic, compiled_arithmetic
from ppl_bnn.guides.groups import _Flipped
from ppl_bnn.guides.normal import SMALLEST_SCALE, FactorizedNormal, inverse_scale, softplus, standard_normal

X, Y = torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2])


def layer_and_guide(layer, x, *, scale=0.3):
    net = bayesian(nn.Sequential(layer)).double()
    guide = MeanFieldNormal(net, x, init_loc=0.5, init_scale=scale, init_jitter=0.5)
    return net, guide


def outputs(net, guide, x, estimator, draws):
    """One training-style forward pass a draw: the guide is sampled and the network replays it."""
    found = []
    with torch.no_grad():
        for _ in range(draws):
            with ESTIMATORS[estimator]():
                trace = poutine.trace(guide).get_trace(x)
                found.append(poutine.replay(net, trace=trace)(x))
    return torch.stack(found)


LINEAR = (nn.Linear(5, 4), torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double())
CONV = (
    nn.Conv2d(2, 3, 3, padding=1),
    torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(2)).double(),
)

GROUPED = (
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3)).double(),
)


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
    with pytest.raises(ValueError, match="'y' has support"):
        MeanFieldNormal(model, X)
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


# Local reparameterization drops a convolution's covariances over space, so only its linear layer has to agree.
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


@pytest.mark.parametrize(
    ("estimator", "layer", "x"),
    [("flipout", *LINEAR), ("flipout", *CONV), ("groups", *LINEAR), ("groups", *CONV), ("local", *LINEAR)],
    ids=["flipout-linear", "flipout-conv", "groups-linear", "groups-conv", "local-linear"],
)
def test_gradients_have_the_plain_estimators_mean(estimator, layer, x):
    net, guide = layer_and_guide(layer, x)
    target = torch.randn_like(next(iter(outputs(net, guide, x, "plain", 1))))
    parameters = list(guide.parameters())

    def gradients(name, draws=4000):
        found = []
        for _ in range(draws):
            with ESTIMATORS[name]():
                trace = poutine.trace(guide).get_trace(x)
                y = poutine.replay(net, trace=trace)(x)
            # A smooth loss that is not quadratic, so that the noise matters.
            loss = F.softplus(y - target).sum()
            found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
        return torch.stack(found)

    plain, other = gradients("plain"), gradients(estimator)
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


def test_the_guides_distribution_is_an_independent_normal():
    u = torch.linspace(-20, 30, 60).double().view(3, 20).requires_grad_()
    loc = torch.randn(3, 20).double().requires_grad_()
    q = FactorizedNormal(loc, u)
    scale = F.softplus(u, threshold=1e9) + SMALLEST_SCALE
    reference = dist.Normal(loc, scale).to_event(2)
    torch.testing.assert_close(q.scale, scale)
    torch.testing.assert_close(inverse_scale(q.scale.detach()), u.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(q.entropy(), reference.entropy())
    value = torch.randn(3, 20).double()
    torch.testing.assert_close(q.log_prob(value), reference.log_prob(value))
    weights = torch.randn(3, 20).double()
    expected = torch.autograd.grad((scale * weights).sum(), u)[0]
    torch.testing.assert_close(torch.autograd.grad((q.scale * weights).sum(), u)[0], expected)


@pytest.fixture(params=["C", "whole", "blocks", "compiled"])
def way(request, monkeypatch):
    """How arithmetic runs: a context."""
    if request.param != "C":
        monkeypatch.setattr(arithmetic_module, "library", lambda source: None)
    if request.param == "blocks":
        monkeypatch.setattr(arithmetic_module, "_BLOCK", 20)
    return compiled_arithmetic if request.param == "compiled" else nullcontext


@pytest.mark.parametrize("prior_scale", [0.5, torch.rand(4, 6, 3, 3) + 0.5], ids=["scalar", "full"])
def test_the_kl_and_its_gradient_are_torchs(prior_scale, way):
    prior = dist.Normal(0.3, prior_scale)
    prior = (prior if prior.batch_shape else prior.expand([4, 6, 3, 3])).to_event(4)
    loc, u = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3) - 3
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [part.contiguous(memory_format=layout).requires_grad_() for part in (loc, u)]
        scale = F.softplus(leaves[1]) + SMALLEST_SCALE
        expected = kl_divergence(dist.Normal(leaves[0], scale).to_event(4), prior)
        with way():
            found = kl_divergence(FactorizedNormal(*leaves), prior)
            gradients = torch.autograd.grad(2 * found, leaves)
        torch.testing.assert_close(found, expected)
        # The compiler's sigmoid has fewer digits.
        close = {"rtol": 1e-4, "atol": 1e-6} if way is compiled_arithmetic else {}
        for one, other in zip(gradients, torch.autograd.grad(2 * expected, leaves), strict=True):
            torch.testing.assert_close(one, other, **close)


def test_the_scale_and_its_inverse_keep_their_digits(way):
    u = torch.linspace(-14, 12, 1001)
    scale = F.softplus(u.double(), threshold=1e9) + SMALLEST_SCALE

    def both(found, back, u, scale):
        found.copy_(softplus(u))
        back.copy_(inverse_scale(scale))

    with way():
        arithmetic(both)(found := torch.empty_like(u), back := torch.empty_like(u), u, scale.float())
    torch.testing.assert_close(found.double(), scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(F.softplus(back.double()) + SMALLEST_SCALE, scale, rtol=3e-6, atol=0)


@pytest.mark.parametrize("prior_loc", [0.0, 0.7])
def test_a_draw_brings_its_kl_and_entropy_and_their_gradients_are_torchs(prior_loc, way):
    prior = dist.Normal(prior_loc, 0.5).expand([4, 6, 3, 3]).to_event(4)
    loc, u = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3) - 3
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [part.contiguous(memory_format=layout).requires_grad_() for part in (loc, u)]
        target = torch.randn_like(leaves[0])

        def objective(draw, kl, entropy, target=target):
            return (draw - target).square().sum() + 0.3 * kl + 0.1 * entropy

        torch.manual_seed(1)
        scale = F.softplus(leaves[1]) + SMALLEST_SCALE
        reference = dist.Normal(leaves[0], scale).to_event(4)
        noise = standard_normal(leaves[0])
        expected = objective(leaves[0] + scale * noise, kl_divergence(reference, prior), reference.entropy())
        torch.manual_seed(1)
        with way():
            q = FactorizedNormal(*leaves)
            found = objective(q.rsample(), kl_divergence(q, prior), q.entropy())
            gradients = torch.autograd.grad(found, leaves)
        torch.testing.assert_close(found, expected)
        close = {"rtol": 1e-4, "atol": 1e-5} if way is compiled_arithmetic else {}
        for one, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_c_code_is_exact_to_rounding_whatever_the_size_and_the_number_of_threads(layout):
    # 37 * 41 * 9 weights end within a chunk and within a vector of the processor's.
    loc, u = torch.randn(37, 41, 3, 3), torch.linspace(-15, 12, 37 * 41 * 9).view(37, 41, 3, 3)
    leaves = [part.contiguous(memory_format=layout).requires_grad_() for part in (loc, u)]
    weight, threads, found = torch.randn_like(leaves[0]), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        q = FactorizedNormal(*leaves)
        draw, sums = q.rsample(), q.sums()
        found.append((draw, sums, *torch.autograd.grad((draw * weight).sum() + sums @ sums.new([0.01, 0.1]), leaves)))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    torch.manual_seed(5)
    noise = standard_normal(leaves[0]).double()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scale = F.softplus(exact[1], threshold=1e9) + SMALLEST_SCALE
    draw = exact[0] + scale * noise
    sums = torch.stack(((exact[0].square() + scale.square()).sum(), scale.log().sum()))
    gradients = torch.autograd.grad((draw * weight).sum() + sums @ sums.new([0.01, 0.1]), exact)
    for one, other in zip(found[0], (draw, sums, *gradients), strict=True):
        assert one.stride() == leaves[0].stride() or one.dim() == 1
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(FactorizedNormal(*leaves).scale.double(), scale, rtol=5e-7, atol=0)


def test_a_site_of_one_number_has_the_gradients_of_its_formula():
    leaves = [torch.tensor(0.3).requires_grad_(), torch.tensor(-2.0).requires_grad_()]
    prior = dist.Normal(0.0, 1.0)
    found = torch.autograd.grad(kl_divergence(FactorizedNormal(*leaves), prior), leaves)
    scale = F.softplus(leaves[1]) + SMALLEST_SCALE
    expected = torch.autograd.grad(kl_divergence(dist.Normal(leaves[0], scale), prior), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_c_code_passes_on_what_is_not_finite():
    loc, u = torch.randn(5, 7), torch.randn(5, 7)
    for which, value in ((0, math.nan), (1, math.nan), (0, math.inf), (1, math.inf)):
        leaves = [loc.clone(), u.clone()]
        leaves[which][2, 3] = value
        q = FactorizedNormal(*(leaf.requires_grad_() for leaf in leaves))
        draw = q.rsample()
        assert int(draw.isfinite().logical_not().sum()) == 1
        assert not kl_divergence(q, dist.Normal(0.0, 1.0).expand([5, 7]).to_event(2)).isfinite()


def test_sums_taken_without_gradients_are_not_kept_for_a_kl_that_has_them():
    leaves = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    q = FactorizedNormal(*leaves)
    q.sample()
    assert kl_divergence(q, dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2)).requires_grad


def test_flipped_weights_have_the_gradients_of_their_formula(way):
    weight, loc = (
        torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    flips = [torch.randn(4, 6, 1, 1).sign(), torch.randn(4, 6, 1, 1).sign()]
    noise = weight - loc
    expected = [loc - noise, *(loc + sign * flip * noise for flip in flips for sign in (1, -1))]
    with way():
        found = _Flipped.apply(weight, loc, *flips)
        targets = [torch.randn_like(part) for part in found]
        gradients = torch.autograd.grad(found, (weight, loc), targets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(gradients, torch.autograd.grad(expected, (weight, loc), targets), strict=True):
        torch.testing.assert_close(one, other)


def test_noise_is_standard_normal_and_the_same_for_any_number_of_threads():
    like = torch.empty(600, 700, 2, 2).contiguous(memory_format=torch.channels_last)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(3)
        found.append(standard_normal(like))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], standard_normal(like))
    flat = found[0].permute(0, 2, 3, 1).flatten().double()
    n = flat.numel()
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # No chunk repeats another, and neighbouring chunks are uncorrelated.
    chunks = flat[: 6 * 2**18].view(6, -1)
    correlation = (chunks @ chunks.T / 2**18 - torch.eye(6)).abs().max()
    assert correlation < 0.02


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
        with pytest.raises(ValueError, match="'w' is not the weight of a Bayesian layer"):
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
