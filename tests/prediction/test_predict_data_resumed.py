"""A prediction from data that are not in memory, interrupted and resumed, and added to."""

import time

import pytest
import torch
from items_read import Items, N, X, Y, check_same, drawn
from small_posteriors import dense
from small_regressions import regression

from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.prediction import chunks, kept
from ppl_bnn.results import netcdf
from ppl_bnn.results.predictive import to_inference_data
from ppl_bnn.results.saved_draws import read_predictive


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 40 examples for a batch_size of 10 or 20, read 16 at a time."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 40)
    monkeypatch.setattr(chunks, "PART_ROWS", 16)


class StopsAfter:
    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("calls", [1, 4, 7])
@pytest.mark.parametrize("more", [{}, {"sampling": "antithetic"}, {"log_likelihood": False}], ids=str)
def test_an_interrupted_prediction_resumes_with_the_chunks_that_are_left(calls, more):
    net, guide = dense()
    saved = []
    with pytest.raises(Interrupted, match="of the examples"):
        drawn(net, guide, Items(), should_stop=StopsAfter(calls), save=saved.append, **more)
    (before,) = saved
    assert len(before.draws) in (40, 80, N)
    assert before.scores()
    items = Items()
    check_same(drawn(net, guide, items, so_far=before, **more), drawn(net, guide, Items(), **more))
    done = int((before.draws == 6).sum())
    assert items.read == [0] * done + [1] * (N - done)


def test_an_interrupted_prediction_resumes_from_its_file(tmp_path):
    net, guide = dense()
    saved = []
    with pytest.raises(Interrupted):
        drawn(net, guide, Items(), should_stop=StopsAfter(8), save=saved.append)
    netcdf.save(to_inference_data(saved[0], guide=guide, norms=False), tmp_path / "partial.nc")
    before = read_predictive(tmp_path / "partial.nc")
    assert before.draws.unique().tolist() == [3, 6]
    # Single probabilities are rounded in the file.
    found = drawn(net, guide, Items(), so_far=before)
    check_same(found, drawn(net, guide, Items()), but=("means",))
    torch.testing.assert_close(found.means, drawn(net, guide, X, Y).means, rtol=0, atol=1e-4)


def test_draws_and_examples_are_added_to_an_earlier_result():
    model, guide, x, y = regression()
    x, y = x.repeat(8, 1)[:N], y.repeat(8)[:N]
    few = drawn(model, guide, Items(x[:80], y[:80]), num_samples=4, keep=[3, 50, 90][:2])
    found = drawn(model, guide, Items(x, y), num_samples=6, keep=[3, 50, 90], so_far=few)
    expected = drawn(model, guide, Items(x, y), num_samples=6, keep=[3, 50, 90])
    check_same(found, expected)
    assert found.sketch is not None
    torch.testing.assert_close(found.quantiles([0.1, 0.9]), expected.quantiles([0.1, 0.9]), rtol=0, atol=0)


def test_draws_that_were_all_kept_are_added_to_where_all_would_be_too_much(monkeypatch):
    model, guide, x, y = regression()
    x, y = x.repeat(8, 1)[:N], y.repeat(8)[:N]
    few = drawn(model, guide, Items(x, y), num_samples=4)
    monkeypatch.setattr(kept, "KEPT_EXAMPLES", 30)
    monkeypatch.setattr(kept, "KEPT_BYTES", 2000)
    monkeypatch.setattr(kept, "SKETCH_BYTES", 1)
    found, expected = (drawn(model, guide, Items(x, y), so_far=before) for before in (few, None))
    assert len(few.kept) == N
    assert len(found.kept) == 30
    check_same(found, expected, but=("log_sum",))
    torch.testing.assert_close(found.log_sum, expected.log_sum)
    torch.testing.assert_close(found.quantiles([0.2]), expected.quantiles([0.2]), rtol=0, atol=0)


def test_an_earlier_result_of_other_data_is_refused():
    net, guide = dense()
    before = drawn(net, guide, Items(), num_samples=2)
    for data, message in (
        (Items(y=(Y + 1) % 3), "so_far has other labels"),
        (Items(X[:40], Y[:40]), "so_far has other labels"),
        (Items(y=None), "so_far has other labels"),
    ):
        with pytest.raises(UserError, match=message):
            drawn(net, guide, data, so_far=before)
    first = drawn(net, guide, Items(X[:50], Y[:50]), num_samples=6)
    with pytest.raises(UserError, match="another batch_size"):
        drawn(net, guide, Items(), so_far=first, num_samples=7)


def test_a_prediction_that_is_stopped_does_not_read_on():
    class Slow(Items):
        def __getitem__(self, row):
            if row >= 66:
                time.sleep(0.05)
            return super().__getitem__(row)

    net, guide = dense()
    items = Slow()
    with pytest.raises(Interrupted):
        drawn(net, guide, items, should_stop=lambda: True)
    assert items.read[:40] == [1] * 40
    assert items.read[82:] == [0] * (N - 82)
