"""Tables: what they refuse, and scikit-learn's diabetes data as one."""

import sys
from dataclasses import replace

import pytest
import torch

from ppl_bnn.data import Table, described, load
from ppl_bnn.errors import UserError


def numbers(rows, split="train"):
    x = torch.arange(2.0 * rows).reshape(rows, 2)
    return Table(x, x.sum(1), ("a", "b"), "sum", "Sums", split)


def two_tables(folder, file, progress):
    return numbers(6), numbers(3, "test")


def no_tables(folder, file, progress):
    return "rows", "rows"


def test_diabetes_is_standardized_by_its_training_rows():
    train, test = load("diabetes")
    assert (len(train), len(test), train.shape) == (332, 110, (10,))
    assert (train.split, test.split, train.title) == ("train", "test", "Diabetes (standardized)")
    for values in (train.x, train.y):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1:]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1:]))
    assert 0.7 < float(test.y.std()) < 1.3
    assert test.x[:, 1].unique().numel() == 2
    assert torch.equal(load("diabetes")[1].x, test.x)
    rows = {tuple(row) for row in torch.cat([train.x, test.x]).tolist()}
    assert len(rows) == 442
    assert described("diabetes") == ("Diabetes (standardized)", (10,), 0)


def test_a_holdout_of_a_table_is_its_last_rows():
    whole = load("diabetes")[0]
    train, held = load("diabetes", holdout=32)
    assert (len(train), len(held), held.split) == (300, 32, "validation")
    both = torch.cat([train.y, held.y])
    torch.testing.assert_close((both - both.mean()) / both.std(correction=0), whole.y)
    torch.testing.assert_close(train.y.std(correction=0), torch.tensor(1.0))
    assert whole.first(None) is whole
    assert torch.equal(whole.first(5).inputs(), whole.x[:5])


def test_a_function_of_ones_own_gives_tables():
    train, test = load(f"{__name__}:two_tables")
    assert (len(train), test.split) == (6, "test")
    with pytest.raises(
        UserError, match=r"no_tables must return data or \(train, test\), each a Dataset, .* or ppl_bnn.data.Images"
    ):
        load(f"{__name__}:no_tables")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"x": torch.zeros(6)}, r"x must be finite numbers, float32 \[N, D\], got torch.float32 \[6\]"),
        ({"x": torch.full((6, 2), torch.nan)}, "x must be finite numbers"),
        ({"x": torch.zeros(6, 2, dtype=torch.float64)}, "got torch.float64"),
        ({"y": torch.zeros(6, 1)}, r"y must be float32 or int64 \[6\], got torch.float32 \[6, 1\]"),
        ({"y": torch.zeros(5)}, r"got torch.float32 \[5\]"),
        ({"features": ("a",)}, "needs as many names of features"),
    ],
)
def test_a_table_of_parts_that_do_not_fit_is_refused(parts, message):
    with pytest.raises(UserError, match=message):
        replace(numbers(6), **parts)


def test_without_scikit_learn_the_message_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ppl_bnn\[tables\]'"):
        load("diabetes")
    with pytest.raises(UserError, match="cannot be used with 'diabetes'"):
        load("diabetes", file="x.npz")
