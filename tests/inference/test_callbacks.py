"""Callbacks and loggers: when they are called, what they see, that they may stop, and what happens where they fail."""

import math

import pytest
import torch
from ranks import Ranks
from small_ranks import settings as rank_settings
from small_ranks import small as small_for_ranks
from small_training import X, Y, assert_same_state, settings, small, state, timeless

from ppl_bnn import fit, predict
from ppl_bnn.errors import CallbackFailed, Interrupted
from ppl_bnn.inference import checkpoint


class Noting:
    def __init__(self):
        self.calls = []

    def on_start(self, training):
        self.calls.append(("start", training.step, training.epoch))

    def on_step(self, training):
        self.calls.append(("step", training.step, training.epoch))

    def on_epoch(self, training, record):
        assert training.records[-1] == record
        self.calls.append(("epoch", training.step, training.epoch))

    def on_end(self, training):
        self.calls.append(("end", training.step, training.epoch))


def test_they_are_called_in_the_order_of_the_training():
    noting = Noting()
    fit(*small(), X, Y, **settings(epochs=2, batch_size=25), callbacks=[noting])
    assert noting.calls == [
        ("start", 0, 0), ("step", 1, 0), ("step", 2, 0), ("epoch", 2, 1), ("step", 3, 1), ("step", 4, 1),
        ("epoch", 4, 2), ("end", 4, 2),
    ]  # fmt: skip


class Looking:
    """It has one method, predicts, draws random numbers, and leaves the model in evaluation mode."""

    def __init__(self):
        self.accuracies = []

    def on_epoch(self, training, record):
        torch.rand(100)
        found = predict(training.model, training.guide, X, Y, num_samples=5, progress=False)
        self.accuracies.append(found.scores()["accuracy"])
        training.model.eval()


