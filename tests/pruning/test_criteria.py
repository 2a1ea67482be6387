"""Scores of weights against closed forms, groups that go together, and fine-tuning of what is left."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ppl_bnn import Classifier, GaussianScaleMixture, KLScaledELBO, MeanFieldNormal, bayesian, fit, kl_by_site, prune
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.models import site_priors
from ppl_bnn.pruning import finetune, scores
from ppl_bnn.pruning.criteria import by_group

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def small(prior=None, **keywords):
    net = bayesian(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2)), prior, **keywords)
    model = Classifier(net, len(X))
    guide = MeanFieldNormal(model, X[:1], Y[:1], init_loc=0.5, init_scale=0.2, init_jitter=0.8)
    return model, guide, site_priors(model, X[:1], Y[:1])


def test_evidence_is_the_exact_change_in_bayesian_linear_regression():
    """With an orthogonal design the posterior factorizes, and each evidence is a Normal density of the data."""
    generator = torch.Generator().manual_seed(1)
    design = torch.linalg.qr(torch.randn(20, 4, dtype=torch.double, generator=generator))[0] * 3.0
    y = design @ torch.tensor([1.0, 0.05, -0.3, 0.0]).double() + 0.5 * torch.randn(
        20, dtype=torch.double, generator=generator
    )
    noise, prior_scale = 0.5, 0.7

    def log_evidence(columns):
        covariance = noise**2 * torch.eye(20).double() + prior_scale**2 * columns @ columns.T
        return MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(y)

    precision = design.square().sum(0) / noise**2 + 1 / prior_scale**2
    loc, scale = design.T @ y / noise**2 / precision, precision.rsqrt()
    guide = posterior_of(loc, scale)
    found = scores(guide, "evidence", {"weight": dist.Normal(0.0, prior_scale)})["weight"][0]
    for j in range(4):
        others = [k for k in range(4) if k != j]
        expected = log_evidence(design) - log_evidence(design[:, others])
        assert float(found[j]) == pytest.approx(float(expected), abs=1e-4)
    assert found[0] > 0 > found[3]


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 0.4), dist.StudentT(1.0, 0.0, 0.1), dist.Laplace(0.1, 0.3)])
def test_evidence_is_the_limit_of_a_prior_that_narrows_on_zero(prior):
    """log E_q[p'(w) / p(w)] for p' = Normal(0, 0.001), by quadrature over p'."""
    loc, scale = torch.tensor([0.2, -0.05, 0.0]).double(), torch.tensor([0.1, 0.2, 0.05]).double()
    grid = torch.linspace(-0.006, 0.006, 4001).double()
    narrow = Normal(torch.tensor(0.0).double(), 0.001).log_prob(grid)
    found = scores(posterior_of(loc, scale), "evidence", {"weight": prior})["weight"][0]
    for j in range(3):
        change = torch.logsumexp(Normal(loc[j], scale[j]).log_prob(grid) + narrow - prior.log_prob(grid), 0)
        change += math.log(float(grid[1] - grid[0]))
        assert float(found[j]) == pytest.approx(-float(change), abs=0.03)


def posterior_of(loc, scale):
    layer = bayesian(nn.Linear(len(loc), 1, bias=False))
    guide = MeanFieldNormal(layer, torch.zeros(1, len(loc)), init_loc={"weight": loc.float()[None]})
    with torch.no_grad():
        guide.unconstrained_scale.weight.copy_((scale - 1.2e-7).expm1().log()[None])
    return guide


def test_kl_adds_up_to_the_objectives():
    model, guide, priors = small(dist.Normal(0.1, 0.3))
    found = scores(guide, "kl", priors)
    for site, total in kl_by_site(model, guide, X[:1], Y[:1]).items():
        assert float(found[site].sum()) == pytest.approx(total, rel=1e-5)
        assert (found[site] > 0).all()


@pytest.mark.parametrize("prior", [dist.StudentT(3.0, 0.0, 0.5), GaussianScaleMixture(0.5, 1.0, 0.2)])
def test_kl_to_other_priors_agrees_with_monte_carlo(prior):
    _, guide, priors = small(prior)
    found = scores(guide, "kl", priors)["2.weight"]
    loc, scale = guide.loc_scale("2.weight")
    q = Normal(loc.detach(), scale.detach())
    draws = q.sample((40_000,))
    each = q.log_prob(draws) - prior.log_prob(draws)
    error = each.std(0) / math.sqrt(len(draws))
    # Five standard errors, and a thousandth for the quadrature.
    assert ((found - each.mean(0)).abs() < 5 * error + 2e-3 * found.abs() + 1e-3).all()


@pytest.mark.parametrize("criterion", ["snr", "kl", "evidence"])
@pytest.mark.parametrize("structure", ["units", "inputs"])
def test_whole_groups_go_and_those_with_the_lowest_mean_score(criterion, structure):
    _, guide, priors = small()
    weight_scores = scores(guide, criterion, priors)
    pruned = prune(guide, fraction=0.5, criterion=criterion, structure=structure, priors=priors)
    kept, gone = [], []
    for site in guide.sites:
        alive = pruned.guide.loc_scale(site)[1] > 0
        if structure == "units" and site == "2.weight":
            assert alive.all()
            continue
        across = 1 if structure == "units" else 0
        assert (alive.any(across) == alive.all(across)).all()
        means = weight_scores[site].mean(across)
        kept, gone = [*kept, *means[alive.all(across)]], [*gone, *means[~alive.any(across)]]
    assert gone
    assert max(gone) <= min(kept)
    weights = 60 if structure == "units" else 80
    zeroed = 80 - sum(pruned.nonzero.values())
    assert weights / 2 - 10 < zeroed <= weights / 2
    assert pruned.fraction == pytest.approx(zeroed / 80)


def test_filters_and_channels_of_convolutions_go_whole():
    net = bayesian(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)))
    guide = MeanFieldNormal(Classifier(net, 1), torch.zeros(1, 3, 8, 8), torch.zeros(1).long())
    for structure, scope in (("units", "global"), ("inputs", "layer")):
        groups = by_group(scores(guide), structure)
        assert [list(score.shape) for score in groups.values()] == (
            [[8, 1, 1, 1], [4, 1, 1, 1]] if structure == "units" else [[1, 3, 1, 1], [1, 8, 1, 1], [1, 64]]
        )
        pruned = prune(guide, fraction=0.5, structure=structure, scope=scope).guide
        for site in groups:
            alive = pruned.loc_scale(site)[1] > 0
            across = [d for d in range(alive.dim()) if d != (0 if structure == "units" else 1)]
            assert torch.equal(alive.float().amax(across), alive.float().amin(across))


