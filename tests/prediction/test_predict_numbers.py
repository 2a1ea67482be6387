"""Predictives of numbers: what draws of a small regression network add up to, by every method and however they come."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from ranks import Ranks
from torch import nn

from ppl_bnn import MeanFieldNormal, Model, Normal, bayesian, predict, predictor
from ppl_bnn.errors import UserError

N = 40
X = torch.linspace(-2, 2, N).unsqueeze(1)
Y = X.sin().squeeze(1)


def regression(likelihood=None, outputs=1):
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, outputs)))
    model = Model(net, likelihood or Normal(0.3), N)
    return model, MeanFieldNormal(model, X[:1], init_loc=0.5, init_scale=0.2)


def outputs_of(model, guide, draws):
    found = []
    for index in range(draws):
        with torch.no_grad(), pyro.poutine.condition(data=guide.draw(index)):
            found.append(model.net(X))
    return torch.stack(found).double()


def same(one, other):
    for name in ("means", "samples", "log_likelihood", "squares", "reference", "draws", "draw_scores"):
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first.nan_to_num(-7.0), second.nan_to_num(-7.0)), name
    assert all(torch.equal(total, other.sums[name]) for name, total in one.sums.items())


def test_averages_are_those_of_the_draws():
    model, guide = regression(Normal("predicted"), outputs=2)
    found = predict(model, guide, X, Y, num_samples=50, method="draws", progress=False)
    loc, scale = outputs_of(model, guide, 50).unbind(-1)
    scale = nn.functional.softplus(scale) + 1e-6
    torch.testing.assert_close(found.mean, loc.mean(0), rtol=1e-4, atol=1e-5)
    total, aleatoric, epistemic = found.uncertainties()
    torch.testing.assert_close(aleatoric, scale.square().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(epistemic, loc.var(0, correction=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(total, aleatoric + epistemic)
    torch.testing.assert_close(found.std, total.sqrt())
    torch.testing.assert_close(found.mc_error, (loc.var(0) / 50).sqrt(), rtol=1e-3, atol=1e-5)
    log_likelihood = torch.distributions.Normal(loc, scale).log_prob(Y.double())
    torch.testing.assert_close(found.log_likelihood.double(), log_likelihood, rtol=1e-3, atol=1e-4)
    nll = -(torch.logsumexp(log_likelihood, 0) - math.log(50)).mean()
    assert found.summary()["nll"] == pytest.approx(float(nll), abs=1e-4)
    assert found.summary()["rmse"] == pytest.approx(float((loc.mean(0) - Y).square().mean().sqrt()), abs=1e-4)


def test_draws_of_y_have_the_predictives_moments_and_quantiles():
    model, guide = regression()
    found = predict(model, guide, X[:5], num_samples=3000, method="draws", progress=False)
    error = found.std / 3000**0.5
    assert ((found.samples.double().mean(0) - found.mean).abs() < 5 * error).all()
    torch.testing.assert_close(found.samples.double().std(0), found.std, rtol=0.06, atol=0)
    lower, upper = found.interval(0.9)
    inside = ((found.samples >= lower) & (found.samples <= upper)).double().mean(0)
    assert ((inside - 0.9).abs() < 0.001).all()
    narrow = found.interval(0.9, of="mean")
    assert (narrow[1] - narrow[0] < upper - lower).all()
    assert found.y is None
    assert found.log_likelihood is None
    assert set(found.summary()) == {"num_samples", "seconds"}


def test_the_noise_of_a_draw_does_not_depend_on_its_weights_noise():
    model, guide = regression(Normal(1.0))
    found = predict(model, guide, X[:1], num_samples=4000, progress=False)
    noise = found.samples - found.means
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), found.means.flatten()]))[0, 1])) < 5 / 4000**0.5
    assert abs(float(torch.corrcoef(torch.stack([noise[1:, 0], noise[:-1, 0]]))[0, 1])) < 5 / 4000**0.5


@pytest.mark.parametrize("method", ["draws", "layerwise"])
def test_draws_are_added_to_and_counted_the_same(method):
    model, guide = regression()
    how = {"method": method, "progress": False}
    once = predict(model, guide, X, Y, num_samples=90, **how)
    same(
        predict(model, guide, X, Y, num_samples=90, so_far=predict(model, guide, X, Y, num_samples=31, **how), **how),
        once,
    )


def on_a_rank(communicator, tolerance):
    model, guide = regression()
    found = predict(model, guide, X, Y, num_samples=120, tolerance=tolerance, progress=False, communicator=communicator)
    return {"sums": found.sums, "log_likelihood": found.log_likelihood, "squares": found.squares, "draws": found.draws}


@pytest.mark.parametrize("tolerance", [None, 0.2])
def test_ranks_share_the_draws_out(tmp_path, tolerance):
    model, guide = regression()
    alone = predict(model, guide, X, Y, num_samples=120, tolerance=tolerance, progress=False)
    for found in Ranks(tmp_path, 2, on_a_rank, tolerance).results():
        assert all(torch.equal(total, alone.sums[name]) for name, total in found["sums"].items())
        assert torch.equal(found["draws"], alone.draws)
        assert torch.equal(found["log_likelihood"].nan_to_num(), alone.log_likelihood.nan_to_num())
    assert tolerance is None or 0 < int((alone.draws < 120).sum()) < N


def test_examples_that_are_not_kept_have_quantiles_from_the_sketch():
    model, guide = regression()
    every = predict(model, guide, X, Y, num_samples=600, progress=False)
    some = predict(model, guide, X, Y, num_samples=600, keep=torch.tensor([3, 5]), log_likelihood=False, progress=False)
    assert some.samples.shape == (600, 2)
    assert some.log_likelihood is None
    assert some.nll == pytest.approx(every.nll, abs=1e-5)
    assert torch.equal(some.mean, every.mean)
    levels = torch.tensor([0.05, 0.5, 0.95])
    ranks = (every.samples.unsqueeze(0) <= some.quantiles(levels).unsqueeze(1)).double().mean(1)
    assert ((ranks - levels.unsqueeze(1)).abs() <= float(some.sketch.rank_error.max()) + 2 / 600).all()
    assert set(some.summary()) == set(every.summary())
    assert some.quantiles([0.5], of="mean")[0].isfinite().sum() == 2


def test_a_resumed_sketch_is_the_same():
    model, guide = regression()
    how = {"keep": torch.arange(0), "progress": False}
    once = predict(model, guide, X, num_samples=700, **how)
    rest = predict(model, guide, X, num_samples=700, so_far=predict(model, guide, X, num_samples=300, **how), **how)
    assert torch.equal(once.quantiles([0.1, 0.9]), rest.quantiles([0.1, 0.9]))


@pytest.mark.parametrize("scale", [0.3, "learnt", "predicted"])
def test_moments_are_those_of_many_draws(scale):
    torch.manual_seed(1)
    # One random layer: then the moments are exact.
    model = Model(bayesian(nn.Sequential(nn.Linear(1, 2 if scale == "predicted" else 1))), Normal(scale), N)
    guide = MeanFieldNormal(model, X[:1], init_loc=0.5, init_scale=0.3)
    exact = predict(model, guide, X, Y, method="moments", progress=False)
    drawn = predict(model, guide, X, Y, num_samples=3000, progress=False)
    assert exact.method == "moments"
    assert ((exact.mean - drawn.mean).abs() < 5 * drawn.mc_error + 1e-5).all()
    for one, other in zip(exact.uncertainties(), drawn.uncertainties(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.15, atol=1e-3)
    # The method's predictive is a Normal; that of draws with scales of their own is not.
    error = 0.1 if scale == "predicted" else 0.05
    assert exact.summary()["nll"] == pytest.approx(drawn.summary()["nll"], abs=error)
    with pytest.raises(UserError, match="method moments has no draws to take quantiles of"):
        exact.quantiles([0.5])


@pytest.mark.parametrize("likelihood", [Normal(0.3), Normal("predicted")], ids=["fixed", "predicted"])
def test_a_predictor_answers_with_mean_and_standard_deviation(likelihood):
    model, guide = regression(likelihood, outputs=2 if likelihood.noise.kind == "predicted" else 1)
    mean, std = predictor(model, guide, X[:6], num_samples=100)(X[:6])
    expected = predict(model, guide, X[:6], num_samples=100, progress=False)
    torch.testing.assert_close(mean.double(), expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std.double(), expected.std, rtol=1e-4, atol=1e-5)


class Regression(nn.Module):
    """What `Model` is, written by hand."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", N, subsample=x):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


