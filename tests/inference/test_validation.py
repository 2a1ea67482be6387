"""Validation in a training: its scores, the best parameters, giving up, and that it changes nothing."""

import csv
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from ranks import Ranks
from small_ranks import settings as rank_settings
from small_ranks import small as small_for_ranks
from small_training import X, Y, assert_same_state, settings, small, state, timeless
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ppl_bnn import Classifier, MeanFieldNormal, Model, Normal, bayesian, fit, load_checkpoint, predict
from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.inference import checkpoint

GENERATOR = torch.Generator().manual_seed(1)
HELD_X = torch.rand(30, 6, generator=GENERATOR)
HELD_Y = (HELD_X[:, 0] > HELD_X[:, 1]).long()
HELD = HELD_X, HELD_Y


def without_scores(history):
    return [{name: value for name, value in row.items() if not name.startswith("val_")} for row in timeless(history)]


def test_losses_and_parameters_are_bitwise_those_without_validation(tmp_path):
    found = []
    for validation in (None, HELD):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))
        model = Classifier(bayesian(net), len(X))
        guide = MeanFieldNormal(model, X[:2], Y[:2])
        history = fit(model, guide, X, Y, **settings(estimator="groups"), validation=validation)
        found.append((without_scores(history), state(model, guide)))
    assert found[0][0] == found[1][0]
    assert_same_state(found[0][1], found[1][1])


def test_scores_are_those_of_predict_with_the_same_draws(tmp_path):
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(), validation=HELD, validation_samples=7, seed=3, folder=tmp_path)
    expected = predict(model, guide, *HELD, num_samples=7, seed=3, progress=False).scores()
    assert {name: history[-1][f"val_{name}"] for name in expected} == pytest.approx(expected)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_nll"]) for row in rows] == pytest.approx([row["val_nll"] for row in history])


def test_every_second_epoch_and_the_last(tmp_path):
    history = fit(*small(), X, Y, **settings(epochs=5), validation=HELD, validate_every=2, folder=tmp_path)
    assert ["val_nll" in row for row in history] == [False, True, False, True, True]
    with (tmp_path / "log.csv").open() as file:
        assert [row["val_nll"] != "" for row in csv.DictReader(file)] == [False, True, False, True, True]


def test_numbers_have_the_scores_of_numbers():
    torch.manual_seed(0)
    model = Model(bayesian(nn.Linear(6, 1)), Normal(0.5), len(X))
    y = X[:, :1].squeeze(-1)
    net_y = y
    model.net = nn.Sequential(model.net, nn.Flatten(0))
    guide = MeanFieldNormal(model, X[:2], net_y[:2])
    history = fit(model, guide, X, y, **settings(), validation=(HELD_X, HELD_X[:, 0]), monitor="rmse")
    assert {"val_nll", "val_rmse", "val_mae"} <= history[-1].keys()
    assert math.isfinite(history[-1]["val_rmse"])


class Held(Dataset):
    def __len__(self):
        return len(HELD_X)

    def __getitem__(self, row):
        return HELD_X[row], HELD_Y[row]


@pytest.mark.parametrize(
    "validation", [(HELD_X.numpy(), HELD_Y.numpy()), TensorDataset(*HELD), Held(), DataLoader(Held(), batch_size=7)],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_it_takes_what_predict_takes(validation):
    expected = fit(*small(), X, Y, **settings(), validation=HELD)
    assert timeless(fit(*small(), X, Y, **settings(), validation=validation)) == timeless(expected)


def test_a_pyro_model_of_ones_own_has_a_validation_too():
    def model(x, y=None):
        bias = pyro.param("bias", torch.tensor(1.0))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", 50, subsample_size=len(x)):
            return pyro.sample("y", dist.Normal(x @ weight + bias, 0.5), obs=y)

    y, found = X[:, 0], []
    for validated in ({}, {"validation": (HELD_X, HELD_X[:, 0]), "monitor": "rmse"}):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = AutoNormal(model)
        changes = settings(epochs=30, estimator="plain", lr=0.05)
        found.append(fit(model, guide, X, y, **changes, **validated))
    one, other = ([{**row, "accuracy": None} for row in without_scores(history)] for history in found)
    assert one == other
    assert found[1][-1]["val_rmse"] < found[1][0]["val_rmse"] / 2


# On random labels the validation's NLL is best early, and then grows.
RANDOM = HELD_X, torch.randint(2, (30,), generator=torch.Generator().manual_seed(2))
OVERFITTING = settings(epochs=60, lr=0.05, kl_weight=0.01)


@pytest.mark.parametrize("in_folder", [True, False])
def test_want_of_patience_ends_a_training_with_its_best_parameters(tmp_path, in_folder):
    model, guide = small()
    folder = tmp_path if in_folder else None
    history = fit(model, guide, X, Y, **OVERFITTING, validation=RANDOM, patience=3, folder=folder)
    nlls = [row["val_nll"] for row in history]
    best = nlls.index(min(nlls))
    assert len(history) == best + 1 + 3 < 60
    here = predict(model, guide, *RANDOM, num_samples=10, progress=False).scores()["nll"]
    assert here == pytest.approx(min(nlls))
    if in_folder:
        found = checkpoint.load(tmp_path / "checkpoints" / "best.safetensors")
        assert found.step == history[best]["step"]
        assert [path.stem for path in checkpoint.saved(tmp_path / "checkpoints")][
            -1
        ] == f"step-{history[-1]['step']:08d}"
        # The last checkpoint is what `fit` left.
        ours = state(model, guide)
        model, guide = small(seed=9)
        assert len(load_checkpoint(tmp_path, model=model, guide=guide).history) == len(history)
        assert_same_state(ours, state(model, guide))
        # It is complete: nothing is trained further.
        again = fit(model, guide, X, Y, **OVERFITTING, validation=RANDOM, patience=3, folder=tmp_path)
        assert again == history
        assert_same_state(ours, state(model, guide))


def test_with_patience_a_training_of_all_epochs_ends_with_the_best_too():
    model, guide = small()
    history = fit(model, guide, X, Y, **OVERFITTING | {"epochs": 12}, validation=RANDOM, patience=50)
    assert len(history) == 12
    here = predict(model, guide, *RANDOM, num_samples=10, progress=False).scores()["nll"]
    assert here == pytest.approx(min(row["val_nll"] for row in history))
    assert here < history[-1]["val_nll"]


def test_without_patience_the_last_parameters_are_left_and_the_best_are_in_a_file(tmp_path):
    model, guide = small()
    history = fit(model, guide, X, Y, **OVERFITTING | {"epochs": 12}, validation=RANDOM, folder=tmp_path)
    here = predict(model, guide, *RANDOM, num_samples=10, progress=False).scores()["nll"]
    assert here == pytest.approx(history[-1]["val_nll"])
    load_checkpoint(tmp_path / "checkpoints" / "best.safetensors", model=model, guide=guide)
    here = predict(model, guide, *RANDOM, num_samples=10, progress=False).scores()["nll"]
    assert here == pytest.approx(min(row["val_nll"] for row in history))


def test_accuracy_is_better_when_larger(tmp_path):
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(epochs=30), validation=HELD, monitor="accuracy", patience=30)
    here = predict(model, guide, *HELD, num_samples=10, progress=False).scores()["accuracy"]
    assert here == max(row["val_accuracy"] for row in history) > history[0]["val_accuracy"]


