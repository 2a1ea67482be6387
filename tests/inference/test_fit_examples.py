"""Training on data of any kind is the training on their tensors: batches, resuming, ranks, several inputs."""

import os

import pytest
import torch
from example_kinds import ITERABLES, KINDS, Pairs, Random, Stream
from ranks import Ranks
from small_ranks import X as X64
from small_ranks import assert_same
from small_ranks import settings as rank_settings
from small_ranks import small as small64
from small_training import X, Y, assert_same_state, settings, small, state, timeless
from torch import nn
from torch.utils.data import DataLoader
from worker_processes import workers

from ppl_bnn import Classifier, MeanFieldNormal, Model, Normal, as_examples, bayesian, fit, normalize
from ppl_bnn.distributed import Alone
from ppl_bnn.errors import UserError
from ppl_bnn.inference import checkpoint, data_parallel
from ppl_bnn.inference.reading import Reader

EPOCHS = {"epochs": 2}


@pytest.fixture(scope="module")
def whole():
    found = small()
    fit(*found, X, Y, **settings(**EPOCHS))
    return state(*found)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "random" not in kind and "dicts" not in kind])
def test_a_training_on_any_kind_is_bitwise_the_training_on_its_tensors(kind, tmp_path, whole):
    before = workers()
    one = small()
    fit(*one, KINDS[kind](tmp_path, X, Y), **settings(**EPOCHS))
    assert_same_state(whole, state(*one))
    assert workers() == before


def test_a_data_loader_gives_its_batch_size(whole):
    how = settings(**EPOCHS)
    del how["batch_size"]
    for given in (DataLoader(Pairs(), 8), as_examples(DataLoader(Pairs(), 8, num_workers=1))):
        one = small()
        fit(*one, given, **how)
        assert_same_state(whole, state(*one))
    one = small()
    (record,) = fit(*one, DataLoader(Pairs(), 8), **{**how, "epochs": 1, "batch_size": 25})
    assert record["step"] == 2


def test_random_items_differ_from_epoch_to_epoch_and_not_with_the_number_of_workers():
    losses = []
    for count in (0, 2):
        model, guide = small()
        losses.append(
            [row["loss"] for row in fit(model, guide, as_examples(Random(), num_workers=count), **settings())]
        )
    assert losses[0] == losses[1]
    assert len({first_draw(epoch) for epoch in range(3)}) == 3


def first_draw(epoch):
    """What the first example's items of an epoch are shifted by."""
    batches = Reader(as_examples(Random()), 50, 0, Alone(), torch.device("cpu")).batches(range(epoch, epoch + 1))
    (batch,) = list(batches)
    return float((batch.x - X[batch.rows])[batch.rows == 0, 0])


def test_a_resume_on_other_data_is_refused_and_older_checkpoints_resume(tmp_path, monkeypatch):
    for number, (data, other) in enumerate([((X, Y), (X + 1, Y)), ((Pairs(),), (Pairs(X + 1),))]):
        folder = tmp_path / str(number)
        fit(*small(), *data, **settings(epochs=1), folder=folder)
        with pytest.raises(UserError, match="holds a training on other data") as refused:
            fit(*small(), *other, **settings(epochs=1), folder=folder)
        assert "\n" not in str(refused.value)
        fit(*small(), *data, **settings(epochs=1), folder=folder)
    monkeypatch.setattr(data_parallel, "_check_data", lambda before, now, folder: known.append(before))
    known = []
    last = checkpoint.load(checkpoint.find(tmp_path / "0" / "checkpoints"))
    del last.meta["settings"]["data"]
    monkeypatch.setattr(checkpoint, "load", lambda path: last)
    fit(*small(), X + 1, Y, **settings(epochs=1), folder=tmp_path / "0")
    assert known == [None]
    monkeypatch.undo()
    data_parallel._check_data(None, "now", tmp_path)


def test_files_that_were_copied_resume_with_a_warning(tmp_path, caplog):
    how = {**settings(epochs=1), "folder": tmp_path / "out"}
    fit(*small(), KINDS["memory-mapped arrays"](tmp_path, X, Y), **how)
    os.utime(tmp_path / "x.npy", (1, 1))
    fit(*small(), KINDS["memory-mapped arrays"](tmp_path, X, Y), **how)
    assert "the files of the data have other times" in caplog.text


class Late(Pairs):
    """Labels of which one is wrong, far from the first batch."""

    def __init__(self, row, label):
        super().__init__(y=torch.where(torch.arange(50) == row, label, Y))


@pytest.mark.parametrize("count", [0, 2])
def test_a_label_out_of_range_in_a_later_batch_names_its_example(count, tmp_path):
    before = workers()
    data = as_examples(Late(41, 2), num_workers=count)
    with pytest.raises(UserError, match=r"^example 41: the labels y are from 2 to 2; expected .* 0..1") as refused:
        fit(*small(), data, **settings(), folder=tmp_path)
    assert "\n" not in str(refused.value)
    assert workers() == before
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 0


