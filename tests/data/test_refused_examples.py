"""Data that cannot be trained on: one line each, which says what to do."""

import itertools
import logging
import time

import numpy as np
import pytest
import torch
from example_kinds import Pairs, Stream, padded
from small_training import X, Y, settings, small
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SubsetRandomSampler, WeightedRandomSampler

from ppl_bnn import as_examples, fit
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.inference import checkpoint


class Changed(Pairs):
    """A data set whose item 37 is another."""

    def __init__(self, item):
        super().__init__()
        self.item = item

    def __getitem__(self, row):
        return self.item(row) if row == 37 else super().__getitem__(row)


def raises(row):
    raise KeyError(f"image-{row}.png")


def of_many_lines(row):
    raise RuntimeError(f"\nbroken file {row}\nand more")


class Frame:
    """Stands for a table of pandas."""

    shape, dtype = (50, 6), "float64"

    def __getitem__(self, row):
        return 0

    def __len__(self):
        return 50

    def to_numpy(self):
        return X.numpy()


class Series(Dataset):
    """Sequences of different lengths."""

    def __len__(self):
        return 50

    def __getitem__(self, row):
        return torch.zeros(row + 1), 0


def loader(**how):
    return DataLoader(Pairs(), **how)


ITEMS = list(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Changed(raises), "the data set Changed raised at index 37: KeyError: 'image-37.png'"),
        (lambda: as_examples(Changed(raises), num_workers=2), "the data set Changed raised at index 37: KeyError"),
        (lambda: Changed(of_many_lines), "raised at index 37: RuntimeError: broken file 37$"),
        (lambda: Changed(lambda row: (X[0, :3], Y[0])), r"different shapes, \[\[6\], \[\]\] at index \d+ and \[\[3\], "
         r"\[\]\] at index 37: give a collate_fn"),
        (Series, "items of different shapes, .*: give a collate_fn"),
        (lambda: Changed(lambda row: ("text", Y[0])), "items of different shapes|items that make no batch"),
        (lambda: [(x, object()) for x in X], r"that make no batch \(TypeError: default_collate.*give a collate_fn"),
        (list, r"the data set list is empty: len\(\) is 0"),
        (lambda: list(X), "the examples have no labels: give each as a tuple .*target="),
        (lambda: [{"x": x, "label": 0} for x in X], "the examples have no labels.* a dict with a 'y'"),
        (lambda: as_examples([{"x": x} for x in X], target="label"), "target 'label' names no part .*; it has x$"),
        (lambda: as_examples(ITEMS, target=2), "target 2 names no part of an example, which is a tuple of 2"),
        (lambda: as_examples(list(X), target="y"), "target 'y' names no part of an example, which is a Tensor"),
        (lambda: [{"y": y} for y in Y], "a label and no inputs beside it"),
        (lambda: [(x, "a") for x in X], r"the label of an example must be a number.*, got .'a'"),
        (lambda: as_examples(ITEMS, collate_fn=lambda items: padded(items[:-1])), "gave 7 inputs and 7 labels for 8"),
        (lambda: as_examples(ITEMS, collate_fn=lambda items: (torch.zeros(len(items), 6), torch.tensor(1))),
         "gave 8 inputs and 0 labels for 8"),
        (lambda: as_examples(X, Y, transform=lambda x: x[:5]), "transform of a batch gave 5 inputs for 8 examples"),
        (lambda: as_examples(X, Y, transform=lambda x: x.numpy()), "inputs must be a tensor.*, got a ndarray"),
        (lambda: loader(sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler .* the order of examples is ours"),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * 50, 50)), r"fit the examples' weights=, or .*length="),
        (lambda: loader(sampler=DistributedSampler(Pairs(), 2, 0)), "leave it out, as fit divides the examples"),
        (lambda: loader(batch_sampler=[[0, 1]]), "a batch_sampler of its own, cannot have our order.*length="),
        (lambda: loader(batch_size=None), "a DataLoader without a batch_size.*length="),
        (lambda: DataLoader(Stream(), 8), r"the iterable Stream does not say how many .*length=\.\.\.\)"),
        (Stream, "the iterable Stream does not say how many examples it has"),
        (lambda: as_examples(iter(ITEMS), length=50), "an iterator can be read once"),
        (lambda: as_examples(Stream(X[:40], Y[:40]), length=50), "iterable Stream ended after 40 examples; length="),
        (lambda: as_examples(Stream(X.repeat(2, 1), Y.repeat(2)), length=50), "more than the 50 examples that length="),
        (lambda: as_examples(Stream(), length=0), "length must be at least 1"),
        (Frame, r"x must be one tensor or numpy array .*, got a Frame: pass x.to_numpy\(\)"),
        (lambda: 3, "x must be one tensor or numpy array of N examples, got a int: convert it first"),
        (lambda: "data.csv", "x must be one tensor or numpy array of N examples, got a str"),
        (lambda: (X, Y[:49]), "the same number of examples, at least 1; got 50 and 49"),
        (lambda: (np.array(["a"] * 50), Y), "dtype <U1; torch needs numbers"),
        (lambda: as_examples(X, Y, num_workers=2), "num_workers has no effect on a Tensor: leave it out"),
        (lambda: as_examples(Pairs(), length=50), "length has no effect on a Pairs: leave it out"),
        (lambda: as_examples(Pairs(), Y), "y goes with x in tensors or arrays; x is a Pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as refused:
        fit(*small(), make(), **settings())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("augment", "message"),
    [(lambda x: x[:3], "augment must return as many examples as it is given, 8; got 3"),
     (lambda x: None, "inputs must be a tensor, .*, got a NoneType")],
)  # fmt: skip
def test_an_augmentation_that_loses_examples_is_refused(augment, message):
    with pytest.raises(UserError, match=message):
        fit(*small(), X, Y, **settings(), augment=augment)


def test_an_iterable_that_raises_says_after_how_many_examples():
    class Broken(Stream):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 40)
            raise OSError("no such disk")

    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^the iterable Broken raised after 32 examples: OSError: no such disk$"):
            fit(*small(), as_examples(Broken(), length=50, num_workers=workers), **settings())


class Growing(Pairs):
    """A data set that has one more item in each epoch."""

    extra = 0

    def __len__(self):
        return len(self.x) + self.extra


def test_a_length_that_changes_between_epochs_is_refused_and_nothing_is_lost(tmp_path):
    data = Growing()

    def should_stop():
        if (tmp_path / "log.csv").exists():
            data.extra = 1
        return False

    with pytest.raises(UserError, match="had 50 items and now has 51: its length must not change in a training"):
        fit(*small(), data, **settings(), folder=tmp_path, should_stop=should_stop)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 7


def test_drop_last_is_said_to_have_no_effect(caplog):
    with caplog.at_level(logging.WARNING):
        (record,) = fit(*small(), loader(batch_size=8, drop_last=True), **{**settings(epochs=1), "batch_size": None})
    assert record["step"] == 7
    assert "drop_last has no effect: each epoch visits every example" in caplog.text


def test_a_loader_in_its_own_order_is_honoured_with_a_length(caplog, tmp_path):
    data = loader(batch_size=8, sampler=WeightedRandomSampler([1.0] * 50, 50))
    how = {**settings(epochs=1), "folder": tmp_path}
    asked = iter(range(100))
    with pytest.raises(Interrupted, match="stopped at step 3"):
        fit(*small(), as_examples(data, length=50), **how, should_stop=lambda: next(asked) == 2)
    with caplog.at_level(logging.INFO):
        (record,) = fit(*small(), as_examples(data, length=50), **how)
    assert record["step"] == 7
    assert "exact only if the iterable repeats itself" in caplog.text


@pytest.mark.parametrize(
    ("data", "augment", "message"),
    [(as_examples(Changed(lambda row: (X[0] / 0, Y[0])), num_workers=1), "none", "example 37: its inputs have NaN"),
     (Pairs(), lambda x: x / x.gt(X.min()), f"example {int(X.argmin()) // 6}: augment gives it NaN")],
    ids=["inputs", "augment"],
)  # fmt: skip
def test_the_first_example_that_is_not_finite_is_named_once_a_step_meets_it(data, augment, message, tmp_path):
    with pytest.raises(UserError, match=rf"^{message}.* \(step \d+\): correct .*\. The last checkpoint is good$"):
        fit(*small(), data, **settings(epochs=1, augment=augment), folder=tmp_path)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 0


def test_a_training_waits_for_slow_items_and_counts_the_time():
    class Slow(Pairs):
        def __getitem__(self, row):
            time.sleep(0.01)
            return super().__getitem__(row)

    (record,) = fit(*small(), Slow(), **settings(epochs=1))
    assert record["seconds"] > 0.45
