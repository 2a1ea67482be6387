"""Scores of predictives of numbers and counts: against closed forms, other libraries, and a perfect predictive."""

import math

import numpy as np
import pytest
import scoringrules
import torch
from pyro.ops.stats import crps_empirical
from scipy import stats
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.classification import binary_accuracy, binary_calibration_error

from ppl_bnn import metrics, number_metrics
from ppl_bnn.errors import UserError


def five_sigma(values, expected):
    """Whether the mean of independent values is the expected one, within 5 standard errors."""
    return abs(float(values.mean()) - expected) < 5 * float(values.std()) / math.sqrt(values.numel())


def test_errors_of_points_are_torchmetrics():
    mean, y = torch.randn(40, 3, dtype=torch.double), torch.randn(40, 3, dtype=torch.double)
    rmse = mean_squared_error(mean, y, squared=False)
    assert number_metrics.rmse(mean, y) == pytest.approx(rmse.item())
    assert number_metrics.mae(mean, y) == pytest.approx(mean_absolute_error(mean, y).item())


def test_crps_of_draws_is_scoringrules_and_without_fair_pyros():
    draws, y = torch.randn(17, 5, 4).double(), 2 * torch.randn(5, 4).double()
    for fair, estimator in ((True, "fair"), (False, "nrg")):
        found = number_metrics.crps_from_draws(draws, y, fair=fair)
        expected = scoringrules.crps_ensemble(y.numpy(), draws.numpy(), m_axis=0, estimator=estimator)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    torch.testing.assert_close(found, crps_empirical(draws, y), rtol=1e-12, atol=0)


def test_crps_of_draws_by_hand():
    """Two draws 0 and 4, y = 1: E|Y - y| = 2; half of E|Y - Y'| is 2 over different draws, 1 over all pairs."""
    draws, y = torch.tensor([[4.0], [0.0]]), torch.tensor([1.0])
    assert number_metrics.crps_from_draws(draws, y).tolist() == [0]
    assert number_metrics.crps_from_draws(draws, y, fair=False).tolist() == [1]
    assert number_metrics.crps_from_draws(draws[:1], y, fair=False).tolist() == [3]


def test_fair_crps_of_few_draws_is_unbiased_and_the_empirical_is_too_large_as_said():
    y, draws = torch.zeros(100_000) + 0.5, torch.randn(3, 100_000)
    exact = float(number_metrics.crps_normal(torch.zeros(1), 1.0, torch.tensor([0.5])))
    assert five_sigma(number_metrics.crps_from_draws(draws, y), exact)
    biased = number_metrics.crps_from_draws(draws, y, fair=False)
    assert five_sigma(biased, exact + 2 / math.sqrt(math.pi) / (2 * 3))


def test_missing_draws_count_as_if_they_were_not_there(monkeypatch):
    monkeypatch.setattr(number_metrics, "_CHUNK", 20)  # Two elements a chunk.
    draws, y = torch.randn(10, 7, 3), torch.randn(7, 3)
    for example, count in enumerate((10, 1, 2, 5, 9, 10, 0)):
        draws[count:, example] = math.nan
    draws = draws[torch.randperm(10)]  # They need not be the last ones.
    scale = draws.abs() + 0.1
    functions = (
        number_metrics.crps_from_draws,
        number_metrics.pit,
        lambda draws, y: number_metrics.crps_normal_mixture(draws, 0.3, y),
    )
    for score in functions:
        found = score(draws, y)
        for example in range(6):
            there = draws[~draws[:, example, 0].isnan(), example].unsqueeze(1)
            torch.testing.assert_close(
                found[example : example + 1], score(there, y[example : example + 1]), equal_nan=True
            )
    assert number_metrics.crps_from_draws(draws, y)[[1, 6]].isnan().all()
    assert not number_metrics.crps_from_draws(draws, y, fair=False)[:6].isnan().any()
    mixture = number_metrics.crps_normal_mixture(draws, scale, y)
    there = ~draws[:, 3, 0].isnan()
    torch.testing.assert_close(
        mixture[3:4], number_metrics.crps_normal_mixture(draws[there, 3:4], scale[there, 3:4], y[3:4])
    )


def test_crps_of_counts_is_the_poissons():
    rate, y = 3.5, torch.tensor([0, 2, 9])
    draws = torch.poisson(torch.full((200_000, 3), rate))
    expected = scoringrules.crps_poisson(y.numpy(), rate)
    np.testing.assert_allclose(number_metrics.crps_from_draws(draws, y), expected, atol=0.02)


