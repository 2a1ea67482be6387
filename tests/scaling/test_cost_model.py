"""The cost model by statistics: it finds what simulated steps were made with, and its bands cover what they claim."""

import numpy as np
import pytest

from ppl_bnn.scaling.cost_model import CostModel, Link, Point, fit_cost_model

NETWORKS = {"bnn": (0.9, 75e6), "cnn": (0.7, 38e6)}
LINKS = (Link(25e6), Link(100e6), Link(100e6, 0.02), None)


def truth(random):
    """Constants as the prior has them, and a little compute noise."""
    return {
        "latency": np.exp(random.normal(np.log(1e-4), 0.5)),
        "bandwidth": np.exp(random.normal(np.log(1e9), 0.5)),
        "copy": np.exp(random.normal(np.log(1e-9), 0.5)),
        "overlap": random.uniform(0.2, 0.9),
        "goodput": random.uniform(0.8, 0.97),
        "trips": np.exp(random.normal(np.log(2.0), 0.3)),
        **{f"compute {name}": seconds for name, (seconds, _) in NETWORKS.items()},
    }


def simulated(constants, random, *, sizes=(1, 2, 4), links=LINKS, steps=20, noise=0.03, error=0.005):
    exact = CostModel({name: np.array([value]) for name, value in constants.items()})
    points = []
    for name, (_, bytes_) in NETWORKS.items():
        for ranks in sizes:
            for link in links if ranks > 1 else (None,):
                seconds = exact.step(Point(name, ranks, 4, bytes_, link=link))[0] * np.exp(random.normal(0, error))
                points.append(Point(name, ranks, 4, bytes_, seconds * np.exp(random.normal(0, noise, steps)), link))
    return exact, points


def test_the_formula_is_the_ring_allreduce():
    constants = {
        "latency": 1e-3,
        "bandwidth": 1e8,
        "copy": 2e-9,
        "overlap": 0.75,
        "goodput": 0.8,
        "trips": 2.0,
        "compute net": 0.9,
    }
    exact = CostModel({name: np.array([value]) for name, value in constants.items()})

    def step(ranks, link=None):
        return exact.step(Point("net", ranks, 4, 40e6, link=link))[0]

    assert step(1) == 0.9
    # 2 (4 - 1) rounds of 4 messages' latency and 10 MB: 0.624 s, a quarter of it exposed; 0.08 s of copying; and the
    # same rounds of the small message.
    assert step(4) == pytest.approx(0.9 + 0.08 + 0.25 * 0.624 + 0.006)
    # 0.8 of 12.5 MB/s are ten times less: 6.024 s, and back-propagation's 0.6 s hide no more than themselves.
    assert step(4, Link(1.25e7)) == pytest.approx(0.9 + 0.08 + 6.024 - 0.6 + 0.006)
    # Each of the four waits for two delays a round, the small message for one.
    assert step(4, Link(1.25e7, 0.01)) == pytest.approx(0.9 + 0.08 + 6.024 + 6 * 4 * 0.02 - 0.6 + 0.006 + 0.06)


def test_known_constants_are_recovered():
    constants = {
        "latency": 3e-3,
        "bandwidth": 4e8,
        "copy": 2e-9,
        "overlap": 0.5,
        "goodput": 0.9,
        "trips": 3.0,
        "compute bnn": 0.9,
        "compute cnn": 0.7,
    }
    _, points = simulated(constants, np.random.default_rng(1), sizes=(1, 2, 4, 16, 64), noise=0.005)
    model = fit_cost_model(points, num_samples=1, model_error=0.005)
    found = {name: draws[0] for name, draws in model.draws.items()}
    assert found == pytest.approx(constants, rel=0.1)


def test_ninety_percent_bands_cover_nine_in_ten():
    """Predictions at 64 ranks of fits to 1 to 4, over a machine of its own each time."""
    random = np.random.default_rng(2)
    inside = []
    for _ in range(10):
        exact, points = simulated(truth(random), random)
        model = fit_cost_model(points, num_samples=30, model_error=0.01)
        for name, (_, bytes_) in NETWORKS.items():
            for link in (Link(50e6, 0.001), None):
                new = Point(name, 64, 4, bytes_, link=link)
                low, high = np.quantile(model.step(new), (0.05, 0.95))
                inside.append(low <= exact.step(new)[0] <= high)
    # 40 in groups of 4: nine in ten, and 3 standard errors of the 10 groups' mean.
    assert 0.9 - 3 * (0.09 / 10) ** 0.5 <= np.mean(inside) <= 1.0


@pytest.mark.parametrize("error", [0.02, 0.2])
def test_bands_for_a_new_link_cover_a_machine_that_the_formula_does_not_fit(error):
    """Each point is off by the error; a fit to three speeds finds out and predicts a run at a fourth."""
    random = np.random.default_rng(4)
    inside, widths = [], []
    for _ in range(8):
        links = (Link(3e6), Link(12e6), Link(48e6))
        exact, points = simulated(truth(random), random, sizes=(1, 2), links=links, noise=0.05, error=error)
        model = fit_cost_model(points, num_samples=25)
        for name, (_, bytes_) in NETWORKS.items():
            new = Point(name, 2, 4, bytes_, link=Link(24e6))
            taken = exact.step(new)[0] * np.exp(random.normal(0, error))
            low, high = np.quantile(model.measured(new), (0.05, 0.95))
            inside.append(low <= taken <= high)
            widths.append(np.log(high / low))
    # 16 in pairs, 3 standard errors of the 8 pairs' mean; and no wider than twice what an error of that size needs.
    assert np.mean(inside) >= 0.9 - 3 * (0.09 / 8) ** 0.5
    assert np.median(widths) < 2 * 3.3 * max(error, 0.05)


def test_what_is_not_measured_stays_uncertain():
    """Without a second rank nothing is known of messages; with limited links, the band is narrow."""
    random = np.random.default_rng(3)
    constants = truth(random)

    def width(sizes):
        _, points = simulated(constants, random, sizes=sizes)
        model = fit_cost_model(points, num_samples=60)
        low, high = np.quantile(model.step(Point("bnn", 256, 4, 75e6)), (0.05, 0.95))
        return high / low

    assert width((1,)) > 2 * width((1, 2, 8, 64))


@pytest.mark.parametrize("seconds", [[0.1], [0.1, float("nan")], [0.1, 0.0]])
def test_points_that_cannot_be_fitted_are_named(seconds):
    with pytest.raises(ValueError, match="vgg on 2 ranks needs at least 2 positive, finite measured steps"):
        fit_cost_model([Point("vgg", 2, 4, 1e6, seconds)])
    with pytest.raises(ValueError, match="got none"):
        fit_cost_model([])