@pytest.mark.parametrize("estimator", ["plain", "groups", "flipout"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_a_callback_that_looks_changes_nothing(estimator, num_particles):
    changes = settings(estimator=estimator, num_particles=num_particles)
    model, guide = small()
    expected, parameters = fit(model, guide, X, Y, **changes), state(model, guide)
    model, guide = small()
    looking = Looking()
    assert timeless(fit(model, guide, X, Y, **changes, callbacks=[looking])) == timeless(expected)
    assert_same_state(state(model, guide), parameters)
    last = predict(model, guide, X, Y, num_samples=5, progress=False).scores()["accuracy"]
    assert looking.accuracies[-1] == last


class StoppingAt:
    def __init__(self, step):
        self.at = step

    def on_step(self, training):
        if training.step == self.at:
            training.stop()


@pytest.mark.parametrize(("at", "epochs"), [(10, 1), (14, 2)])
def test_a_callback_may_end_a_training(tmp_path, at, epochs):
    noting = Noting()
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(), callbacks=[StoppingAt(at), noting], folder=tmp_path)
    assert len(history) == epochs
    assert noting.calls[-1] == ("end", at, epochs)
    last = checkpoint.load(checkpoint.find(tmp_path / "checkpoints"))
    assert last.step == at == last.meta["steps"]
    # It is complete: the same call trains no further.
    ended = state(model, guide)
    model, guide = small(seed=4)
    assert fit(model, guide, X, Y, **settings(), folder=tmp_path) == history
    assert_same_state(state(model, guide), ended)


class Failing:
    def __init__(self, method, at=10):
        self.at = at
        setattr(self, method, self._fail)

    def _fail(self, training, record=None):
        if training.step >= self.at:
            raise KeyError("mine")


@pytest.mark.parametrize(("method", "step"), [("on_step", 7), ("on_epoch", 14), ("on_end", 28)])
def test_a_callback_that_fails_is_named_and_the_training_goes_on_from_its_last_checkpoint(tmp_path, method, step):
    model, guide = small()
    expected, parameters = fit(model, guide, X, Y, **settings()), state(model, guide)
    with pytest.raises(
        CallbackFailed, match=rf"Failing.{method} failed at step \d+: KeyError: 'mine'. The last"
    ) as info:
        fit(*small(), X, Y, **settings(), callbacks=[Failing(method)], folder=tmp_path)
    assert isinstance(info.value.__cause__, KeyError)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == step
    model, guide = small(seed=3)
    assert timeless(fit(model, guide, X, Y, **settings(), folder=tmp_path)) == timeless(expected)
    assert_same_state(state(model, guide), parameters)


class Values:
    def __init__(self, fails=False):
        self.logged, self.closed, self.fails = [], 0, fails

    def log(self, values, step):
        if self.fails:
            raise OSError("disk full")
        self.logged.append((step, dict(values)))

    def close(self):
        self.closed += 1


def test_loggers_get_every_fifty_steps_and_every_epoch():
    values = Values()
    history = fit(*small(), X, Y, **settings(epochs=15), loggers=[values], validation=(X, Y), kl_weight=0.25)
    assert values.closed == 1
    steps = [(step, given) for step, given in values.logged if "step/loss" in given]
    epochs = [(step, given) for step, given in values.logged if "epoch/loss" in given]
    assert [step for step, _ in steps] == [50, 100]
    assert [step for step, _ in epochs] == [row["step"] for row in history]
    for _, given in steps:
        assert given["step/loss"] == pytest.approx(given["step/nll"] + 0.25 * given["step/kl"])
        assert given["step/kl_weight"] == pytest.approx(0.25)
    assert [given["epoch/val_nll"] for _, given in epochs] == [row["val_nll"] for row in history]
    assert not any(math.isnan(value) for _, given in values.logged for value in given.values())


def test_a_training_that_goes_on_logs_no_step_twice(tmp_path):
    first, second, asked = Values(), Values(), iter(range(1000))
    with pytest.raises(Interrupted):
        fit(
            *small(),
            X,
            Y,
            **settings(epochs=15),
            loggers=[first],
            folder=tmp_path,
            should_stop=lambda: next(asked) >= 60,
        )
    assert first.closed == 1
    fit(*small(), X, Y, **settings(epochs=15), loggers=[second], folder=tmp_path)
    of_steps = [[step for step, given in values.logged if "step/loss" in given] for values in (first, second)]
    assert of_steps == [[50], [100]]


def test_a_logger_that_fails_is_named_and_nothing_is_lost(tmp_path):
    with pytest.raises(CallbackFailed, match=r"Values.log failed at step 7: OSError: disk full\. The last checkpoint"):
        fit(*small(), X, Y, **settings(), loggers=[Values(fails=True)], folder=tmp_path)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 7


def test_tensorboard_has_the_numbers_of_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from ppl_bnn.inference.tensorboard import TensorBoard

    history = fit(*small(), X, Y, **settings(epochs=8), loggers=[TensorBoard(tmp_path)], validation=(X, Y))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("loss", "val_nll"):
        there = events.Scalars(f"epoch/{name}")
        assert [one.step for one in there] == [row["step"] for row in history]
        assert [one.value for one in there] == pytest.approx([row[name] for row in history], rel=1e-6)
    assert [one.step for one in events.Scalars("step/kl_weight")] == [50]


def test_tensorboard_that_is_not_there_is_named(monkeypatch, tmp_path):
    from ppl_bnn.inference.tensorboard import TensorBoard

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'ppl_bnn\[tensorboard\]'"):
        TensorBoard(tmp_path)


def followed(communicator):
    from small_ranks import X, Y

    noting, values = Noting(), Values()
    stopping = [StoppingAt(5)] if communicator.rank == 1 else [StoppingAt(-1)]
    model, guide = small_for_ranks()
    history = fit(
        model,
        guide,
        X,
        Y,
        **rank_settings(),
        callbacks=[noting, *stopping],
        loggers=[values],
        communicator=communicator,
    )
    return noting.calls, len(values.logged), [row["step"] for row in history]


def test_on_ranks_all_are_called_rank_0_logs_and_any_may_stop(tmp_path):
    (one, logged, steps), (other, not_logged, _) = Ranks(tmp_path, 2, followed).results()
    assert one == other
    assert one[-1] == ("end", 5, 1)
    assert steps == [4]
    assert logged == 1
    assert not_logged == 0
