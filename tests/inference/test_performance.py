"""performance.json: every step of a training, kept when it is resumed, and what is kept when the file is damaged."""

import json

import pytest
from small_training import X, Y, settings, small

from ppl_bnn import fit
from ppl_bnn.errors import Interrupted
from ppl_bnn.inference import log


def performance(folder):
    return json.loads((folder / "performance.json").read_text())


def stopped(folder, step):
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        fit(*small(), X, Y, **settings(), folder=folder, should_stop=lambda: next(asked) >= step)


def test_each_steps_accuracy_adds_up_to_the_epochs(tmp_path):
    history = fit(*small(), X, Y, **settings(), folder=tmp_path)
    found = performance(tmp_path)
    assert (found["first_step"], found["starts"], found["rows"]) == (1, [0], [8, 8, 8, 8, 8, 8, 2] * 4)
    correct = [rows * accuracy for rows, accuracy in zip(found["rows"], found["accuracy"], strict=True)]
    epochs = [sum(correct[at : at + 7]) / 50 for at in range(0, 28, 7)]
    assert epochs == pytest.approx([row["accuracy"] for row in history], abs=1e-5)


@pytest.mark.parametrize("stop_at", [3, 7, 10])
def test_a_resumed_training_keeps_the_steps_before(tmp_path, stop_at):
    """It stops inside an epoch or at its end."""
    fit(*small(), X, Y, **settings(), folder=tmp_path / "whole")
    stopped(tmp_path / "cut", stop_at)
    before = performance(tmp_path / "cut")
    assert len(before["rows"]) == stop_at
    fit(*small(), X, Y, **settings(), folder=tmp_path / "cut")
    after, whole = performance(tmp_path / "cut"), performance(tmp_path / "whole")
    assert after["starts"] == [0, stop_at]
    assert after["seconds"][:stop_at] == before["seconds"]
    for name in ("first_step", "rows", "accuracy"):
        assert after[name] == whole[name]


def test_steps_after_the_checkpoint_are_taken_again(tmp_path):
    stopped(tmp_path, 7)
    written = performance(tmp_path)
    for name in ("rows", "seconds", "accuracy"):
        # Of a process that was killed before it wrote the checkpoint.
        written[name] += [1.0, 1.0]
    (tmp_path / "performance.json").write_text(json.dumps(written))
    fit(*small(), X, Y, **settings(), folder=tmp_path)
    assert performance(tmp_path)["rows"] == [8, 8, 8, 8, 8, 8, 2] * 4


@pytest.mark.parametrize("content", [None, "{", "{}", '{"rows": [8], "seconds": [1.0]}'])
def test_without_the_steps_before_it_says_where_its_own_begin(tmp_path, content):
    stopped(tmp_path, 10)
    if content is None:
        (tmp_path / "performance.json").unlink()
    else:
        (tmp_path / "performance.json").write_text(content)
    fit(*small(), X, Y, **settings(), folder=tmp_path)
    found = performance(tmp_path)
    assert (found["first_step"], found["starts"], len(found["rows"])) == (11, [10], 18)


def test_a_long_training_keeps_its_last_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_LAST_STEPS", 20)
    stopped(tmp_path, 24)
    assert (performance(tmp_path)["first_step"], len(performance(tmp_path)["rows"])) == (5, 20)
    fit(*small(), X, Y, **settings(), folder=tmp_path)
    found = performance(tmp_path)
    assert (found["first_step"], found["starts"], len(found["accuracy"])) == (9, [0, 24], 20)


def test_a_complete_training_leaves_it_alone(tmp_path):
    fit(*small(), X, Y, **settings(), folder=tmp_path)
    before = (tmp_path / "performance.json").stat().st_mtime_ns
    fit(*small(), X, Y, **settings(), folder=tmp_path)
    assert (tmp_path / "performance.json").stat().st_mtime_ns == before
