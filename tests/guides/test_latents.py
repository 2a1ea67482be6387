"""Latent sites in the mean-field guide: which they are, where they start, how they are drawn, saved and pruned."""

import copy
import io
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from latent_models import LATENTS, WEIGHTS, Noise, Regression, X, Y
from posterior_conformance import check_posterior
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import biject_to, constraints

from ppl_bnn import MeanFieldNormal, bayesian, fit, load_checkpoint, prune
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.guides.posterior import WithLatents, latents_of
from ppl_bnn.inference.diagnosis import layer_posteriors
from ppl_bnn.inference.elbo import kl_by_site
from ppl_bnn.inference.optimizers import build_optimizer
from ppl_bnn.models.sites import latent_sites, log_prior, prior_median


def guided(model=None, **settings):
    model = model or Regression()
    torch.manual_seed(1)
    return model, MeanFieldNormal(model, X[:1], Y[:1], **settings)


def test_the_mean_field_guide_with_latents_keeps_the_contract():
    check_posterior(guided(init_scale=0.4)[1], WEIGHTS, latents=LATENTS)


def test_a_pruned_guide_with_latents_keeps_the_contract():
    guide = guided()[1]
    pruned = prune(guide, fraction=0.6).guide
    check_posterior(pruned, WEIGHTS, latents=LATENTS)
    assert all(torch.equal(value, guide.draw_latents(2)[site]) for site, value in pruned.draw_latents(2).items())


def test_weights_are_the_sites_and_all_else_are_latents():
    guide = guided()[1]
    assert guide.sites == list(WEIGHTS)
    assert guide.latents == latents_of(guide) == ["sigma", "gain", "mixing", "0.weight.share", "level", "level.shift"]
    assert isinstance(guide, WithLatents)
    assert [site for site, _ in guide.noise(0)] == guide.sites
    keep = {site: torch.ones(shape) for site, shape in WEIGHTS.items()}
    assert not guide.pruned(keep).is_pruned


def test_a_function_around_a_bayesian_network_has_latents_too():
    net = bayesian(nn.Linear(2, 1))

    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        return net(x) + slope

    assert (MeanFieldNormal(model, X[:1]).sites, MeanFieldNormal(model, X[:1]).latents) == (["weight"], ["slope"])


def test_a_users_own_pyro_module_has_latents_too():
    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            self.rate = PyroSample(dist.Exponential(1.0))

        def forward(self, x):
            return x @ self.weight * self.rate + pyro.sample("shift", dist.Normal(0.0, 1.0))

    guide = MeanFieldNormal(Scaled(), X[:1])
    assert (guide.sites, guide.latents) == (["weight"], ["rate", "shift"])


