"""A user's own Pyro model around `bayesian(net)`: any observed site is predicted as the model itself says."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from ranks import Ranks
from torch import nn
from weight_clouds import Cloud

from ppl_bnn import MeanFieldNormal, bayesian, fit, predict
from ppl_bnn.errors import UserError

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
CLOUD = Cloud({"weight": torch.Size((6, 4))})


def covariance(out):
    factor = out[:, 2:6].unflatten(1, (2, 2))
    return factor @ factor.mT + torch.eye(2)


def factor(out):
    scales = torch.diag_embed(out[:, 2:4].exp())
    return scales + torch.diag_embed(out[:, 4:5], offset=-1)


# What a model says about y, given the network's outputs [n, 6].
FAMILIES = {
    "Normal": lambda out: dist.Normal(out[:, 0], out[:, 1].exp()),
    "one scale for all": lambda out: dist.Normal(out[:, 0], 0.5),
    "a vector": lambda out: dist.Normal(out[:, :3], out[:, 3:].exp()).to_event(1),
    "a matrix": lambda out: dist.Laplace(out.unflatten(1, (2, 3)), 1.0).to_event(2),
    "expanded": lambda out: dist.Normal(0.0, 1.0).expand([len(out)]),
    "masked": lambda out: dist.Normal(out[:, 0], 1.0).mask(out[:, 1] > 0),
    "StudentT": lambda out: dist.StudentT(5.0, out[:, 0], out[:, 1].exp()),
    "Gamma": lambda out: dist.Gamma(out[:, 0].exp(), out[:, 1].exp()),
    "Beta": lambda out: dist.Beta(out[:, 0].exp(), out[:, 1].exp()),
    "LogNormal": lambda out: dist.LogNormal(out[:, 0], 0.3),
    "VonMises": lambda out: dist.VonMises(out[:, 0], out[:, 1].exp()),
    "Poisson": lambda out: dist.Poisson(out[:, 0].exp()),
    "Binomial of logits": lambda out: dist.Binomial(10, logits=out[:, 0]),
    "Binomial of probs": lambda out: dist.Binomial(10, out[:, 0].sigmoid()),
    "BetaBinomial": lambda out: dist.BetaBinomial(out[:, 0].exp(), out[:, 1].exp(), total_count=7),
    "NegativeBinomial": lambda out: dist.NegativeBinomial(3.0, logits=out[:, 0]),
    "zero-inflated": lambda out: dist.ZeroInflatedPoisson(out[:, 0].exp(), gate_logits=out[:, 1]),
    "zero-inflated by probs": lambda out: dist.ZeroInflatedPoisson(out[:, 0].exp(), gate=out[:, 1].sigmoid()),
    "Multinomial": lambda out: dist.Multinomial(5, logits=out[:, :3]),
    "Dirichlet": lambda out: dist.Dirichlet(out[:, :3].exp()),
    "MultivariateNormal by scale_tril": lambda out: dist.MultivariateNormal(out[:, :2], scale_tril=factor(out)),
    "MultivariateNormal by covariance": lambda out: dist.MultivariateNormal(out[:, :2], covariance(out)),
    "a mixture density network": lambda out: dist.MixtureSameFamily(
        dist.Categorical(logits=out[:, :2]), dist.Normal(out[:, 2:4], out[:, 4:].exp())
    ),
    "a mixture of vectors": lambda out: dist.MixtureSameFamily(
        dist.Categorical(probs=out[:, 4:].softmax(1)), dist.Normal(out[:, :4].unflatten(1, (2, 2)), 1.0).to_event(1)
    ),
    "a mixture of multivariate normals": lambda out: dist.MixtureSameFamily(
        dist.Categorical(logits=out[:, 4:]), dist.MultivariateNormal(out[:, :4].unflatten(1, (2, 2)), torch.eye(2))
    ),
    "Bernoulli": lambda out: dist.Bernoulli(logits=out[:, 0]),
    "Bernoulli of probs": lambda out: dist.Bernoulli(out[:, 0].sigmoid()),
    "several Bernoulli": lambda out: dist.Bernoulli(logits=out[:, :3]).to_event(1),
    "one Bernoulli in a vector": lambda out: dist.Bernoulli(logits=out[:, :1]).to_event(1),
    "Categorical": lambda out: dist.Categorical(logits=out),
    "Categorical of probs": lambda out: dist.Categorical(out.softmax(1)),
    "tokens": lambda out: dist.Categorical(logits=out.unflatten(1, (2, 3))).to_event(1),
}
LABELS = {"Categorical", "Categorical of probs", "tokens"}


def own_model(family, count=30):
    torch.manual_seed(0)
    net = bayesian(nn.Linear(4, 6))

    def model(x, y=None):
        fn = family(net(x))
        with pyro.plate("data", count, subsample=x):
            pyro.sample("y", fn, obs=y)

    return model


def site_by_pyro(model, draw, *args, site="y"):
    with torch.no_grad(), poutine.trace() as recorded, poutine.condition(data=dict(draw)):
        model(*args)
    return recorded.trace.nodes[site]


def drawn(model, seed=9):
    """Observed values: one sample of the model itself."""
    torch.manual_seed(seed)
    return site_by_pyro(model, CLOUD.draw(99), X)["value"]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_and_means_are_the_models_own(family):
    model = own_model(FAMILIES[family])
    y = drawn(model)
    found = predict(model, CLOUD, X, y, num_samples=4, batch_size=7, progress=False)
    for index in range(4):
        fn = site_by_pyro(model, CLOUD.draw(index), X, y)["fn"]
        torch.testing.assert_close(found.log_likelihood[index], fn.log_prob(y), rtol=1e-4, atol=1e-4)
        if family not in LABELS:
            torch.testing.assert_close(found.means[index], fn.mean, rtol=1e-4, atol=1e-5)
    assert found.mean.shape[:1] == (30,)
    assert math.isfinite(found.scores()["nll"])
    without = predict(model, CLOUD, X, num_samples=4, progress=False)
    torch.testing.assert_close(without.means, found.means, rtol=1e-5, atol=1e-6)
    assert without.log_likelihood is None
    total, aleatoric, epistemic = found.uncertainties()
    torch.testing.assert_close(total, aleatoric + epistemic, rtol=1e-6, atol=1e-9)


def test_y_outside_the_bounds_of_a_draw_has_no_density_there():
    model = own_model(lambda out: dist.Pareto(out[:, 0].exp(), out[:, 1].exp() + 3))
    y = torch.linspace(0.1, 4, 30)
    found = predict(model, CLOUD, X, y, num_samples=4, progress=False)
    for index in range(4):
        fn = site_by_pyro(model, CLOUD.draw(index), X)["fn"]
        inside = y >= fn.scale
        torch.testing.assert_close(found.log_likelihood[index, inside], fn.log_prob(y.clamp_min(fn.scale))[inside])
        assert (found.log_likelihood[index, ~inside] == -math.inf).all()
        assert 0 < inside.sum() < 30


class TwoHeads(nn.Module):
    """y [N, 2]: a number and a count."""

    def __init__(self, required=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.required = bayesian(nn.Linear(4, 6)), required

    def forward(self, x, y=None):
        number, count = (None, None) if y is None else (y[:, 0], y[:, 1])
        out = self.net(x)
        with pyro.plate("data", 30, subsample=x):
            pyro.sample("number", dist.Normal(out[:, 0], 1.0), obs=number)
            pyro.sample("count", dist.Poisson(out[:, 1].exp()), obs=count)
        return out


class TwoHeadsWithY(TwoHeads):
    def forward(self, x, y):
        return super().forward(x, y)


Y_OF_TWO = torch.stack([torch.linspace(-1, 1, 30), (torch.arange(30) % 4).float()], 1)


@pytest.mark.parametrize("build", [TwoHeads, TwoHeadsWithY])
@pytest.mark.parametrize(("site", "column"), [("number", 0), ("count", 1)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_one_of_two_observed_sites_is_predicted(build, site, column, kind):
    model = build()
    found = predict(model, CLOUD, X, kind(Y_OF_TWO), site=site, num_samples=3, batch_size=7, progress=False)
    assert torch.equal(found.y, Y_OF_TWO[:, column])
    for index in range(3):
        fn = site_by_pyro(model, CLOUD.draw(index), X, Y_OF_TWO, site=site)["fn"]
        torch.testing.assert_close(found.log_likelihood[index], fn.log_prob(Y_OF_TWO[:, column]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "observed sites 'number', 'count': choose one of them with site="),
        ({"site": "y"}, "no observed site 'y'; it has 'number', 'count'"),
        ({"site": "count", "y": -Y_OF_TWO}, r"support IntegerGreaterThan.*: convert"),
        ({"site": "count", "method": "layerwise"}, "predicted by whole draws"),
        ({"site": "count", "sampling": "sobol"}, "predicted by whole draws"),
        ({"site": "count", "compact": "yes"}, "compact 'yes' and norm_inputs are for a Model"),
        ({"site": "count", "sampling": "antithetic"}, "sampling antithetic needs a posterior with loc_scale"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_first_draw(how, message):
    with pytest.raises(UserError, match=message):
        predict(TwoHeads(), CLOUD, X, **{"y": Y_OF_TWO, "num_samples": 4, "progress": False, **how})


def test_a_model_that_cannot_run_without_y_is_refused_without_it():
    with pytest.raises(UserError, match="cannot run without 'y': give it a default of None"):
        predict(TwoHeadsWithY(), CLOUD, X, site="count", num_samples=2, progress=False)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (lambda out: dist.Cauchy(out[:, 0], 1.0), r"the distribution of y \(Cauchy\) has no mean"),
        (lambda out: dist.StudentT(0.9, out[:, 0], 1.0), r"\(StudentT\) has no mean"),
        (
            lambda out: dist.TransformedDistribution(dist.Normal(out[:, 0], 1.0), [dist.transforms.ExpTransform()]),
            "has a TransformedDistribution, whose parameters cannot be read",
        ),
    ],
)
def test_a_distribution_that_cannot_be_summarized_is_refused_by_name(family, message):
    model = own_model(family)
    with pytest.raises(UserError, match=message):
        predict(model, CLOUD, X, num_samples=2, progress=False)


def test_a_site_whose_first_dimension_is_not_the_examples_is_refused():
    torch.manual_seed(0)
    net = bayesian(nn.Linear(4, 6))

    def model(x, y=None):
        fn = dist.Normal(net(x)[:, 0], 1.0).to_event(1)
        with pyro.plate("one", 1):
            pyro.sample("y", fn, obs=y)

    with pytest.raises(UserError, match="its first dimension must be the examples, in a plate"):
        predict(model, CLOUD, X, num_samples=2, progress=False)


# -- draws that are added, shared out, mirrored, left out ----------------------------------------------------------


MIXTURE = FAMILIES["a mixture density network"]


def test_draws_are_added_to_and_the_rest_of_an_interrupted_prediction_is_the_same():
    model = own_model(MIXTURE)
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=9, progress=False)
    some = predict(model, CLOUD, X, y, num_samples=4, progress=False)
    more = predict(model, CLOUD, X, y, num_samples=9, so_far=some, progress=False)
    assert torch.equal(more.mean, whole.mean)
    assert torch.equal(more.log_likelihood, whole.log_likelihood)
    assert torch.equal(more.samples, whole.samples)


def by_rank(communicator):
    model = own_model(MIXTURE)
    found = predict(model, CLOUD, X, drawn(model), num_samples=5, progress=False, communicator=communicator)
    return {"mean": found.mean, "log_likelihood": found.log_likelihood}


def test_ranks_share_the_draws_out(tmp_path):
    model = own_model(MIXTURE)
    alone = predict(model, CLOUD, X, drawn(model), num_samples=5, progress=False)
    for found in Ranks(tmp_path, 2, by_rank).results():
        assert torch.equal(found["mean"], alone.mean)
        assert torch.equal(found["log_likelihood"], alone.log_likelihood)


def test_a_tolerance_leaves_examples_out_whose_draws_stay_the_same():
    model = own_model(lambda out: dist.Normal(out[:, 0], out[:, 1].exp()))
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=100, progress=False)
    found = predict(model, CLOUD, X, y, num_samples=100, tolerance=0.25, progress=False)
    assert 0 < (found.draws == 50).sum() < 30
    torch.testing.assert_close(found.means[50:, found.draws == 100], whole.means[50:, found.draws == 100])
    assert found.log_likelihood[50:, found.draws == 50].isnan().all()
    torch.testing.assert_close(
        found.log_likelihood[50:, found.draws == 100], whole.log_likelihood[50:, found.draws == 100]
    )


def test_antithetic_draws_are_mirror_images():
    torch.manual_seed(0)
    net = bayesian(nn.Linear(4, 6))

    def model(x, y=None):
        loc = net(x)[:, 0]
        with pyro.plate("data", 30, subsample=x):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    guide = MeanFieldNormal(model, X[:1], torch.zeros(1), init_scale=0.5)
    found = predict(model, guide, X, num_samples=6, sampling="antithetic", progress=False)
    centre = X @ guide.loc_scale("weight")[0][0].detach() + net.bias[0].detach()
    torch.testing.assert_close(found.means.unflatten(0, (3, 2)).mean(1), centre.expand(3, 30))


def test_kept_examples_and_no_log_likelihood():
    model = own_model(MIXTURE)
    y = drawn(model)
    whole = predict(model, CLOUD, X, y, num_samples=6, progress=False)
    found = predict(model, CLOUD, X, y, num_samples=6, keep=[3, 5], log_likelihood=False, progress=False)
    assert torch.equal(found.samples, whole.samples[:, [3, 5]])
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_mixture_density_network_is_trained_and_predicted():
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 200)[:, None]
    y = x[:, 0] * torch.randint(0, 2, (200,)).mul(2).sub(1) * 2 + 0.1 * torch.randn(200)
    net = bayesian(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 6)))

    def model(x, y=None):
        fn = MIXTURE(net(x))
        with pyro.plate("data", 200, subsample=x):
            pyro.sample("y", fn, obs=y)

    guide = MeanFieldNormal(model, x[:1], y[:1])
    fit(model, guide, x, y, epochs=60, batch_size=50, lr=2e-2, kl_weight=0.1, progress=False)
    found = predict(model, guide, x, y, num_samples=50, progress=False)
    # One Normal of the best mean (0) and scale has this NLL.
    single = -dist.Normal(0.0, y.std()).log_prob(y).mean()
    assert found.nll < single - 0.1