def test_a_pyro_model_of_ones_own_is_predicted_like_a_model():
    model, guide = regression()
    own = Regression(model.net)
    ours = predict(model, guide, X, Y, num_samples=30, method="draws", progress=False)
    theirs = predict(own, guide, X, Y, num_samples=30, progress=False)
    for name in ("mean", "std", "log_likelihood", "means"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-5)
    assert theirs.summary()["rmse"] == pytest.approx(ours.summary()["rmse"], abs=1e-5)
    assert predict(own, guide, X[:4], num_samples=10, sampling="antithetic", progress=False).means.shape == (10, 4)


def test_outputs_of_several_numbers_an_example():
    torch.manual_seed(0)
    model = Model(bayesian(nn.Sequential(nn.Linear(1, 3))), Normal("learnt"), N)
    guide = MeanFieldNormal(model, X[:1])
    y = torch.cat([X, X.sin(), X.cos()], 1)
    found = predict(model, guide, X, y, num_samples=20, progress=False)
    assert found.mean.shape == found.std.shape == (N, 3)
    assert found.log_likelihood.shape == (20, N)
    assert found.samples.shape == (20, N, 3)
    assert found.uncertainties()[0].shape == (N, 3)


def test_large_numbers_keep_their_digits():
    model, guide = regression()
    with torch.no_grad():
        model.net[2].bias += 1e5
    found = predict(model, guide, X, num_samples=200, method="draws", progress=False)
    plain, guide = regression()
    expected = predict(plain, guide, X, num_samples=200, method="draws", progress=False)
    torch.testing.assert_close(found.std, expected.std, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y.unsqueeze(1), r"targets y have shape \[40, 1\]; .* expects \[N\]: pass y.squeeze\(-1\)"),
        (Y.index_fill(0, torch.tensor([2]), math.nan), "1 examples have NaN or infinite values, the first is 2"),
        (Y[:-1], "x and y need the same number of examples, at least 1; got 40 and 39"),
        (["a"] * N, "torch needs numbers"),
    ],
)
def test_targets_that_do_not_fit_are_refused(y, message):
    model, guide = regression()
    with pytest.raises(UserError, match=message):
        predict(model, guide, X, y, progress=False)


