"""The arithmetic of a step over all weights at once: C and torch agree, and both are what autograd makes of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from ppl_bnn.native.flat import DRAW, FLIPPED, VARIANCE, FlatArithmetic, Gradients
from ppl_bnn.native.flat_agreement import agrees
from ppl_bnn.native.normals import normals
from ppl_bnn.native.weights import SMALLEST_SCALE

COUNTS, GROUPS = (5000, 3, 1, 4097), (0, 0, 1, 2)
PRIORS = {"centres": (0.3, 0.0, -1.0), "precisions": (4.0, 0.0, 0.25), "logs": (1.0, 0.0, 1.0)}
KINDS = {"draw": [DRAW] * 4, "mixed": [DRAW, VARIANCE, VARIANCE, DRAW], "flipped": [FLIPPED, DRAW, FLIPPED, FLIPPED]}
COPIES = {"draw": 1, "mixed": 1, "flipped": 5}
SEEDS = (7, 1, 2**63 - 1, 0)


@pytest.fixture(params=["C", "torch"])
def native(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(FlatArithmetic, "native", None)
    elif made("draw").native is None:
        pytest.skip("there is no C code here")
    return request.param == "C"


def made(kinds, dtype=torch.float32):
    one = FlatArithmetic(
        COUNTS, GROUPS, torch.empty(0, dtype=dtype), kinds=KINDS[kinds], copies=COPIES[kinds], **PRIORS
    )
    torch.manual_seed(3)
    one.loc.copy_(torch.randn(len(one.loc)))
    one.u.copy_(3 * torch.randn(len(one.u)) - 2)
    one.flips.copy_(torch.randint(2, one.flips.shape) * 2 - 1)
    return one


def expected(one, k):
    """Values, sums and, of a weighted sum of the values, gradients, by autograd in double precision."""
    loc, u = (part.double().requires_grad_() for part in (one.loc, one.u))
    noise = torch.cat(
        [normals(seed, count, torch.empty(0)) for seed, count in zip(SEEDS, COUNTS, strict=True)]
    ).double()
    scale = F.softplus(u) + SMALLEST_SCALE
    away = scale * noise
    copies = [loc + away, loc - away]
    for flip in one.flips.double():
        copies += [loc + flip * away, loc - flip * away]
    values = []
    for copy in range(len(one.values)):
        parts = []
        for span, kind in zip(one.spans, one._kinds, strict=True):
            zeros = torch.zeros_like(loc[span])
            first = scale[span].square() if kind == VARIANCE else copies[0][span]
            parts.append(first if copy == 0 else copies[copy][span] if kind == FLIPPED else zeros)
        values.append(torch.cat(parts))
    weights = torch.linspace(-1, 1, loc.numel() * len(values), dtype=torch.double).cos().view(len(values), -1)
    sums, kl = [], 0.0
    for group, (centre, precision, log) in enumerate(zip(*PRIORS.values(), strict=True)):
        at = torch.cat([torch.arange(s.start, s.stop) for s, g in zip(one.spans, GROUPS, strict=True) if g == group])
        squares, logs = (loc[at] - centre).square().sum() + scale[at].square().sum(), scale[at].log().sum()
        sums += [squares, logs]
        kl = kl + precision / 2 * squares - log * logs
    extra = (loc * loc.detach().sin()).sum() + (u[one.spans[1]] * 3).sum()
    to = torch.autograd.grad((torch.stack(values) * weights).sum() + k * kl + extra, (loc, u))
    found = {}
    for site, (span, kind) in enumerate(zip(one.spans, one._kinds, strict=True)):
        of_copies = [weights[copy, span].float() for copy in range(len(values))]
        by_u = torch.full_like(of_copies[0], 3) if site == 1 else None
        found[site] = Gradients(of_copies if kind == FLIPPED else of_copies[:1], loc.detach()[span].sin().float(), by_u)
    return torch.stack(values), torch.stack(sums), to, found


@pytest.mark.parametrize("kinds", KINDS)
def test_draws_and_gradients_are_those_of_autograd(native, kinds):
    one = made(kinds)
    assert (one.native is not None) == native
    values, sums, (to_loc, to_u), found = expected(one, 0.1)
    torch.testing.assert_close(torch.tensor([*one.draw(SEEDS)]), sums.float().detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(one.values, values.float(), rtol=1e-5, atol=1e-5)
    squares = one.gradients(found, 0.1)
    torch.testing.assert_close(one.to_loc, to_loc.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.to_u, to_u.float(), rtol=1e-4, atol=1e-5)
    assert squares == pytest.approx(float(to_loc.square().sum() + to_u.square().sum()), rel=1e-4)
    assert one.squares() == pytest.approx(squares, rel=1e-4)


@pytest.mark.parametrize("kinds", KINDS)
def test_parts_of_the_sites_have_the_gradients_of_the_whole(native, kinds):
    whole, one = made(kinds), made(kinds)
    *_, found = expected(whole, 0.1)
    for each in (whole, one):
        each.draw(SEEDS)
    squares = whole.gradients(found, 0.1)
    parts = [one.gradients({site: found[site] for site in sites}, 0.1) for sites in ((3,), (1, 2), (0,))]
    # In C to the last bit; torch adds up the copies of other vectors in another order.
    close = {"rtol": 0, "atol": 0} if native else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(one.to_loc, whole.to_loc, **close)
    torch.testing.assert_close(one.to_u, whole.to_u, **close)
    assert sum(parts) == pytest.approx(squares, rel=1e-5)


def test_what_has_no_gradient_counts_as_zero(native):
    one = made("flipped")
    one.draw(SEEDS)
    assert one.gradients({site: Gradients() for site in range(4)}, 0.0) == 0


def test_numbers_do_not_depend_on_the_number_of_threads():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        one = made("flipped")
        sums = [*one.draw(SEEDS)]
        *_, gradients = expected(one, 0.1)
        found.append((sums, one.values.clone(), one.gradients(gradients, 0.1), one.to_u.clone()))
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1::2], found[1][1::2], strict=True))


def test_ivon_moves_each_site_at_its_rate(native):
    one = made("draw")
    one.to_loc.copy_(torch.linspace(-1, 1, len(one.loc)))
    one.to_u.copy_(torch.linspace(1, -1, len(one.loc)) / 10)
    loc, scale = one.loc.double(), F.softplus(one.u.double()) + SMALLEST_SCALE
    momentum = torch.full_like(one.loc, 0.5)
    one.ivon_step(momentum, 0.1, (1.0, 2.0, 3.0, 4.0), 0.3, 0.25)
    expected_momentum = 0.75 * 0.5 + 0.25 * one.to_loc.double()
    slope = 1 - torch.exp(-(scale - SMALLEST_SCALE))
    change = one.to_u.double() / slope * scale * 0.3
    new = scale / (1 + change + change.square() / 2).sqrt()
    rates = torch.cat([torch.full((count,), 0.1 * rate) for count, rate in zip(COUNTS, (1, 2, 3, 4), strict=True)])
    torch.testing.assert_close(momentum, expected_momentum.float())
    torch.testing.assert_close(one.loc, (loc - new.square() * rates * expected_momentum).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.softplus(one.u) + SMALLEST_SCALE, new.float(), rtol=1e-3, atol=1e-6)


def test_there_is_no_code_in_c_for_other_numbers_than_float32():
    assert made("draw", torch.float64).native is None
    assert agrees()


def test_the_sums_keep_their_digits_over_many_weights():
    one = FlatArithmetic(
        (1_000_000,), (0,), torch.empty(0), kinds=(DRAW,), centres=(0.0,), precisions=(1.0,), logs=(1.0,)
    )
    one.loc.fill_(0.1)
    one.u.fill_(-9.0)
    squares, logs = one.draw((1,))
    scale = math.log1p(math.exp(-9)) + SMALLEST_SCALE
    assert squares == pytest.approx(1e6 * (0.01 + scale**2), rel=1e-5)
    assert logs == pytest.approx(1e6 * math.log(scale), rel=1e-5)
