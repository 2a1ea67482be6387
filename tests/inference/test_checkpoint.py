"""Checkpoints: when they are written, resuming from them bitwise, and damaged ones named."""

import json

import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file
from small_training import X, Y, assert_same_state, settings, small, state, timeless
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, fit, prune
from ppl_bnn.errors import FileError, Interrupted
from ppl_bnn.inference import checkpoint


@pytest.mark.parametrize("stop_at", [1, 7, 10, 27])
def test_a_stopped_training_ends_bitwise_as_if_it_had_not_stopped(tmp_path, stop_at):
    model, guide = small()
    whole = fit(model, guide, X, Y, **settings(), folder=tmp_path / "whole")
    expected = state(model, guide)

    asked = iter(range(1, 1000))
    model, guide = small()
    with pytest.raises(Interrupted):
        fit(model, guide, X, Y, **settings(), folder=tmp_path / "cut", should_stop=lambda: next(asked) >= stop_at)
    model, guide = small(seed=5)
    resumed = fit(model, guide, X, Y, **settings(), folder=tmp_path / "cut")
    assert_same_state(expected, state(model, guide))
    assert timeless(whole) == timeless(resumed)
    last = [load_file(checkpoint.find(tmp_path / name / "checkpoints")) for name in ("whole", "cut")]
    assert_same_state(*last)


def test_the_last_checkpoints_and_the_start_are_kept(tmp_path):
    model, guide = small()
    before = state(model, guide)
    before = {name: value.clone() for name, value in before.items()}
    fit(model, guide, X, Y, **settings(), folder=tmp_path, keep_checkpoints=2)
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path / "checkpoints")]
    assert steps == [0, 21, 28]
    model, guide = small(seed=3)
    checkpoint.restore(checkpoint.load(checkpoint.find(tmp_path / "checkpoints", "0")), model=model, guide=guide)
    assert_same_state(before, state(model, guide))


def test_checkpoints_inside_an_epoch_come_by_the_clock_but_never_cost_more_than_a_twentieth(tmp_path, monkeypatch):
    now, cost, written = [0.0], [0.0], []
    real = checkpoint.save

    def save(folder, step, **keywords):
        written.append(step)
        now[0] += cost[0]
        return real(folder, step, **keywords)

    def a_second_a_step():
        now[0] += 1.0
        return False

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr("ppl_bnn.inference.saving.time.monotonic", lambda: now[0])
    changes = settings(epochs=1, batch_size=1, checkpoint_minutes=9.5 / 60, should_stop=a_second_a_step)
    fit(*small(), X, Y, **changes, folder=tmp_path / "quick")
    assert written == [0, 10, 20, 30, 40, 50]
    written.clear()
    cost[0] = 1.0
    fit(*small(), X, Y, **changes, folder=tmp_path / "slow")
    assert written == [0, 21, 42, 50]


@pytest.mark.parametrize("optimizer", ["adam", "ivon"])
def test_images_in_another_memory_format_resume_bitwise_too(tmp_path, optimizer):
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x, y = x.contiguous(memory_format=torch.channels_last), Y[:40]

    def convolution():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        model = Classifier(bayesian(net), 40)
        guide = MeanFieldNormal(model, x[:2], y[:2])
        return model.to(memory_format=torch.channels_last), guide.to(memory_format=torch.channels_last)

    changes = settings(epochs=2, estimator="groups", augment="crop_flip", optimizer=optimizer)
    model, guide = convolution()
    fit(model, guide, x, y, **changes, folder=tmp_path / "whole")
    expected = state(model, guide)
    asked = iter(range(1, 1000))
    model, guide = convolution()
    with pytest.raises(Interrupted):
        fit(model, guide, x, y, **changes, folder=tmp_path / "cut", should_stop=lambda: next(asked) >= 3)
    model, guide = convolution()
    fit(model, guide, x, y, **changes, folder=tmp_path / "cut")
    assert_same_state(expected, state(model, guide))


def test_log_and_checkpoints_are_where_they_belong(tmp_path):
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(), folder=tmp_path, checkpoint_every=3)
    assert [path.stem for path in checkpoint.saved(tmp_path / "checkpoints")] == [
        "step-00000000", "step-00000021", "step-00000028",
    ]  # fmt: skip
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,seconds,loss,nll,kl,kl_weight,accuracy,lr,samples_per_second"
    assert len(lines) == 1 + len(history)
    for name in ("21", "step-00000021", "step-00000021.safetensors"):
        assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints", name)).step == 21
    # An earlier step is an earlier posterior, whatever came after it.
    early, late = (checkpoint.load(checkpoint.find(tmp_path / "checkpoints", name)) for name in ("21", "last"))
    assert not torch.equal(early.part("guide")["loc.0.weight"], late.part("guide")["loc.0.weight"])


def test_a_training_does_not_go_on_from_one_with_other_settings(tmp_path):
    model, guide = small()
    fit(model, guide, X, Y, **settings(epochs=1), folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds a training with lr 0.01, this one has 0.02"):
        fit(model, guide, X, Y, **settings(epochs=1, lr=0.02), folder=tmp_path)


@pytest.fixture
def saved(tmp_path):
    model, guide = small()
    fit(model, guide, X, Y, **settings(epochs=1), folder=tmp_path)
    return checkpoint.find(tmp_path / "checkpoints")


def test_a_truncated_checkpoint_is_named(saved):
    content = saved.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(FileError, match=f"{saved.name} is truncated"):
            checkpoint.load(saved)


def test_an_altered_checkpoint_is_named(saved):
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(FileError, match="checksum differs"):
        checkpoint.load(saved)


def test_a_checkpoint_holds_tensors_and_json_only(saved):
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    json.loads(header.pop("__metadata__")["ppl_bnn"])
    end = max(entry["data_offsets"][1] for entry in header.values())
    assert 8 + int.from_bytes(content[:8], "little") + end == len(content)


def test_an_altered_record_is_named(saved):
    content = saved.read_bytes()
    at = content.index(b'\\"accuracy\\": 0.') + len(b'\\"accuracy\\": 0.')
    saved.write_bytes(content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :])
    with pytest.raises(FileError, match="checksum differs"):
        checkpoint.load(saved)