def test_crps_of_a_normal_is_scoringrules_and_its_integral():
    loc, scale, y = torch.randn(6, 2), torch.rand(6, 2) + 0.1, torch.randn(6, 2)
    found = number_metrics.crps_normal(loc, scale, y)
    np.testing.assert_allclose(found, scoringrules.crps_normal(y.numpy(), loc.numpy(), scale.numpy()), rtol=1e-5)
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.double)
    below = torch.distributions.Normal(loc[0, 0].double(), scale[0, 0].double()).cdf(grid)
    integral = torch.trapezoid((below - (grid >= y[0, 0]).double()).square(), grid)
    assert float(found[0, 0]) == pytest.approx(float(integral), abs=1e-4)
    # A predictive without spread: the absolute error, also where it is exactly right.
    point = number_metrics.crps_normal(torch.tensor([1.0, 2.0]), 0.0, torch.tensor([1.0, 5.0]))
    assert point.tolist() == [0, 3]


def test_crps_of_a_mixture_is_scoringrules_and_of_one_component_the_normals():
    loc, scale, y = torch.randn(9, 4, 2), torch.rand(9, 4, 2) + 0.1, torch.randn(4, 2)
    found = number_metrics.crps_normal_mixture(loc, scale, y)
    expected = scoringrules.crps_mixnorm(y.double().numpy(), loc.double().numpy(), scale.double().numpy(), m_axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    one = number_metrics.crps_normal_mixture(loc[:1], 0.7, y)
    torch.testing.assert_close(one, number_metrics.crps_normal(loc[0], 0.7, y))


def test_crps_of_a_mixture_is_the_mean_over_its_draws():
    loc, y = torch.tensor([[0.0], [3.0], [-1.0]]), torch.tensor([0.8])
    draws = (loc + 0.5 * torch.randn(3, 100_000)).view(-1, 1)
    exact = float(number_metrics.crps_normal_mixture(loc, 0.5, y))
    assert float(number_metrics.crps_from_draws(draws, y)) == pytest.approx(exact, abs=0.01)


def test_interval_score_by_hand_and_by_scoringrules():
    lower, upper = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 2.0])
    y = torch.tensor([1.0, 2.5, -1.0])
    # 2 wide; outside by 0.5 and 1 costs 2 / 0.2 each unit.
    assert number_metrics.interval_score(lower, upper, y, 0.8).tolist() == pytest.approx([2, 7, 12])
    expected = scoringrules.interval_score(y.numpy(), lower.numpy(), upper.numpy(), 0.2)
    np.testing.assert_allclose(number_metrics.interval_score(lower, upper, y, 0.8), expected, rtol=1e-6)


def test_the_true_quantiles_have_the_smallest_interval_score_and_its_closed_form():
    y = torch.randn(200_000)
    z = stats.norm.ppf(0.95)
    best = number_metrics.interval_score(torch.full_like(y, -z), torch.full_like(y, z), y, 0.9)
    # The mean distance outside is 2 (phi(z) - z (1 - Phi(z))); with the factor 2 / 0.1 the z of the width goes away.
    assert five_sigma(best, 2 / 0.1 * 2 * stats.norm.pdf(z))
    for other in (0.8 * z, 1.25 * z):
        bound = torch.full_like(y, other)
        assert number_metrics.interval_score(-bound, bound, y, 0.9).mean() > best.mean()


def test_coverage_and_width_of_intervals():
    lower, upper, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.9, 2.0])
    assert number_metrics.coverage(lower, upper, y) == pytest.approx(2 / 3)
    assert number_metrics.width(lower, upper) == 2


def test_pit_is_the_mid_rank():
    draws, y = torch.tensor([[1, 1, 1], [2, 2, 2], [2, 2, 2], [3, 3, 3]]), torch.tensor([0, 2, 4])
    lower, upper = number_metrics.pit_limits(draws, y)
    torch.testing.assert_close(lower, torch.tensor([0, 0.2, 0.8], dtype=torch.double))
    torch.testing.assert_close(upper, torch.tensor([0.2, 0.8, 1], dtype=torch.double))
    torch.testing.assert_close(number_metrics.pit(draws, y), torch.tensor([0.1, 0.5, 0.9], dtype=torch.double))


