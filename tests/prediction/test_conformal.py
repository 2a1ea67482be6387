"""Split-conformal intervals and sets: small cases by hand, and coverage on fresh data within its binomial error."""

import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ppl_bnn.errors import UserError
from ppl_bnn.prediction.conformal import conformal_interval, conformal_sets


def assert_covers(hits, num_held, level, *, exact=True):
    """Hits on fresh data are beta-binomial: one held-out set has its own coverage, Beta(k, n + 1 - k)."""
    rank = math.ceil((num_held + 1) * level - 1e-9)
    law = stats.betabinom(hits.numel(), rank, num_held + 1 - rank)
    count = int(hits.sum())
    assert law.cdf(count) > 1e-5, f"{count} of {hits.numel()} are inside, too few for {level}"
    assert not exact or law.sf(count) > 1e-5, f"{count} of {hits.numel()} are inside, too many for {level}"


def wrong_intervals(number, factor):
    """y with a scale that grows with x, and intervals of a predictive whose location and scale are both wrong."""
    x = torch.rand(number)
    y = torch.sin(6 * x) + (0.1 + x) * torch.distributions.StudentT(3.0).sample((number,))
    middle, half = torch.sin(6 * x) + 0.3, factor * 1.64 * (0.1 + x)
    return middle - half, middle + half, y


def test_an_interval_by_hand():
    """Scores max(lower - y, y - upper) are -1, 2, 0, 1; the 3rd smallest of 4, for 5 * 0.6 = 3, is 1."""
    lower, upper = torch.zeros(4), torch.full((4,), 2.0)
    y = torch.tensor([1.0, 4.0, 0.0, -1.0])
    new = torch.tensor([10.0, 20.0])
    assert [bound.tolist() for bound in conformal_interval(lower, upper, y, new, new + 1, 0.6)] == [[9, 19], [12, 22]]
    # The smallest is -1: intervals shrink by 1 on each side, and those that are too narrow become their middle.
    low, high = conformal_interval(lower, upper, y, torch.tensor([0.0, 0.0]), torch.tensor([4.0, 1.0]), 0.2)
    assert (low.tolist(), high.tolist()) == ([1, 0.5], [3, 0.5])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("factor", [0.2, 1.0, 12.0])
def test_intervals_of_a_wrong_predictive_cover_as_promised(factor, level):
    lower_held, upper_held, y_held = wrong_intervals(999, factor)
    lower, upper, y = wrong_intervals(20_000, factor)
    low, high = conformal_interval(lower_held, upper_held, y_held, lower, upper, level)
    assert_covers((low <= y) & (y <= high), 999, level)
    if factor != 1:  # Without, they are far off.
        with pytest.raises(AssertionError, match=f"for {level}"):
            assert_covers((lower <= y) & (y <= upper), 999, level)


def test_coverage_over_held_out_sets_is_between_level_and_level_plus_1_over_n_plus_1():
    """The mean over 4000 held-out sets of 12, where (n + 1) level = 10.4 is rounded to 11: 11 / 13."""
    hits = []
    for _ in range(4000):
        held, fresh = wrong_intervals(12, 0.5), wrong_intervals(5, 0.5)
        low, high = conformal_interval(*held, fresh[0], fresh[1], 0.8)
        hits.append(((low <= fresh[2]) & (fresh[2] <= high)).double().mean())
    hits = torch.stack(hits)
    assert abs(float(hits.mean()) - 11 / 13) < 5 * float(hits.std()) / math.sqrt(4000)


def test_each_number_of_y_has_its_own_margin():
    y_held, y = torch.randn(500, 2, 3), torch.randn(50_000, 2, 3)
    scale = torch.tensor([0.1, 1.0, 5.0])
    bounds, new = torch.ones_like(y_held), torch.ones_like(y)
    low, high = conformal_interval(-bounds, bounds, y_held * scale, -new, new, 0.9)
    inside = (low <= y * scale) & (y * scale <= high)
    for row in range(2):
        for column in range(3):
            assert_covers(inside[:, row, column], 500, 0.9)


