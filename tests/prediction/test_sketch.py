"""The quantile sketch: exact while it can be, within its stated error after that, and the same in any calls."""

import math

import pytest
import torch

from ppl_bnn.errors import UserError
from ppl_bnn.prediction.sketch import QuantileSketch

LEVELS = torch.tensor([0.005, 0.05, 0.1, 0.25, 0.4, 0.5, 0.7, 0.9, 0.95, 0.99], dtype=torch.double)


def sketch_of(draws, **options):
    sketch = QuantileSketch(draws.shape[1:], dtype=draws.dtype, **options)
    sketch.add(draws)
    return sketch


def zigzag(draws):
    """Smallest, largest, second smallest, ...: each compaction sees both ends."""
    return torch.stack((draws, draws.flip(0)), 1).flatten(0, 1)[: len(draws)]


def inward(draws):
    """Values that arrive from both ends inward, so that the middle is compacted least often."""
    return zigzag(draws).flip(0)


def blocks(draws):
    """Ascending blocks of an awkward length in descending order."""
    return torch.cat(draws.split(97)[::-1])


ORDERS = {
    "sorted": lambda draws: draws,
    "reversed": lambda draws: draws.flip(0),
    "random": lambda draws: draws[torch.randperm(len(draws))],
    "zigzag": zigzag,
    "inward": inward,
    "blocks": blocks,
    "tied": lambda draws: (draws[torch.randperm(len(draws))] / 50).floor(),
}


@pytest.mark.parametrize("shape", [(4,), (3, 2, 2)])
@pytest.mark.parametrize("num_samples", [1, 2, 100, 256])
def test_quantiles_of_up_to_capacity_draws_are_torchs(num_samples, shape):
    draws = torch.randn(num_samples, *shape, dtype=torch.double)
    sketch = sketch_of(draws)
    torch.testing.assert_close(sketch.quantiles(LEVELS), draws.quantile(LEVELS, 0))
    assert not sketch.rank_error.any()
    assert sketch_of(torch.randn(257, 2)).rank_error.all()


@pytest.mark.parametrize("capacity", [16, 37, 256])
@pytest.mark.parametrize("order", ORDERS)
def test_quantiles_lie_within_the_stated_error(order, capacity):
    """Between the draws' own quantiles at p - e and p + e, whatever the order, at every number of draws looked at."""
    draws = ORDERS[order](torch.arange(3000, dtype=torch.double)).unsqueeze(1)
    sketch, done = QuantileSketch((1,), capacity=capacity, dtype=torch.double), 0
    for num_samples in (capacity, capacity + 1, 300, 500, 777, 1500, 2999, 3000):
        sketch.add(draws[done:num_samples])
        done = num_samples
        error = float(sketch.rank_error[0])
        found = sketch.quantiles(LEVELS)[:, 0]
        for level, quantile in zip(LEVELS.tolist(), found.tolist(), strict=True):
            # 1e-9 is for the rounding of positions alone.
            low, high = max(0.0, level - error), min(1.0, level + error)
            assert draws[:done].quantile(low) - 1e-9 <= quantile <= draws[:done].quantile(high) + 1e-9


def test_the_stated_error_is_reached_but_for_little():
    """A bound ten times too large would be no bound to plan by: some order comes to within a factor of 4."""
    reached = 0.0
    for order in ("sorted", "reversed", "zigzag", "inward", "blocks"):
        draws = ORDERS[order](torch.arange(2000, dtype=torch.double)).unsqueeze(1)
        sketch = sketch_of(draws)
        levels = torch.linspace(0.01, 0.99, 197, dtype=torch.double)
        gap = (sketch.quantiles(levels)[:, 0] / 1999 - levels).abs().max()
        reached = max(reached, float(gap / sketch.rank_error[0]))
    assert 0.25 < reached <= 1


def test_the_documented_errors_hold():
    documented = {256: 0, 400: 0.003, 1000: 0.009, 2000: 0.017, 10_000: 0.044, 100_000: 0.11}
    sketch, done = QuantileSketch((1,)), 0
    for num_samples, error in documented.items():
        sketch.add(torch.randn(num_samples - done, 1))
        done = num_samples
        assert float(sketch.rank_error[0]) == pytest.approx(error, abs=10 ** -(3 if error < 0.1 else 2) / 2)


def test_independent_draws_have_a_smaller_error_than_the_worst_order():
    for num_samples, documented in ((1000, 0.003), (10_000, 0.006)):
        draws = torch.rand(num_samples, 200)
        exact = draws.double().quantile(LEVELS, 0)
        root = (sketch_of(draws).quantiles(LEVELS) - exact).square().mean().sqrt()
        assert float(root) == pytest.approx(documented, rel=0.25)