def test_the_log_is_whole_when_the_last_checkpoint_could_not_be_written(tmp_path, monkeypatch):
    model, guide = small()
    fit(model, guide, X, Y, **settings(epochs=2), folder=tmp_path / "whole")
    real = checkpoint.save

    def full(folder, step, **keywords):
        if step == 14:
            raise OSError(28, "No space left on device")
        return real(folder, step, **keywords)

    monkeypatch.setattr(checkpoint, "save", full)
    model, guide = small()
    with pytest.raises(OSError, match="No space left"):
        fit(model, guide, X, Y, **settings(epochs=2), folder=tmp_path / "cut")
    monkeypatch.undo()
    fit(model, guide, X, Y, **settings(epochs=2), folder=tmp_path / "cut")
    assert len((tmp_path / "cut" / "log.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("schedule", [(0.5, 4), (0.9, 8)])
def test_a_resume_notices_another_kl_schedule(tmp_path, schedule):
    from ppl_bnn import kl_schedule

    model, guide = small()
    weight = kl_schedule("cyclical", ramp=0.5, cycles=2)
    fit(model, guide, X, Y, **settings(epochs=1, kl_weight=weight), folder=tmp_path)
    other = kl_schedule("cyclical", ramp=schedule[0], cycles=schedule[1])
    with pytest.raises(ValueError, match="holds a training with kl_weight"):
        fit(model, guide, X, Y, **settings(epochs=1, kl_weight=other), folder=tmp_path)


def test_a_pickle_is_not_a_checkpoint(saved):
    torch.save({"a": torch.zeros(3)}, saved)
    with pytest.raises(FileError, match="not a checkpoint"):
        checkpoint.load(saved)


def test_a_checkpoint_of_another_network_names_the_first_difference(saved):
    net = bayesian(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)))
    model = Classifier(net, 50)
    guide = MeanFieldNormal(model, X[:1], Y[:1])
    with pytest.raises(FileError, match=r"'net.0.bias': saved \[8\], now \[9\]"):
        checkpoint.restore(checkpoint.load(saved), model=model, guide=guide)


def test_a_checkpoint_of_another_prior_is_named(saved):
    model, guide = small(prior=dist.Normal(0.0, 2.0))
    with pytest.raises(
        FileError, match=r"'net.0.weight': saved Normal\(loc=0, scale=1\), now Normal\(loc=0, scale=2\)"
    ):
        checkpoint.restore(checkpoint.load(saved), model=model, guide=guide)


def test_missing_checkpoints_list_those_that_are_there(saved, tmp_path):
    with pytest.raises(FileError, match="saved steps: step-00000000, step-00000007"):
        checkpoint.find(saved.parent, "step-00000009")
    with pytest.raises(FileError, match="run the train stage first"):
        checkpoint.find(tmp_path / "elsewhere")


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(saved, monkeypatch):
    model, guide = small()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(saved.parent, 99, model=model, guide=guide)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-00000000.safetensors", saved.name]


def test_the_names_of_bnn_fc_survive_a_checkpoint(tmp_path):
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    model = Classifier(build("bnn-fc"), 2)
    guide = MeanFieldNormal(model, x, y)
    fit(model, guide, x, y, epochs=1, folder=tmp_path, progress=False)
    names = checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).tensors
    assert {"guide.loc.fc1.weight", "guide.unconstrained_scale.fc3.weight", "model.net.fc2.bias"} <= names.keys()


def test_a_layer_with_two_names_is_saved_and_goes_on(tmp_path):
    def shared():
        model, guide = small(deterministic=True)
        model.net.add_module("again", model.net[2])
        model.net.forward = lambda x: model.net[2](torch.relu(model.net[0](x)))
        return model, guide

    model, guide = shared()
    fit(model, guide, X, Y, **settings(), folder=tmp_path)
    other, guide = shared()
    checkpoint.restore(checkpoint.load(checkpoint.find(tmp_path / "checkpoints")), model=other, guide=guide)
    assert_same_state(state(model, guide), state(other, guide))
    assert other.net.again is other.net[2]


def test_a_pruned_guides_masks_are_in_its_checkpoints(tmp_path):
    model, guide = small()
    guide = prune(guide, fraction=0.5).guide
    fit(model, guide, X, Y, **settings(), folder=tmp_path)
    other, unpruned = small(seed=5)
    saved = checkpoint.load(checkpoint.find(tmp_path / "checkpoints"))
    with pytest.raises(FileError, match=r"guide tensor 'keep.0.weight': saved \[8, 6\], now absent"):
        checkpoint.restore(saved, model=other, guide=unpruned)
    pruned = prune(unpruned, fraction=0.5).guide
    checkpoint.restore(saved, model=other, guide=pruned)
    assert_same_state(dict(enumerate(guide.loc_scale("0.weight"))), dict(enumerate(pruned.loc_scale("0.weight"))))