def test_a_set_by_hand():
    """Labels with 0, 0.7, 0.7 and 0 before them; the 4th smallest of 4, for 5 * 0.8 = 4, is 0.7, the 2nd is 0."""
    held = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.2, 0.1, 0.7], [0.1, 0.9, 0.0]]).double()
    labels = torch.tensor([0, 1, 0, 1])
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.7, 0.2], [0.72, 0.18, 0.1]]).double()
    sets = conformal_sets(held, labels, probs, 0.8)
    assert sets.tolist() == [[False, True, True], [False, True, True], [True, False, False]]
    assert conformal_sets(held, labels, probs, 0.4).long().tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_a_randomized_set_by_hand():
    """u of a seed is known: the score is the probability before a class plus u times its own."""
    u = torch.rand(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    held_u, new_u = (torch.rand(number, 1, dtype=torch.float64, generator=generator) for number in (1, 2))
    assert torch.equal(u, held_u)
    held, probs = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    limit = 0.6 + held_u.item() * 0.4
    scores = torch.tensor([[0.7 + 0.3 * new_u[0], 0.7 * new_u[0]], [0.9 * new_u[1], 0.9 + 0.1 * new_u[1]]])
    assert torch.equal(conformal_sets(held, torch.tensor([1]), probs, 0.5, seed=7), scores <= limit)


def class_predictive(number, *, power):
    """Labels of known probabilities, and those of a predictive that is too sure (power > 1) or not sure enough."""
    probs = (2 * torch.randn(number, 6)).softmax(1).double()
    labels = torch.multinomial(probs, 1)[:, 0]
    wrong = probs.pow(power)
    return wrong / wrong.sum(1, keepdim=True), labels


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("power", [0.3, 1.0, 4.0])
def test_sets_of_a_wrong_predictive_cover_as_promised(power, level):
    held, labels_held = class_predictive(999, power=power)
    probs, labels = class_predictive(20_000, power=power)
    sets = conformal_sets(held, labels_held, probs, level, seed=1)
    assert_covers(sets[range(20_000), labels], 999, level)
    # Without random numbers they cover at least as often, hold the most probable class, and are the same again.
    sets = conformal_sets(held, labels_held, probs, level)
    assert_covers(sets[range(20_000), labels], 999, level, exact=False)
    assert sets[range(20_000), probs.argmax(1)].all()
    assert torch.equal(sets, conformal_sets(held, labels_held, probs, level))


def test_sets_are_larger_where_the_predictive_is_less_sure():
    held, labels_held = class_predictive(2000, power=1)
    probs, _ = class_predictive(2000, power=1)
    size = conformal_sets(held, labels_held, probs, 0.9).sum(1).double()
    sure = probs.max(1).values > 0.9
    assert size[sure].mean() < 1.5 < 2.5 < size[~sure].mean()


def test_sets_on_digits_cover_as_promised():
    """A classifier of 100 real digits that is far too sure: its 95% are wrong in more than 5%."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x))
    train, held, fresh = (part.numpy() for part in order.split([100, 697, 1000]))
    classifier = LogisticRegression(C=1e4, max_iter=1000).fit(x[train] / 16, y[train])
    probs = torch.from_numpy(classifier.predict_proba(x / 16))
    labels = torch.from_numpy(y)
    sure = probs[fresh].max(1)
    assert (sure.indices == labels[fresh])[sure.values > 0.95].double().mean() < 0.95
    for level, seed in ((0.95, None), (0.95, 0), (0.8, 0)):
        sets = conformal_sets(probs[held], labels[held], probs[fresh], level, seed=seed)
        assert_covers(sets[range(1000), labels[fresh]], 697, level, exact=seed is not None)


@pytest.mark.parametrize(("level", "needed"), [(0.5, 1), (0.9, 9), (0.55, 2), (0.95, 19), (0.99, 99), (0.999, 999)])
def test_the_level_says_how_many_held_out_examples_it_needs(level, needed):
    """n >= level / (1 - level), and with just as many the margin is the largest score."""
    y = torch.arange(float(needed))
    zero = torch.zeros(needed)
    _, high = conformal_interval(zero - 9999, zero, y, zero[:1], zero[:1], level)
    assert high.tolist() == [needed - 1]
    with pytest.raises(
        UserError, match=rf"level of {level} needs at least {needed} held-out examples, got {needed - 1}"
    ):
        conformal_interval(*[zero[1:]] * 3, zero[:1], zero[:1], level)


def test_the_rank_is_not_a_victim_of_binary_fractions():
    """(99 + 1) 0.55 is 55.00000000000001 in float64; the rank is 55 all the same."""
    y = torch.arange(1.0, 100.0)
    zero = torch.zeros(99)
    assert conformal_interval(zero - 9999, zero, y, zero[:1], zero[:1], 0.55)[1].tolist() == [55]


GOOD = {"a": torch.zeros(50), "p": torch.full((50, 4), 0.25), "k": torch.zeros(50, dtype=torch.long)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, p, k: conformal_interval(a, a, a, a, a, 90), "level is 90, expected.*0.9 for 90%"),
        (lambda a, p, k: conformal_interval(a, a, a, a, a, math.nan), "level is nan"),
        (lambda a, p, k: conformal_interval(a, a[:, None], a, a, a, 0.9), r"upper_held has shape \[50, 1\]"),
        (lambda a, p, k: conformal_interval(a, a, a, a, a[:3], 0.9), r"upper has shape \[3\], expected \[50\]"),
        (lambda a, p, k: conformal_interval(a, a, a / 0, a, a, 0.9), "y_held has values that are NaN"),
        (lambda a, p, k: conformal_interval(a, a, a, a, a + math.inf, 0.9), "upper has values that are NaN or inf"),
        (lambda a, p, k: conformal_sets(p, k, p, 0.0), "level is 0.0"),
        (lambda a, p, k: conformal_sets(p, k, p[:, :3], 0.9), r"probs has shape \[50, 3\] beside probs_held \[50, 4\]"),
        (lambda a, p, k: conformal_sets(p, k[:7], p, 0.9), "labels_held has 7 labels, expected 50"),
        (lambda a, p, k: conformal_sets(p, k + 4, p, 0.9), "labels_held are from 4 to 4"),
        (lambda a, p, k: conformal_sets(p.log(), k, p, 0.9), "probs_held are not all prob.*softmax"),
        (lambda a, p, k: conformal_sets(p, k, p * math.nan, 0.9), "probs has values that are NaN"),
        (lambda a, p, k: conformal_sets(p, k, p, 0.99), "needs at least 99 held-out examples, got 50"),
    ],
)  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as refused:
        call(**GOOD)
    assert "\n" not in str(refused.value)
