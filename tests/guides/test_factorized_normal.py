"""The guide's distribution and its arithmetic, in C, in blocks and compiled, against torch's own."""

import math
from contextlib import nullcontext

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import kl_divergence

from ppl_bnn.guides.estimators.groups import _Flipped
from ppl_bnn.guides.normal import SMALLEST_SCALE, FactorizedNormal, inverse_scale, softplus, standard_normal
from ppl_bnn.native import arithmetic as arithmetic_module
from ppl_bnn.native.arithmetic import Operation, compiled_arithmetic


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
        monkeypatch.setattr(arithmetic_module, "library", lambda *of: None)
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
        operation = Operation(both, None, tensors=4)
        operation(found := torch.empty_like(u), back := torch.empty_like(u), u, scale.float())
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
