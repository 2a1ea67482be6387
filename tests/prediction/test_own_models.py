"""A user's own Pyro model around `bayesian(net)`: any observed site is predicted as the model itself says."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from own_models import CLOUD, FAMILIES, X, drawn, own_model, site_by_pyro
from torch import nn

from ppl_bnn import bayesian, predict
from ppl_bnn.errors import UserError

LABELS = {"Categorical", "Categorical of probs", "tokens"}


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