def test_random_biases_are_left_out_of_groups():
    _, guide, _ = small(bayesian_bias=True)
    assert prune(guide, fraction=0.4, structure="units").nonzero["0.bias"] == 10


def test_a_threshold_for_each_layer():
    _, guide, priors = small()
    pruned = prune(guide, threshold={"0.*": 1.0, "*": 3.0})
    ratios = scores(guide)
    for site, least in (("0.weight", 1.0), ("2.weight", 3.0)):
        assert pruned.nonzero[site] == int((ratios[site] >= least).sum())
    assert pruned.threshold == 3.0
    negative = prune(guide, threshold=-0.5, criterion="evidence", priors=priors)
    assert negative.fraction < prune(guide, threshold=0.0, criterion="evidence", priors=priors).fraction


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"criterion": "magnitude"}, "criterion must be one of snr, kl, evidence; got 'magnitude'"),
        ({"structure": "rows"}, "structure must be one of weights, units, inputs"),
        ({"criterion": "kl"}, "needs the prior of '0.weight'"),
        ({"fraction": None, "threshold": {"0.*": 1.0}}, "pruning.threshold has none for '2.weight'"),
        ({"fraction": None, "threshold": {"*": -1.0}}, "at least 0 and finite; got -1.0"),
        ({"fraction": None, "threshold": math.inf, "criterion": "evidence"}, "must be finite"),
    ],
)
def test_refusals(keywords, message):
    _, guide, _ = small()
    with pytest.raises(ValueError, match=message):
        prune(guide, **{"fraction": 0.5, **keywords})


