"""Pyro's guides as posteriors: autoguides, functions and modules, with latents, auxiliary sites and plates."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from latent_models import LATENTS, WEIGHTS, AutoEncoder, Noise, Regression, X, Y
from posterior_conformance import check_posterior
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from ppl_bnn import MeanFieldNormal, fit
from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import WithLatents, WithLocalLatents
from ppl_bnn.guides.pyro_guide import PyroGuide, as_posterior
from ppl_bnn.guides.stored import StoredPosterior

SIGMA = {"sigma": LATENTS["sigma"]}


def both(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["sigma"])))
    guide.append(AutoDelta(poutine.block(model, expose=["sigma"])))
    return guide


def by_function(model):
    def guide(x, y=None):
        for site, shape in WEIGHTS.items():
            loc = pyro.param(f"{site} loc", torch.zeros(shape))
            scale = pyro.param(f"{site} scale", torch.full(shape, 0.1), constraint=constraints.positive)
            pyro.sample(site, dist.Normal(loc, scale).to_event(2))
        pyro.sample("sigma", dist.LogNormal(pyro.param("log sigma", torch.tensor(0.0)), 0.1))

    return guide


class Guide(PyroModule):
    def __init__(self, model):
        super().__init__()
        self.loc = nn.ParameterList([nn.Parameter(0.1 * torch.randn(shape)) for shape in WEIGHTS.values()])
        self.log_sigma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        for site, loc in zip(WEIGHTS, self.loc, strict=True):
            pyro.sample(site, dist.Normal(loc, 0.1).to_event(2))
        pyro.sample("sigma", dist.LogNormal(self.log_sigma, 0.1))


KINDS = [
    AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta, AutoIAFNormal,
    both, by_function, Guide,
]  # fmt: skip


def trained(kind, epochs=3):
    pyro.clear_param_store()
    model = Noise()
    torch.manual_seed(3)
    guide = kind(model)
    history = fit(model, guide, X, Y, epochs=epochs, batch_size=20, lr=0.02, progress=False)
    return model, guide, history


@pytest.mark.parametrize("kind", KINDS)
def test_a_pyro_guide_trains_and_keeps_the_contract(kind):
    model, guide, history = trained(kind, epochs=40)
    assert history[-1]["loss"] < history[0]["loss"]
    before = dict(pyro.get_param_store().items())
    posterior = as_posterior(guide, X, Y, model=model)
    check_posterior(posterior, WEIGHTS, latents=SIGMA, varies=kind is not AutoDelta)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # The copies of the conformance suite have left the guide able to train.
    fit(model, guide, X, Y, epochs=1, batch_size=20, lr=0.02, progress=False)
    assert (
        not all(torch.equal(value, posterior.draw(0)[site]) for site, value in copy.deepcopy(posterior).draw(1).items())
        or kind is AutoDelta
    )


def test_a_guide_that_was_never_called_is_a_posterior():
    model = Regression()
    posterior = as_posterior(AutoDiagonalNormal(model), X, Y, model=model)
    assert (posterior.sites, posterior.latents) == (list(WEIGHTS), list(LATENTS))
    assert posterior.draw(0).keys() == {*WEIGHTS, *LATENTS}


def test_without_the_model_every_site_is_a_weight():
    posterior = as_posterior(trained(AutoNormal)[1], X, Y)
    assert sorted(posterior.sites) == sorted([*WEIGHTS, "sigma"])
    assert posterior.latents == []
    assert posterior.draw_latents(0) == {}


def test_draws_have_the_guides_distribution():
    _, guide, _ = trained(AutoNormal, epochs=20)
    posterior = as_posterior(guide, X, Y)
    draws = [posterior.draw(index, seed=1) for index in range(800)]
    for site, values in guide.quantiles([0.1586553, 0.5, 0.8413447]).items():
        low, middle, high = values
        found = torch.stack([draw[site] for draw in draws]).quantile(torch.tensor([0.1586553, 0.5, 0.8413447]), 0)
        for one, other in zip(found, (low, middle, high), strict=True):
            assert ((one - other).abs() < 0.13 * (high - low)).all()
        between = torch.stack([draw["0.weight"].flatten() for draw in draws])
    assert (torch.corrcoef(between.T) - torch.eye(12)).abs().max() < 5.5 / 800**0.5


def test_a_draw_of_a_site_depends_on_no_other_site():
    def guide(*names):
        def sample(x, y=None):
            for name in names:
                pyro.sample(name, dist.Normal(0.0, 1.0))

        return PyroGuide(sample, X, Y)

    both, one = guide("a", "b").draw(3, seed=2), guide("b").draw(3, seed=2)
    assert both["b"] == one["b"] != both["a"]


def test_a_posterior_is_returned_as_it_is_and_other_things_are_refused():
    guide = MeanFieldNormal(Noise(), X[:1], Y[:1])
    assert as_posterior(guide, X, Y) is guide
    with pytest.raises(UserError, match="the posterior is a dict: give one with sites and draw"):
        as_posterior({"0.weight": X}, X, Y)
    with pytest.raises(UserError, match="the guide has no site 'sigma', which the model samples"):
        as_posterior(AutoNormal(poutine.block(Noise(), hide=["sigma"])), X, Y, model=Noise())
    with pytest.raises(UserError, match="a mirror image needs a posterior with noise"):
        as_posterior(trained(AutoNormal)[1], X).draw_latents(0, sign=-1)


def test_a_guide_whose_plate_never_has_the_examples_given_is_refused():
    def model(x, y=None):
        with pyro.plate("data", 400, subsample=x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    with poutine.block():
        guide(X[:7])
    with pytest.raises(UserError, match="site 'z' lies in plate 'data' of size 400, of which a call sees 7 whatever x"):
        as_posterior(guide, X, Y)


class Encoder(PyroModule):
    """The guide of `AutoEncoder`: a mean-field guide of its weights, and an encoder of its local latents."""

    def __init__(self, model):
        super().__init__()
        self.rest = AutoNormal(poutine.block(model, hide=["z"]), init_scale=0.05)
        self.encode = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x, y=None):
        self.rest(x, y)
        loc, raw = self.encode(x).split(1, -1)
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def test_a_vae_with_a_bayesian_decoder_trains_and_draws_its_local_latents():
    pyro.clear_param_store()
    model = AutoEncoder()
    guide = Encoder(model)
    line = torch.linspace(-2, 2, 40)
    x = torch.stack((line, line.sin()), 1)
    history = fit(model, guide, x, x, epochs=300, batch_size=20, lr=0.03, lr_schedule="cosine", progress=False)
    assert history[-1]["loss"] < history[0]["loss"] - 1
    posterior = as_posterior(guide, x, x, model=model)
    assert isinstance(posterior, WithLatents)
    assert isinstance(posterior, WithLocalLatents)
    assert posterior.local == ["z"]
    assert (posterior.sites, posterior.latents) == (["0.weight", "2.weight"], ["sigma"])
    draw = posterior.draw(3, seed=1)
    assert draw.keys() == {"0.weight", "2.weight", "sigma"}
    z = posterior.draw_local(3, x, seed=1)["z"]
    assert z.shape == (40, 1)
    assert torch.equal(z, posterior.draw_local(3, x, seed=1)["z"])
    assert not torch.equal(z, posterior.draw_local(4, x, seed=1)["z"])
    # What the encoder found orders the line.
    order = torch.corrcoef(torch.stack((z[:, 0], line)))[0, 1].abs()
    assert order > 0.9
    with torch.no_grad(), poutine.condition(data=draw | {"z": z}):
        restored = poutine.trace(model).get_trace(x).nodes["y"]["fn"].base_dist.mean
    assert (restored - x).square().mean() < 0.25 * x.var()


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_local_sites_are_found_whatever_number_of_examples_is_given(rows):
    def guide(x, y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 40]).to_event(2))
        with pyro.plate("features", 2, dim=-2):
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = PyroGuide(guide, X[:rows], Y[:rows])
    assert (posterior.sites, posterior.local) == (["w", "scale"], ["z"])
    assert posterior.draw_local(0, X)["z"].shape == (40,)
    assert posterior.draw_local(0, X).keys() == {"z"}


def test_a_guide_with_a_plate_of_a_fixed_size_is_called_with_all_examples():
    def guide(x, y=None):
        with pyro.plate("data", 40, dim=-1):
            pyro.sample("z", dist.Normal(x.sum(1), 1.0))

    assert PyroGuide(guide, X, Y).local == ["z"]


def test_samples_of_nuts_keep_the_contract():
    model = Noise()
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=8, warmup_steps=4, num_chains=1, disable_progbar=True)
    mcmc.run(X, Y)
    posterior = StoredPosterior(mcmc.get_samples(), latents=["sigma"], num_chains=2)
    check_posterior(posterior, WEIGHTS, latents=SIGMA, seeded=False)
    assert [posterior.chain(index) for index in range(8)] == [0] * 4 + [1] * 4


def test_stored_samples_that_do_not_belong_together_are_refused():
    for samples in ({}, {"a": torch.ones(3), "b": torch.ones(4)}, {"a": torch.ones(0)}):
        with pytest.raises(UserError, match="each site needs the same number of samples"):
            StoredPosterior(samples)
    with pytest.raises(UserError, match="the latent 'b' has no samples"):
        StoredPosterior({"a": torch.ones(3)}, latents=["b"])
    with pytest.raises(UserError, match="3 samples are not those of 2 chains"):
        StoredPosterior({"a": torch.ones(3)}, num_chains=2)
    with pytest.raises(UserError, match="a mirror image"):
        StoredPosterior({"a": torch.ones(3)}, latents=["a"]).draw_latents(0, sign=-1)