def test_targets_of_a_regression_are_checked_in_each_batch():
    model = Model(bayesian(nn.Linear(6, 1)), Normal(0.1), 50)
    guide = MeanFieldNormal(model, X[:1], X[:1, :1])
    targets = X[:, :1].double()
    items = [(X[row], targets[row, 0] if row != 33 else torch.tensor(torch.nan)) for row in range(50)]
    with pytest.raises(UserError, match=r"^example \d+: the targets y have shape \[1\]|example 33: .* must be finite"):
        fit(model, guide, items, **settings())


# -- several inputs ----------------------------------------------------------------------------------------------


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, left, right):
        return self.out(torch.cat([self.a(left), self.b(right)], 1).relu())


class OfOne(Both):
    def forward(self, x):
        return super().forward(x[:, :2], x[:, 2:])


@pytest.mark.parametrize("estimator", ["plain", "flipout", "groups", "local"])
@pytest.mark.parametrize("kind", ["dict", "tuple", "Dataset"])
def test_several_inputs_train_as_one_tensor_of_them(kind, estimator):
    inputs = {"left": X[:, :2], "right": X[:, 2:]}
    items = [{"left": X[row, :2], "right": X[row, 2:], "y": Y[row]} for row in range(50)]
    data = {"dict": (inputs, Y), "tuple": (tuple(inputs.values()), Y), "Dataset": (items,)}[kind]
    states = []
    for net, given in ((OfOne, (X, Y)), (Both, data)):
        torch.manual_seed(0)
        model = Classifier(bayesian(net()), 50)
        first = X[:1] if net is OfOne else {name: part[:1] for name, part in inputs.items()}
        guide = MeanFieldNormal(model, first, Y[:1])
        fit(model, guide, *given, **settings(**EPOCHS, estimator=estimator))
        states.append(state(model, guide))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


def test_augmentation_of_several_inputs_is_refused():
    model = Classifier(bayesian(Both()), 50)
    first = (X[:1, :2], X[:1, 2:])
    with pytest.raises(UserError, match="augment crop_flip is for inputs that are one tensor; these are a tuple"):
        fit(model, MeanFieldNormal(model, first), (X[:, :2], X[:, 2:]), Y, **settings(augment="crop_flip"))


# -- pixels ------------------------------------------------------------------------------------------------------


def test_pixels_train_in_uint8_as_in_floating_point_with_augmentation_and_memory_format(tmp_path):
    pixels = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 2
    change = normalize(0.5, 0.25)
    states = []
    for given in ((change(pixels), y), (as_examples(pixels, y, transform=change),)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        model = Classifier(bayesian(net), 24)
        guide = MeanFieldNormal(model, change(pixels[:1]), y[:1])
        fit(model, guide, *given, **settings(**EPOCHS, augment="crop_flip"))
        states.append(state(model, guide))
    assert_same_state(*states)


# -- ranks -------------------------------------------------------------------------------------------------------


def train_on_a_loader(communicator, folder, kind):
    data_parallel.rank_seed = lambda seed, rank: seed
    model, guide = small64(seed=communicator.rank)
    data = DataLoader(Pairs(X64), 8, num_workers=1)
    if kind == "iterable":
        data = as_examples(Stream(X64), length=50)
    how = rank_settings()
    del how["batch_size"]
    how |= {"batch_size": 8} if kind == "iterable" else {}
    history = fit(model, guide, data, **how, communicator=communicator, folder=folder)
    return {"state": state(model, guide), "history": timeless(history)}


@pytest.mark.parametrize("kind", ["loader", "iterable"])
def test_two_ranks_log_what_one_rank_with_twice_the_batch_does(kind, tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_on_a_loader, tmp_path / "out", kind).results()
    assert_same([one["state"] for one in found])
    model, guide = small64()
    data = Pairs(X64) if kind == "loader" else as_examples(Stream(X64), length=50)
    history = fit(model, guide, data, **rank_settings(batch_size=16), folder=tmp_path / "one")
    for expected, got in zip(timeless(history), found[0]["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-10)
        # The digits that are printed.
        assert [f"{got[name]:.4f}" for name in ("loss", "nll", "kl", "accuracy")] == [
            f"{expected[name]:.4f}" for name in ("loss", "nll", "kl", "accuracy")
        ]


def test_an_iterable_is_the_training_in_its_own_order(tmp_path):
    states = []
    for kind in ITERABLES:
        one = small()
        fit(*one, ITERABLES[kind](tmp_path, X, Y), **settings(**EPOCHS))
        states.append(state(*one))
    # But for worker processes, which take turns.
    assert_same_state(states[0], states[2])
    assert_same_state(states[0], states[3])
