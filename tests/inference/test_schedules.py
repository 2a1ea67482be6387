"""The KL weight's schedules."""

import pytest

from ppl_bnn import kl_schedule


def test_schedules():
    constant, linear = kl_schedule("constant", 0.3), kl_schedule("linear", 0.5, ramp=0.25)
    assert constant(0.0) == constant(1.0) == 0.3
    assert linear(0.125) == pytest.approx(0.25)
    assert linear(0.25) == linear(1.0) == 0.5
    cyclical = kl_schedule("cyclical", 1.0, ramp=0.5, cycles=4)
    assert cyclical(0.25 + 0.0625) == pytest.approx(cyclical(0.0625)) == pytest.approx(0.5)
    assert cyclical(0.25 + 0.2) == 1.0
    # A weight of zero would drop the prior from the model.
    assert linear(0.0) > 0
    assert cyclical(0.25) > 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "step"}, "kl_schedule must be"),
        ({"name": "linear", "kl_weight": 0.0}, "kl_weight must be positive"),
        ({"name": "linear", "ramp": 0.0}, "fraction in"),
        ({"name": "cyclical", "cycles": 0}, "kl_cycles must be at least 1, got 0"),
    ],
)
def test_schedules_refuse(keywords, message):
    with pytest.raises(ValueError, match=message):
        kl_schedule(**keywords)