def test_a_model_without_layers_has_its_real_sites_as_weights():
    def model(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        return x @ slope * pyro.sample("rate", dist.LogNormal(0.0, 1.0))

    guide = MeanFieldNormal(model, X[:1])
    assert (guide.sites, guide.latents) == (["slope"], ["rate"])


@pytest.mark.parametrize(
    "prior",
    [
        dist.LogNormal(-1.0, 0.5), dist.HalfCauchy(2.0), dist.Exponential(3.0), dist.Uniform(1.0, 4.0),
        dist.Normal(5.0, 2.0), dist.StudentT(2.0, 1.0, 1.0), dist.HalfNormal(2.0),
    ],
)  # fmt: skip
def test_a_latent_starts_at_its_priors_median(prior):
    start = prior_median(prior)
    assert torch.equal(prior_median(prior), start)
    torch.manual_seed(0)
    # Of 999 draws, so the share below it has a standard deviation of 0.016.
    assert (prior.sample((20_000,)) < start).float().mean().item() == pytest.approx(0.5, abs=0.065)
    if prior.support is not constraints.real:
        loc, scale = guided(Noise(prior))[1].unconstrained_loc_scale("sigma")
        torch.testing.assert_close(biject_to(prior.support)(loc.detach()), start)
        assert scale.item() == pytest.approx(0.1, rel=1e-5)


def test_a_prior_without_a_finite_median_on_the_unconstrained_scale_starts_at_zero_there():
    class Unbounded(dist.LogNormal):
        def sample(self, sample_shape):
            return torch.full(sample_shape, torch.inf)

    assert prior_median(Unbounded(0.0, 1.0)) == 1


def test_the_start_is_independent_of_the_random_state_and_leaves_weights_as_they_were():
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(guided()[1].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    torch.manual_seed(1)
    alone = MeanFieldNormal(Regression().net, X[:1])
    torch.manual_seed(1)
    beside = MeanFieldNormal(Regression(), X[:1], Y[:1])
    for site in WEIGHTS:
        assert torch.equal(alone.loc_scale(site)[0], beside.loc_scale(site)[0])
        assert torch.equal(alone.draw(4)[site], beside.draw(4)[site]) == torch.equal(
            alone.loc_scale(site)[1], beside.loc_scale(site)[1]
        )


def test_init_loc_may_have_values_of_latents_in_their_support():
    start = {site: torch.zeros(shape) for site, shape in WEIGHTS.items()}
    mixing = torch.tensor([0.2, 0.3, 0.5])
    guide = guided(init_loc=start | {"sigma": torch.tensor(0.25), "mixing": mixing})[1]
    assert guide.unconstrained_loc_scale("sigma")[0].item() == pytest.approx(torch.tensor(0.25).log().item())
    torch.testing.assert_close(biject_to(LATENTS["mixing"].support)(guide.unconstrained_loc_scale("mixing")[0]), mixing)
    by_function = guided(init_loc=lambda site, shape: start.get(site))[1]
    assert by_function.unconstrained_loc_scale("sigma")[0] == guided()[1].unconstrained_loc_scale("sigma")[0]
    with pytest.raises(UserError, match="init_loc of site 'sigma' has values outside its support, GreaterThan"):
        guided(init_loc=start | {"sigma": torch.tensor(-1.0)})
    with pytest.raises(UserError, match=r"init_loc of site 'sigma' has shape \[2\], the site has \[\]"):
        guided(init_loc=start | {"sigma": torch.ones(2)})
    with pytest.raises(UserError, match=r"no tensor for site '0.weight'; the function returned None"):
        guided(init_loc=lambda site, shape: None)


def test_what_the_guide_cannot_fit_is_refused_in_one_line():
    def discrete(x):
        return pyro.sample("kind", dist.Categorical(torch.ones(3)))

    layer = bayesian(nn.Linear(X.shape[1], 1))

    def inside(x, y=None):
        with pyro.plate("data", 40, subsample=x):
            return layer(x)

    def count(x):
        return pyro.sample("count", dist.Poisson(3.0))

    with pytest.raises(UserError, match=r"site 'kind' has support .*sum a discrete site out"):
        MeanFieldNormal(discrete, X[:1])
    with pytest.raises(UserError, match="site 'count' has support IntegerGreaterThan"):
        MeanFieldNormal(count, X[:1])
    with pytest.raises(UserError, match="'weight' lies in plate 'data' of size 40, so each example would have w"):
        MeanFieldNormal(inside, X[:1])


def test_sites_of_single_examples_are_left_to_other_guides():
    def local(x, y=None):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 40, subsample=x):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = MeanFieldNormal(local, X[:1])
    assert (guide.sites, guide.latents) == ([], ["scale"])
    without_y, with_y = MeanFieldNormal(Noise(), X[:1]), MeanFieldNormal(Noise(), X[:1], Y[:1])
    assert (without_y.sites, without_y.latents) == (with_y.sites, with_y.latents)


def test_latents_are_copied_saved_and_moved_with_the_guide():
    guide = guided()[1]
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    fresh = guided(Regression())[1]
    with torch.no_grad():
        for value in fresh.parameters():
            value.add_(1.0)
    assert not torch.equal(fresh.draw(0)["sigma"], guide.draw(0)["sigma"])
    fresh.load_state_dict(guide.state_dict())
    for other in (fresh, copy.deepcopy(guide), torch.load(buffer, weights_only=False)):
        assert all(torch.equal(value, guide.draw(3)[site]) for site, value in other.draw(3).items())
    # The bounds of an interval are tensors of the support, not parameters.
    wide = copy.deepcopy(guide).double().draw(1)
    assert {value.dtype for value in wide.values()} == {torch.float64}
    assert guide.draw(1)["level.shift"].dtype == torch.float32


def test_a_pruned_state_loads_beside_latents():
    pruned = prune(guided()[1], fraction=0.5).guide
    fresh = guided()[1]
    fresh.load_state_dict(pruned.state_dict())
    assert fresh.is_pruned
    assert all(torch.equal(value, pruned.draw(1)[site]) for site, value in fresh.draw(1).items())


@pytest.mark.parametrize("estimator", ["plain", "flipout", "groups", "local"])
def test_latents_train_under_every_estimator(estimator):
    model, guide = guided(init_scale=0.02)
    before = guide.draw_latents(0)
    history = fit(model, guide, X, Y, epochs=30, batch_size=20, lr=0.03, estimator=estimator, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert not any(torch.equal(value, before[site]) for site, value in guide.draw_latents(0).items())


def test_latents_train_under_ivon():
    def model(x, y=None):
        level, sigma = pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("y", dist.Normal(level, sigma), obs=y)

    found = []
    for optimizer, settings in (("ivon", {"lr": 0.05, "beta2": 0.98}), ("adam", {"lr": 0.02})):
        torch.manual_seed(0)
        guide = MeanFieldNormal(model, X[:1], Y[:1])
        fit(
            model, guide, X, Y, epochs=500, batch_size=40, optimizer=optimizer, **settings, num_particles=4,
            lr_schedule="cosine", progress=False,
        )  # fmt: skip
        found.append([value.item() for value in guide.unconstrained_loc_scale("sigma")])
    assert found[0][0] == pytest.approx(found[1][0], abs=0.05)
    assert found[0][1] == pytest.approx(found[1][1], rel=0.25)


def test_a_log_prior_has_the_hyper_priors_of_the_draw():
    def model(x):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("k", 2):
            pyro.sample("w", dist.Normal(0.0, tau))

    draw = {"tau": torch.tensor(0.3), "w": torch.tensor([0.1, -0.4])}
    expected = dist.HalfCauchy(1.0).log_prob(draw["tau"]) + dist.Normal(0.0, 0.3).log_prob(draw["w"]).sum()
    assert log_prior(model, draw, X) == pytest.approx(expected.item(), rel=1e-6)
    assert latent_sites(model, X)["tau"]["value"] == prior_median(dist.HalfCauchy(1.0))


def test_the_kl_of_a_latent_is_its_densities_difference():
    model, guide = guided()
    draws = [guide.draw(index) for index in range(600)]
    ratios = torch.tensor([float(guide.log_prob(draw)) - log_prior(model, draw, X[:1], Y[:1]) for draw in draws])
    by_elbo = torch.tensor([sum(kl_by_site(model, guide, X[:1], Y[:1]).values()) for _ in range(200)])
    tolerance = 4 * (ratios.var() / 600 + by_elbo.var() / 200).sqrt().item()
    assert ratios.mean().item() == pytest.approx(by_elbo.mean().item(), abs=tolerance)


def test_a_training_resumes_and_loads_with_its_latents(tmp_path):
    settings = {"batch_size": 20, "lr": 0.03, "progress": False, "folder": tmp_path}
    once = guided()
    fit(*once, X, Y, epochs=4, **settings | {"folder": None})
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        fit(*guided(), X, Y, epochs=4, **settings, should_stop=lambda: next(steps) == 4)
    again = guided()
    fit(*again, X, Y, epochs=4, **settings)
    assert all(torch.equal(value, once[1].draw(2)[site]) for site, value in again[1].draw(2).items())
    model, fresh = guided()
    load_checkpoint(tmp_path, model=model, guide=fresh)
    assert all(torch.equal(value, once[1].draw(2)[site]) for site, value in fresh.draw(2).items())
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert [layer["site"] for layer in content["layers"]] == list(WEIGHTS)
    assert content["weights"] == 18
    latents = {entry["name"]: entry for entry in content["parameters"] if entry["kind"] == "latent"}
    assert list(latents) == once[1].latents
    # Of a share of three there are two unconstrained numbers.
    assert latents["mixing"]["shape"] == [2]
    assert latents["0.weight.share"]["loc"] == "guide.loc.latent/0/weight/share"


def test_a_checkpoint_of_a_guide_without_latents_loads_as_ever():
    """The names of the weights' parameters are those of version 0.1.0."""
    guide = guided()[1]
    names = [name for name in guide.state_dict() if "latent/" not in name]
    assert names == [f"{part}.{site}" for part in ("loc", "unconstrained_scale") for site in WEIGHTS]
    alone = MeanFieldNormal(Regression().net, X[:1])
    assert list(alone.state_dict()) == names


def test_only_weights_are_diagnosed_and_counted():
    model, guide = guided()
    initial = copy.deepcopy(guide)
    fit(model, guide, X, Y, epochs=2, batch_size=20, progress=False)
    assert [layer.site for layer in layer_posteriors(model, guide, initial, X[:1], Y[:1])] == guide.sites


def test_a_scale_factor_of_the_learning_rate_is_the_latents_too():
    model, guide = guided(Noise(), init_scale=0.02)
    optimizer = build_optimizer("adam", model, guide, lr=0.1, scale_lr_factor=3.0)
    named = {id(value): name for name, value in guide.named_parameters()}
    scales = [named[id(value)] for value in optimizer.param_groups[1]["params"]]
    assert scales == [f"unconstrained_scale.{name}" for name in ("latent/sigma", *WEIGHTS)]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.3)