def test_pit_of_a_perfect_predictive_is_uniform():
    loc = 3 * torch.randn(20_000)
    draws, y = loc + torch.randn(9, 20_000), loc + torch.randn(20_000)
    ranks = (number_metrics.pit(draws, y) * 10 - 0.5).round().long()
    assert stats.chisquare(torch.bincount(ranks, minlength=10)).pvalue > 1e-4
    # A predictive too narrow has too many at both ends.
    narrow = (number_metrics.pit(loc + 0.5 * torch.randn(9, 20_000), y) * 10 - 0.5).round().long()
    assert stats.chisquare(torch.bincount(narrow, minlength=10)).pvalue < 1e-100


def test_pit_of_counts_has_its_mean_in_the_middle():
    rate = 2 * torch.rand(50_000)
    draws, y = torch.poisson(rate.expand(7, -1)), torch.poisson(rate)
    assert five_sigma(number_metrics.pit(draws, y), 0.5)


@pytest.mark.parametrize("num_samples", [4, 200])
def test_shares_of_a_perfect_predictive_of_counts_are_the_levels(num_samples):
    rate = 2 * torch.rand(20_000)
    limits = number_metrics.pit_limits(torch.poisson(rate.expand(num_samples, -1)), torch.poisson(rate))
    levels = torch.tensor(number_metrics.LEVELS, dtype=torch.double)
    error = number_metrics.observed_shares(*limits) - levels
    assert (error.abs() < 5 * (levels * (1 - levels) / 20_000).sqrt()).all()
    assert number_metrics.quantile_calibration_error(*limits) == pytest.approx(float(error.abs().mean()), rel=1e-9)
    # The middle alone is not uniform: ten times the 0.0023 that 20,000 uniform values have.
    assert number_metrics.quantile_calibration_error((limits[0] + limits[1]) / 2) > 10 * 0.326 / math.sqrt(20_000)


def test_quantile_calibration_error_by_hand():
    pit = torch.tensor([0.05, 0.15, 0.15, 0.95])
    assert number_metrics.observed_shares(pit, levels=(0.1, 0.5)).tolist() == [0.25, 0.75]
    assert number_metrics.quantile_calibration_error(pit, levels=(0.1, 0.5)) == pytest.approx((0.15 + 0.25) / 2)
    # All y above every quantile: the mean of the levels.
    assert number_metrics.quantile_calibration_error(torch.ones(5)) == pytest.approx(0.5)


def test_quantile_calibration_error_of_a_perfect_predictive_is_as_documented():
    found = torch.tensor([number_metrics.quantile_calibration_error(torch.rand(1000)) for _ in range(500)])
    assert five_sigma(found, 0.326 / math.sqrt(1000))


def test_binary_scores_are_torchmetrics_and_those_of_two_classes():
    probs = torch.rand(500, 4)
    labels = torch.bernoulli(probs.square()).long()
    two = torch.stack((1 - probs.flatten(), probs.flatten()), 1)
    assert metrics.binary_accuracy(probs, labels) == pytest.approx(binary_accuracy(probs, labels).item())
    assert metrics.binary_accuracy(probs, labels) == metrics.accuracy(two, labels.flatten())
    assert metrics.binary_brier(probs, labels) == pytest.approx(metrics.brier(two, labels.flatten()) / 2)
    expected = binary_calibration_error(probs.flatten(), labels.flatten(), n_bins=15, norm="l1")
    assert metrics.binary_ece(probs, labels) == pytest.approx(expected.item(), abs=1e-5)


def test_binary_ece_sees_a_probability_that_is_always_too_high():
    labels = torch.bernoulli(torch.full((100_000,), 0.5))
    assert metrics.binary_ece(torch.full((100_000,), 0.6), labels) == pytest.approx(0.1, abs=0.01)
    probability, share, count = metrics.binary_reliability(torch.full((4,), 0.6), torch.tensor([0, 0, 0, 1]), bins=2)
    assert (float(probability[1]), float(share[1]), count.tolist()) == (pytest.approx(0.6), 0.25, [0, 4])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: number_metrics.rmse(a, a.unsqueeze(1)), ["[5]", "[5, 1]"]),
        (lambda a: number_metrics.interval_score(a, a, a, 90), ["90", "between 0 and 1", "0.9"]),
        (lambda a: number_metrics.crps_from_draws(a.expand(3, 5).T, a), ["[5, 3]", "[S, N, ...]"]),
        (lambda a: number_metrics.crps_normal(a, a[:2], a), ["[2]", "[5]"]),
        (lambda a: number_metrics.quantile_calibration_error(a, levels=(0.0, 0.5)), ["0.0", "between 0 and 1"]),
    ],
)
def test_shapes_and_levels_that_do_not_fit_are_refused(call, words):
    with pytest.raises(UserError) as refused:
        call(torch.rand(5))
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)