def test_units_of_a_single_layer_are_refused():
    guide = MeanFieldNormal(bayesian(nn.Linear(4, 2)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no layer has units to prune"):
        prune(guide, fraction=0.5, structure="units")


@pytest.mark.parametrize("criterion", ["snr", "kl", "evidence"])
def test_a_damaged_posterior_is_refused_by_name(criterion):
    _, guide, priors = small()
    with torch.no_grad():
        guide.unconstrained_scale.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'2.weight' has a loc that is not finite or a scale that is not positive"):
        prune(guide, fraction=0.5, criterion=criterion, priors=priors)


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 0.3), dist.Normal(torch.rand(10, 6), 0.3), dist.Laplace(0.0, 0.3)])
def test_the_kl_of_a_pruned_posterior_is_that_of_its_weights(prior):
    net = bayesian(nn.Linear(6, 10), prior)
    guide = MeanFieldNormal(net, X[:1], init_loc=0.5)
    keep = torch.rand(10, 6) < 0.4
    loc, scale = (part.detach() for part in guide.loc_scale("weight"))
    each = kl_divergence(
        Normal(loc, scale), Normal(prior.loc, prior.scale) if isinstance(prior, dist.Normal) else prior
    )
    found = kl_by_site(net, guide.pruned({"weight": keep}), X[:1])["weight"]
    assert found == pytest.approx(float((each * keep).sum()), rel=1e-5)


def test_the_estimated_kl_of_a_pruned_posterior_leaves_pruned_weights_out():
    prior = dist.StudentT(3.0, 0.0, 0.5)
    net = bayesian(nn.Linear(6, 10), prior)
    guide = MeanFieldNormal(net, X[:1], init_loc=0.5)
    keep = {"weight": torch.rand(10, 6) < 0.4}
    expected = float((scores(guide, "kl", {"weight": prior})["weight"] * keep["weight"]).sum())
    pruned = guide.pruned(keep)
    values = torch.tensor([kl_by_site(net, pruned, X[:1])["weight"] for _ in range(400)])
    assert abs(values.mean() - expected) < 4 * values.std() / 20 + 0.01


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("prior", [None, dist.StudentT(1.0, 0.0, 0.1)])
def test_gradients_reach_surviving_weights_only(estimator, prior):
    model, guide, _ = small(prior)
    pruned = prune(guide, fraction=0.6).guide
    with ESTIMATORS[estimator]():
        KLScaledELBO(len(X)).loss_and_grads(model, pruned, X, Y)
    for site in guide.sites:
        alive = pruned.loc_scale(site)[1] > 0
        for part in (pruned.loc, pruned.unconstrained_scale):
            gradient = part.get_parameter(site).grad
            assert torch.isfinite(gradient).all()
            assert (gradient[~alive] == 0).all()
            assert (gradient[alive] != 0).any()


def test_finetuning_moves_what_is_left_and_nothing_else():
    model, guide, _ = small()
    fit(model, guide, X, Y, epochs=30, lr=0.02, kl_weight=0.1, progress=False)
    pruned = prune(guide, fraction=0.8)
    before = {name: value.clone() for name, value in {**model.state_dict(), **pruned.guide.state_dict()}.items()}
    settings = {"epochs": 40, "lr": 0.02, "kl_weight": 0.1, "progress": False}
    tuned_model, tuned = finetune(model, pruned, X, Y, **settings)
    for name, value in {**model.state_dict(), **pruned.guide.state_dict()}.items():
        assert torch.equal(value, before[name])
    draw = tuned.guide.draw(0)
    for site in guide.sites:
        gone = pruned.guide.loc_scale(site)[1] == 0
        assert int((draw[site] != 0).sum()) == tuned.nonzero[site]
        assert (draw[site][gone] == 0).all()
    losses = []
    for net, each in ((model, pruned.guide), (tuned_model, tuned.guide)):
        torch.manual_seed(0)
        losses.append(KLScaledELBO(len(X), kl_weight=0.1, num_particles=200).loss(net, each, X, Y))
    assert losses[1] < losses[0] - 0.01
