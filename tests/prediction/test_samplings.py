"""Antithetic pairs, the sequential stop, and the error that a prediction says it has."""

import math

import pytest
import torch
from small_posteriors import X, Y, dense
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, metrics, predict
from ppl_bnn.prediction.predictive import draw_outputs
from ppl_bnn.prediction.stopping import is_look


@pytest.mark.parametrize("method", ["draws", "layerwise"])
def test_antithetic_pairs_are_mirror_images_and_average_better(method):
    net, guide = dense(0.1)
    linear = bayesian(nn.Sequential(nn.Linear(5, 3)))
    linear_guide = MeanFieldNormal(Classifier(linear, 30), X[:1], Y[:1], init_loc=1.0)
    pair = list(draw_outputs(linear, linear_guide, X, num_samples=2, method=method, sampling="antithetic"))
    with torch.no_grad():
        mean = X @ linear_guide.loc_scale("0.weight")[0].T + linear[0].bias
    torch.testing.assert_close((pair[0] + pair[1]) / 2, mean, rtol=1e-4, atol=1e-4)
    independent, antithetic = (
        predict(net, guide, X, Y, num_samples=1200, method=method, sampling=sampling, progress=False)
        for sampling in ("independent", "antithetic")
    )
    difference = independent.mean_probs - antithetic.mean_probs
    error = (independent.mc_error.square() + antithetic.mc_error.square()).sqrt() + 1e-5
    assert (difference / error).abs().max() < 4.5
    # What the error is said to be is what it is: the spread of 30 shorter runs.
    runs = torch.stack(
        list(draw_outputs(net, guide, X, num_samples=1200, seed=9, method=method, sampling="antithetic"))
    )
    spread = runs.softmax(-1).unflatten(0, (30, 40)).mean(1).std(0)
    ratio = (spread * math.sqrt(40 / 1200) / antithetic.mc_error)[antithetic.mc_error > 1e-4]
    assert 0.8 < ratio.median() < 1.25
    noisy = independent.mc_error > 1e-4
    assert (antithetic.mc_error / independent.mc_error)[noisy].square().median() < 0.5


@pytest.mark.parametrize("sampling", ["independent", "antithetic"])
def test_the_sequential_stop_keeps_its_bound(sampling):
    net, guide = dense(0.3)
    exact = predict(
        net, guide, X, Y, num_samples=80_000, seed=1, method="layerwise", progress=False, keep=torch.tensor([0])
    ).mean_probs
    misses, draws = [], []
    for seed in range(2, 22):
        found = predict(
            net, guide, X, Y, num_samples=1600, seed=seed, method="layerwise", sampling=sampling, tolerance=0.02,
            progress=False,
        )  # fmt: skip
        early = found.draws < 1600
        misses.append(((found.mean_probs - exact).abs().amax(1) > 0.02 + 3 * 0.5 / 80_000**0.5)[early])
        draws.append(found.draws)
    # 95% is promised for each class; the bound at every look together is meant to be on the safe side.
    assert torch.cat(misses).double().mean() < 0.05
    draws = torch.cat(draws)
    assert draws.unique().numel() > 1
    assert all(is_look(count) for count in draws.unique().tolist())
    assert draws.double().mean() < 1600


def test_draws_after_a_look_are_new_ones():
    net = bayesian(nn.Sequential(nn.Linear(5, 3, bias=False)))
    guide = MeanFieldNormal(Classifier(net, 30), X[:1], Y[:1], init_scale=0.5)
    # Blocks of 400 images have 5 draws, of 100 images 20: as many numbers. Of zeros every draw says the same.
    x = torch.zeros(400, 5)
    x[::4] = X[0]
    found = predict(
        net, guide, x, torch.zeros(400).long(), num_samples=200, method="layerwise", tolerance=0.02, progress=False
    )
    assert found.draws.tolist() == 100 * [200, 50, 50, 50]
    for at in range(0, 40, 4):
        assert len(found.probs[:, at].unique(dim=0)) == 200


def test_an_image_that_is_known_gets_no_further_draws():
    net, guide = dense(0.3)
    fixed = predict(net, guide, X, Y, num_samples=400, method="draws", progress=False)
    found = predict(net, guide, X, Y, num_samples=400, method="draws", tolerance=0.05, progress=False)
    assert 50 <= int(found.draws.min()) < int(found.draws.max())
    for at, count in enumerate(found.draws.tolist()):
        # Draw s is the same network for the images that are left.
        torch.testing.assert_close(found.probs[:count, at], fixed.probs[:count, at], rtol=1e-4, atol=1e-5)
        assert found.probs[count:, at].isnan().all()
        torch.testing.assert_close(found.mean_probs[at], fixed.probs[:count, at].double().mean(0), rtol=1e-4, atol=1e-6)
    expected = -found.mean_probs[range(30), Y].log().mean()
    assert metrics.nll(found.log_likelihood) == pytest.approx(expected.item(), rel=1e-4)
    assert found.accuracies[:50].isfinite().all()


def test_the_monte_carlo_error_is_the_standard_error():
    net, guide = dense()
    found = predict(net, guide, X, Y, num_samples=300, progress=False)
    expected = found.probs.double().std(0) / math.sqrt(300)
    torch.testing.assert_close(found.mc_error, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "exact"}, "method must be one of auto, draws, layerwise"),
        ({"sampling": "halton"}, "sampling must be one of independent, antithetic, sobol"),
        ({"sampling": "sobol", "method": "draws"}, "sobol is for the method layerwise"),
        ({"sampling": "sobol", "tolerance": 0.1}, "a tolerance needs independent draws to estimate the error"),
        ({"sampling": "antithetic", "num_samples": 3}, "must be even, got 3"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"x": X.clone().index_fill(0, torch.tensor([4, 7]), math.nan)}, r"2 examples have NaN.*the first is 4"),
    ],
)
def test_refusals(changes, message):
    net, guide = dense()
    arguments = {"num_samples": 2, "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        predict(net, guide, arguments.pop("x", X), Y, **arguments)
