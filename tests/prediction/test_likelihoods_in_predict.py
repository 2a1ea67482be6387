"""Every likelihood that comes with the library, through `predict`: by whole draws and layerwise, added to, weighted."""

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO
from torch import nn

from ppl_bnn import (
    Bernoulli,
    Categorical,
    MeanFieldNormal,
    Model,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    bayesian,
    predict,
    predictor,
)
from ppl_bnn.errors import UserError
from ppl_bnn.prediction.predictive import draw_outputs

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
COUNTS = torch.arange(12) % 4
WEIGHTS = torch.arange(12) / 4
CASES = {
    "Normal": (Normal(0.5), [1], COUNTS),
    "Normal learnt": (Normal(), [2], torch.stack([COUNTS, -COUNTS], 1)),
    "Normal predicted": (Normal("predicted"), [2], COUNTS),
    "StudentT": (StudentT(), [1], COUNTS),
    "Poisson": (Poisson(), [1], COUNTS),
    "NegativeBinomial": (NegativeBinomial(), [1], COUNTS),
    "Bernoulli": (Bernoulli(), [1], COUNTS > 1),
    "labels": (Bernoulli(), [3], torch.stack([COUNTS > 0, COUNTS > 1, COUNTS > 2], 1)),
    "Categorical": (Categorical(), [3], COUNTS % 3),
    "ignored": (Categorical(ignore_index=3), [3], COUNTS),
    "class weights": (Categorical(class_weights=[1.0, 2.0, 0.5]), [3], COUNTS % 3),
    "soft": (Categorical(soft_labels=True), [3], torch.full((12, 3), 1 / 3)),
    "tokens": (
        Categorical(class_dim=-1, ignore_index=-1),
        [2, 3],
        torch.stack([COUNTS % 3, COUNTS - 1], 1).clamp_max(1),
    ),
    "pixels by default": (Categorical(), [3, 2, 2], (COUNTS % 3)[:, None, None].expand(12, 2, 2)),
    "pixels": (Categorical(class_dim=1), [3, 2, 2], (COUNTS % 3)[:, None, None].expand(12, 2, 2)),
}


@pytest.fixture(params=CASES)
def case(request):
    likelihood, shape, y = CASES[request.param]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, math.prod(shape)), *([nn.Unflatten(1, shape)] if len(shape) > 1 else []))
    model = Model(bayesian(net), likelihood, 12)
    return model, MeanFieldNormal(model, X[:1], y[:1], init_scale=0.3), y


def test_log_likelihoods_and_means_are_those_of_each_draw(case):
    model, guide, y = case
    found = predict(model, guide, X, y, num_samples=6, method="draws", progress=False)
    for index, outputs in enumerate(draw_outputs(model.net, guide, X, num_samples=6)):
        of = model.likelihood.distribution(outputs)
        torch.testing.assert_close(found.log_likelihood[index], of.log_prob(found.y).detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.means[index], model.likelihood.mean(outputs).detach(), rtol=1e-4, atol=1e-5)
    scores = found.scores()
    assert scores["nll"] == found.nll
    assert all(math.isfinite(value) for value in scores.values())
    total, aleatoric, epistemic = found.uncertainties()
    torch.testing.assert_close(total, aleatoric + epistemic, rtol=1e-6, atol=1e-9)
    assert found.std.shape == found.mean.shape


def test_draws_are_added_to_by_any_method(case):
    model, guide, y = case
    for method in ("draws", "layerwise"):
        how = {"method": method, "progress": False}
        whole = predict(model, guide, X, y, num_samples=6, **how)
        some = predict(model, guide, X, y, num_samples=2, **how)
        more = predict(model, guide, X, y, num_samples=6, so_far=some, **how)
        assert torch.equal(more.mean, whole.mean)
        assert torch.equal(more.log_likelihood, whole.log_likelihood)


def test_example_weights_multiply_log_likelihoods(case):
    model, guide, y = case
    plain = predict(model, guide, X, y, num_samples=4, method="draws", progress=False)
    found = predict(model, guide, X, y, weights=WEIGHTS, num_samples=4, method="draws", progress=False)
    torch.testing.assert_close(found.log_likelihood, plain.log_likelihood * WEIGHTS)
    expected = -(torch.logsumexp(found.log_likelihood.double(), 0) - math.log(4)).mean()
    assert found.nll == pytest.approx(float(expected))
    assert torch.equal(found.mean, plain.mean)
    summed = predict(
        model, guide, X, y, weights=WEIGHTS, num_samples=4, method="draws", log_likelihood=False, progress=False
    )
    assert summed.nll == pytest.approx(found.nll, rel=1e-6)


def test_a_predictor_answers_for_it(case):
    model, guide, _ = case
    found = predict(model, guide, X, num_samples=8, method="draws", progress=False)
    mean, _ = predictor(model, guide, X, num_samples=8)(X)
    assert mean.shape == found.mean.shape


def test_pyros_own_tools_take_it(case):
    model, guide, y = case
    observed = model.likelihood.observed(y, model.net(X[:2]))
    assert math.isfinite(TraceMeanField_ELBO().loss(model, guide, X, observed))
    samples = Predictive(model, guide=guide, num_samples=3)(X)["y"]
    assert samples.shape == (3, *observed.shape)
    conditioned = poutine.trace(poutine.condition(model, data={"y": observed})).get_trace(X)
    expected = model.likelihood.distribution(conditioned.nodes["_RETURN"]["value"]).log_prob(observed).sum()
    assert conditioned.log_prob_sum(lambda name, site: name == "y").item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_that_do_not_fit_are_refused():
    likelihood, _, y = CASES["Poisson"]
    model = Model(bayesian(nn.Sequential(nn.Linear(4, 1))), likelihood, 12)
    guide = MeanFieldNormal(model, X[:1], y[:1])
    how = {"num_samples": 2, "method": "draws", "progress": False}
    with pytest.raises(UserError, match=r"one number for each of the 12 examples, \[12\]; got shape \[11\]"):
        predict(model, guide, X, y, weights=WEIGHTS[1:], **how)
    some = predict(model, guide, X, y, weights=WEIGHTS, **how)
    for others in (None, WEIGHTS + 1):
        with pytest.raises(UserError, match="so_far has other weights of the examples"):
            predict(model, guide, X, y, weights=others, so_far=some, **{**how, "num_samples": 4})


@pytest.mark.parametrize("name", ["Poisson", "Bernoulli", "StudentT", "tokens", "class weights"])
def test_moments_are_refused_where_they_are_not_known(name):
    likelihood, shape, y = CASES[name]
    net = nn.Sequential(nn.Linear(4, math.prod(shape)), *([nn.Unflatten(1, shape)] if len(shape) > 1 else []))
    model = Model(bayesian(net), likelihood, 12)
    guide = MeanFieldNormal(model, X[:1], y[:1])
    with pytest.raises(UserError, match="method moments is for Normal and Categorical likelihoods"):
        predict(model, guide, X, y, num_samples=2, method="moments", progress=False)