def test_the_result_does_not_depend_on_how_draws_are_divided_among_calls():
    draws = torch.randn(1500, 3, 2)
    whole = sketch_of(draws)
    for sizes in ([1] * 1500, [255, 1, 1, 2, 600, 0, 641], [700, 800]):
        parts = QuantileSketch((3, 2))
        for part in draws.split(sizes):
            parts.add(part)
        for name, value in whole.state().items():
            torch.testing.assert_close(parts.state()[name], value, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(parts.rank_error, whole.rank_error)


def test_a_row_has_the_quantiles_of_its_own_draws_alone():
    draws = torch.randn(900, 5, 2)
    counts = [900, 0, 300, 300, 650]
    together = QuantileSketch((5, 2))
    for start in range(0, 900, 50):
        # In any order of rows, and with rows of unlike counts in one call.
        rows = torch.tensor([row for row in (4, 0, 3, 2) if counts[row] > start])
        together.add(draws[start : start + 50, rows], rows)
    assert together.counts.tolist() == counts
    found = together.quantiles([0.1, 0.5])
    assert found[:, 1].isnan().all()
    for row in (0, 2, 3, 4):
        alone = sketch_of(draws[: counts[row], row : row + 1])
        assert torch.equal(found[:, row], alone.quantiles([0.1, 0.5])[:, 0])
        assert together.rank_error[row] == alone.rank_error[0]


def test_rows_of_unlike_counts_are_extended_in_one_call():
    draws = torch.randn(800, 3)
    sketch = QuantileSketch((3,))
    sketch.add(draws[:500, [0]], torch.tensor([0]))
    sketch.add(draws[:90, [1]], torch.tensor([1]))
    sketch.add(torch.stack((draws[90:390, 1], draws[500:, 0]), 1), torch.tensor([1, 0]))
    for row, count in ((0, 800), (1, 390)):
        expected = sketch_of(draws[:count, [row]]).quantiles([0.3])
        assert torch.equal(sketch.quantiles([0.3])[:, row], expected[:, 0])


def test_a_restored_sketch_goes_on_bitwise():
    draws = torch.randn(1300, 4, dtype=torch.double)
    sketch = sketch_of(draws[:700], capacity=64)
    sketch.add(draws[700:800, :2], torch.tensor([0, 1]))
    saved = {name: value.clone() for name, value in sketch.state().items()}
    restored = QuantileSketch.from_state(saved)
    for each in (sketch, restored):
        each.add(draws[800:])
    assert torch.equal(restored.quantiles(LEVELS), sketch.quantiles(LEVELS))
    assert torch.equal(restored.rank_error, sketch.rank_error)
    for name, value in sketch.state().items():
        torch.testing.assert_close(restored.state()[name], value, rtol=0, atol=0, equal_nan=True)
    # What was saved is not what goes on being written to.
    assert saved["counts"].tolist() == [800, 800, 700, 700]


def test_memory_does_not_grow_with_the_draws():
    few, many = sketch_of(torch.randn(10, 6)), sketch_of(torch.randn(20_000, 6))
    sizes = [{name: value.nbytes for name, value in sketch.state().items()} for sketch in (few, many)]
    assert sizes[0] == sizes[1] == {"values": 6 * 256 * 4, "counts": 6 * 8}


def test_chunks_change_nothing(monkeypatch):
    draws = torch.randn(600, 7, 2)
    whole = sketch_of(draws, capacity=32).quantiles(LEVELS)
    monkeypatch.setattr("ppl_bnn.prediction.sketch._CHUNK", 130)
    assert torch.equal(sketch_of(draws, capacity=32).quantiles(LEVELS), whole)


def test_infinite_draws_and_counts_have_quantiles():
    draws = torch.tensor([[-math.inf], [1.0], [2.0], [math.inf], [math.inf]])
    assert sketch_of(draws).quantiles([0.125, 0.5, 0.75, 0.9]).flatten().tolist() == [-math.inf, 2, math.inf, math.inf]
    sketch = QuantileSketch((1,))
    sketch.add(torch.tensor([[3], [5]]))
    assert sketch.quantiles([0.5]).tolist() == [[4]]


@pytest.mark.parametrize("levels", [[0.0], [0.5, 1.0], [-0.1], [95], [math.nan], [[0.5]]])
def test_levels_outside_0_and_1_are_refused(levels):
    with pytest.raises(UserError, match=r"between 0 and 1, both excluded, got .*has \[0.05, 0.95\]"):
        sketch_of(torch.randn(3, 2)).quantiles(levels)


def test_draws_that_do_not_fit_are_refused_and_not_added():
    sketch = sketch_of(torch.randn(5, 3, 2))
    before = sketch.state()
    for draws, message in (
        (torch.randn(5, 2, 2), r"\[5, 2, 2\].*expects s draws of 3 rows, \[s, 3, 2\]"),
        (torch.full((1, 3, 2), math.nan), "NaN"),
    ):
        with pytest.raises(UserError, match=message):
            sketch.add(draws)
    torch.testing.assert_close(sketch.state(), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(UserError, match=r"capacity is 8.*at least 16"):
        QuantileSketch((3,), capacity=8)
