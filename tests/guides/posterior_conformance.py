"""What any posterior must do: run an implementation through `check_posterior`."""

import copy

import pytest
import torch
from torch import nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import (
    Chains,
    Factorized,
    Posterior,
    Prunable,
    StoredDraws,
    Symmetric,
    WithDensity,
    WithLatents,
    check_num_draws,
    is_pruned,
    latents_of,
)


def check_posterior(posterior, shapes, *, latents=None, seeded=True, varies=True):
    """Assert the contract of `ppl_bnn.guides.posterior`.

    Args:
        shapes: {site: shape} of the model's random weights.
        latents: {site: prior} of the model's other global sites.
        seeded: whether draws depend on the seed; stored draws need not.
        varies: whether no two draws are equal; those of a point mass are.
    """
    latents = latents or {}
    assert isinstance(posterior, Posterior)
    assert sorted(posterior.sites) == sorted(shapes)
    assert sorted(latents_of(posterior)) == sorted(latents)
    check_draws(posterior, {**shapes, **{site: prior.shape() for site, prior in latents.items()}}, seeded, varies)
    check_copies(posterior)
    if isinstance(posterior, WithLatents):
        check_latents(posterior, latents)
    if isinstance(posterior, StoredDraws):
        check_bound(posterior)
    if isinstance(posterior, Factorized):
        check_loc_scale(posterior)
    if isinstance(posterior, WithDensity) and not is_pruned(posterior):
        check_density(posterior, latents)
    if isinstance(posterior, Prunable) and not is_pruned(posterior):
        check_pruned(posterior)


def check_draws(posterior, shapes, seeded, varies):
    state = torch.get_rng_state()
    forwards = [posterior.draw(index, seed=5) for index in range(4)]
    backwards = [copy.deepcopy(posterior).draw(index, seed=5) for index in reversed(range(4))][::-1]
    assert torch.equal(state, torch.get_rng_state()), "a draw must leave torch's global generator alone"
    for one, other in zip(forwards, backwards, strict=True):
        assert {site: value.shape for site, value in one.items()} == dict(shapes)
        assert same(one, other)
        assert all(value.isfinite().all() for value in one.values())
    assert any(same(forwards[0], other) for other in forwards[1:]) != varies
    assert same(posterior.draw(0, seed=6), forwards[0]) != (seeded and varies)


def check_latents(posterior, latents):
    state = torch.get_rng_state()
    for index in (3, 0):
        draw, alone = posterior.draw(index, seed=5), posterior.draw_latents(index, seed=5)
        assert alone.keys() == latents.keys()
        assert same(alone, draw)
        for site, prior in latents.items():
            assert prior.support.check(alone[site]).all(), f"{site} lies outside its support"
    if isinstance(posterior, Symmetric):
        mirrored = [posterior.draw_latents(0, seed=5, sign=sign) for sign in (1, -1)]
        for site in posterior.latents:
            transform = torch.distributions.biject_to(latents[site].support)
            u, mirror = (transform.inv(draw[site]) for draw in mirrored)
            loc, scale = (value.detach() for value in posterior.unconstrained_loc_scale(site))
            torch.testing.assert_close((u + mirror) / 2, loc, rtol=1e-4, atol=1e-4)
            assert ((u - loc).abs() < 7 * scale).all()
            assert ((u - loc).abs() > 0).all()
    assert torch.equal(state, torch.get_rng_state()), "a draw must leave torch's global generator alone"


def check_copies(posterior):
    before = posterior.draw(1, seed=2)
    twin = copy.deepcopy(posterior)
    if not isinstance(posterior, nn.Module):
        return
    state = {name: value.clone() for name, value in posterior.state_dict().items()}
    if not state:
        # Its values are in Pyro's parameter store, which copies share.
        return
    with torch.no_grad():
        for value in twin.parameters():
            value.add_(0.25)
    assert same(posterior.draw(1, seed=2), before), "a copy must not share memory"
    twin.load_state_dict(state)
    assert same(twin.draw(1, seed=2), before)
    wide = twin.to(torch.float64)
    assert all(value.dtype == torch.float64 for value in wide.draw(0).values())
    assert all(value.device == before[site].device for site, value in wide.draw(0).items())


def check_bound(posterior):
    assert posterior.num_draws >= 4
    check_num_draws(posterior, posterior.num_draws)
    with pytest.raises(UserError, match=rf"has {posterior.num_draws} stored draws"):
        check_num_draws(posterior, posterior.num_draws + 1)
    if isinstance(posterior, Chains):
        assert all(posterior.chain(index) >= 0 for index in range(posterior.num_draws))


def check_loc_scale(posterior, count=3000):
    draws = [posterior.draw(index, seed=7) for index in range(count)]
    for site in posterior.sites:
        loc, scale = (value.detach() for value in posterior.loc_scale(site))
        values = torch.stack([draw[site] for draw in draws])
        assert (scale >= 0).all()
        assert ((values.mean(0) - loc).abs() <= 5 * scale / count**0.5 + 1e-7).all()
        torch.testing.assert_close(values.std(0), scale, rtol=0.08, atol=1e-7)
        # Independent weights: no two of a site are correlated.
        flat = values.flatten(1)[:, scale.flatten() > 0][:, :8]
        if flat.shape[1] > 1:
            assert (torch.corrcoef(flat.T) - torch.eye(flat.shape[1])).abs().max() < 5.5 / count**0.5
    if isinstance(posterior, Symmetric):
        for site, noise in posterior.noise(3, seed=7):
            loc, scale = posterior.loc_scale(site)
            torch.testing.assert_close((loc + scale * noise).detach(), draws[3][site])


def check_density(posterior, latents):
    assert isinstance(posterior, WithDensity)
    for index in range(2):
        draw = posterior.draw(index)
        found = posterior.log_prob(draw)
        assert found.dtype == torch.float64
        assert found.shape == ()
        if isinstance(posterior, Factorized):
            normals = {site: torch.distributions.Normal(*posterior.loc_scale(site)) for site in posterior.sites}
            expected = sum(normals[site].log_prob(draw[site]).double().sum() for site in normals)
            expected = expected + sum(
                density(posterior, site, prior.support, draw[site]) for site, prior in latents.items()
            )
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-4)


def check_pruned(posterior):
    keep = {site: torch.rand(value.shape) < 0.5 for site, value in posterior.draw(0).items() if site in posterior.sites}
    smaller = posterior.pruned(keep)
    assert is_pruned(smaller)
    assert not is_pruned(posterior)
    for site, value in smaller.draw(0, seed=5).items():
        torch.testing.assert_close(value, posterior.draw(0, seed=5)[site] * keep.get(site, 1))


def density(posterior, site, support, value):
    """log q of a latent by torch's own TransformedDistribution."""
    loc, scale = (part.detach().double() for part in posterior.unconstrained_loc_scale(site))
    normal = torch.distributions.Normal(loc, scale)
    transform = torch.distributions.biject_to(support)
    return torch.distributions.TransformedDistribution(normal, [transform]).log_prob(value.double()).sum()


def same(one, other):
    return all(torch.equal(value, other[site]) for site, value in one.items())