def test_levels_and_tolerances_out_of_range_are_refused():
    model, guide = regression()
    found = predict(model, guide, X, num_samples=4, progress=False)
    for levels in ([0.0], [1.0], [0.5, 1.2], [math.nan], []):
        with pytest.raises(UserError, match="quantile levels must be above 0 and below 1"):
            found.quantiles(levels)
    for level in (0, 1, 95):
        with pytest.raises(UserError, match="level must be above 0 and below 1"):
            found.interval(level)
    with pytest.raises(UserError, match="quantiles are of 'y' or of the 'mean'"):
        found.quantiles([0.5], of="median")
    with pytest.raises(UserError, match="scores need the observed y"):
        found.scores()
    for tolerance in (0, math.inf, -1):
        with pytest.raises(UserError, match="tolerance must be above 0 and finite"):
            predict(model, guide, X, num_samples=4, tolerance=tolerance, progress=False)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "message"),
    [
        (Normal("predicted"), 1, "scale 'predicted' needs two output columns for each number"),
        (Normal("predicted"), 3, r"the network gives \[1, 3\]"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(likelihood, outputs, message):
    model, _ = regression(likelihood, 2)
    model.net[2] = bayesian(nn.Linear(8, outputs))
    with pytest.raises(UserError, match=message):
        MeanFieldNormal(model, X[:1])


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, "learned", dist.Normal(0, 1)])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(UserError, match=r"scale must be|needs positive support"):
        Normal(scale)