@pytest.mark.parametrize("stop_at", [3, 26, 33])
def test_an_interrupted_training_keeps_the_best_score_and_its_patience(tmp_path, stop_at):
    changes = OVERFITTING | {"validation": RANDOM, "patience": 3}
    model, guide = small()
    whole = fit(model, guide, X, Y, **changes, folder=tmp_path / "whole")
    expected = state(model, guide)
    assert len(whole) * 7 > stop_at
    asked = iter(range(1, 1000))
    model, guide = small()
    with pytest.raises(Interrupted):
        fit(model, guide, X, Y, **changes, folder=tmp_path / "cut", should_stop=lambda: next(asked) >= stop_at)
    model, guide = small(seed=5)
    resumed = fit(model, guide, X, Y, **changes, folder=tmp_path / "cut")
    assert timeless(resumed) == timeless(whole)
    assert_same_state(expected, state(model, guide))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 3}, "patience 3 waits for a better score of a validation: give validation data"),
        ({"validation": HELD, "monitor": "f1"}, "one of accuracy, nll, ece, brier; got 'f1'"),
        ({"validation": (HELD_X, HELD_Y + 1)}, "labels"),
        ({"validation": (HELD_X, HELD_Y[:5])}, "same number of examples"),
        ({"validation": (HELD_X[:, :3], HELD_Y)}, "shapes cannot be multiplied"),
        ({"validation": HELD_X}, "the validation data have no labels: give"),
        ({"validation": list(HELD_X)}, "the validation data have no labels: give"),
        ({"monitor": "accuracy"}, "monitor 'accuracy' has no effect without validation data"),
        ({"validate_every": 2}, "validate_every 2 has no effect without validation data"),
        ({"validation": HELD, "validate_every": 0}, "validate_every must be at least 1"),
        ({"validation": HELD, "patience": 0}, "patience must be at least 1"),
        ({"validation": HELD, "validation_samples": 0}, "validation_samples must be at least 1"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_the_first_step(changes, message, tmp_path):
    model, guide = small()
    before = state(model, guide)
    with pytest.raises((UserError, RuntimeError), match=message):
        fit(model, guide, X, Y, **settings(), **changes, folder=tmp_path)
    assert_same_state(before, state(model, guide))
    assert not (tmp_path / "checkpoints").exists()


def validated(communicator, folder):
    from small_ranks import X, Y

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model, guide = small_for_ranks(net)
    labels = torch.randint(2, (50,), generator=torch.Generator().manual_seed(3))
    changes = rank_settings(epochs=40, batch_size=5, lr=0.05, kl_weight=0.01)
    history = fit(
        model, guide, X, Y, **changes, validation=(X.flip(0), labels), patience=2, communicator=communicator,
        folder=folder,
    )  # fmt: skip
    scores = [row["val_nll"] for row in history]
    return scores, state(model, guide)


def test_ranks_share_a_validation_and_end_alike(tmp_path):
    found = Ranks(tmp_path, 2, validated, tmp_path / "out").results()
    (scores, one), (others, other) = found
    assert scores == others
    assert 3 <= len(scores) < 40
    assert_same_state(one, other)
    best = checkpoint.load(tmp_path / "out" / "checkpoints" / "best.safetensors")
    torch.testing.assert_close(best.part("guide")["loc.0.weight"], one["loc.0.weight"], rtol=0, atol=0)
