"""Trainings and predictions at fixed seeds give the numbers they gave before: `tools/golden.py` wrote them.

Not bitwise: another compiler or another number of threads adds up in another order, and a training carries the
difference on. On one machine a change that moves no number reproduces them to the last bit.
"""

import json
import runpy
from pathlib import Path

import pytest

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "golden.py"))
THERE = json.loads(GOLDEN["FILE"].read_text())


def assert_close(found, golden):
    assert found.keys() == golden.keys()
    for name, value in golden.items():
        # A rounding may turn one example's answer.
        one_example = 1.01 / GOLDEN["NUM_DATA"] if name in ("accuracy", "ece") else 0.0
        assert found[name] == pytest.approx(value, rel=1e-4, abs=one_example), name


def test_the_numbers_are_of_the_generator_that_is_tested():
    assert THERE["generator"] == GOLDEN["GENERATOR"]


@pytest.mark.parametrize("network", GOLDEN["NETWORKS"])
@pytest.mark.parametrize("name", GOLDEN["TRAININGS"])
def test_a_training_gives_the_losses_of_before(network, name):
    _, _, history = GOLDEN["train"](network, name)
    golden = THERE[network]["trainings"][name]
    assert len(history) == len(golden) == 3
    for row, expected in zip(history, golden, strict=True):
        assert_close(row, expected)


@pytest.mark.parametrize("network", GOLDEN["NETWORKS"])
def test_a_prediction_gives_the_summary_of_before(network):
    net, guide, _ = GOLDEN["train"](network, "plain")
    for method in GOLDEN["METHODS"]:
        assert_close(GOLDEN["summary"](network, net, guide, method), THERE[network]["predictions"][method])
