"""The training loop and its checkpoints: faults, resume, and what a posterior learns."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, checkpoint, fit
from ppl_bnn.files import FileError
from ppl_bnn.training import Diverged, Interrupted

X = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > X[:, 1]).long()


def small(deterministic=False, seed=0, prior=None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(net if deterministic else bayesian(net, prior), len(X))
    return model, MeanFieldNormal(model, X[:1], Y[:1])


def settings(**changes):
    return {"epochs": 4, "batch_size": 8, "lr": 0.01, "estimator": "flipout", "progress": False, **changes}


def state(model, guide):
    return {**{f"m.{k}": v for k, v in model.state_dict().items()}, **guide.state_dict()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history]


@pytest.mark.parametrize("estimator", ["plain", "flipout", "groups", "local"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_it_learns(estimator, optimizer):
    model, guide = small(prior=dist.Normal(0.0, 3.0))
    history = fit(model, guide, X, Y, **settings(epochs=120, estimator=estimator, optimizer=optimizer, kl_weight=0.1))
    assert history[-1]["accuracy"] > 0.85
    assert history[-1]["nll"] < 0.6 * history[0]["nll"]
    assert len(history) == 120
    assert history[-1]["step"] == 120 * math.ceil(50 / 8)


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"compile": True}, {"lr_warmup": 0.5}], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "ivon"])
def test_other_ways_to_run_a_step_learn_as_well(changes, optimizer):
    model, guide = small(prior=dist.Normal(0.0, 3.0))
    lr = 0.01 if optimizer == "adam" else 0.2
    changes = {"epochs": 60, "lr": lr, "optimizer": optimizer, "kl_weight": 0.1, "estimator": "groups", **changes}
    history = fit(model, guide, X, Y, **settings(**changes))
    assert history[-1]["nll"] < 0.8 * history[0]["nll"]
    assert all(value.dtype == torch.float32 for value in guide.parameters())


@pytest.mark.parametrize("prior", ["normal", "laplace", "student_t", "scale_mixture"])
def test_every_prior_trains(prior):
    from ppl_bnn.models import parse_prior

    texts = {
        "normal": "normal(0, 1)",
        "laplace": "laplace(0, 1)",
        "student_t": "student_t(2, 0, 1)",
        "scale_mixture": "scale_mixture(0.5, 2, 0.2)",
    }
    model, guide = small(prior=parse_prior(texts[prior]))
    history = fit(model, guide, X, Y, **settings(epochs=60))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["kl"] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_deterministic_twin_trains_by_maximum_likelihood(precision):
    model, guide = small(deterministic=True)
    history = fit(model, guide, X, Y, **settings(epochs=80, precision=precision))
    assert guide.sites == []
    assert history[-1]["accuracy"] > 0.9
    assert history[-1]["kl"] == 0
    assert history[-1]["loss"] == history[-1]["nll"]


def test_the_same_seed_gives_the_same_posterior_and_leaves_the_callers_random_state():
    results = []
    for _ in range(2):
        model, guide = small()
        before = torch.get_rng_state()
        fit(model, guide, X, Y, **settings())
        assert torch.equal(before, torch.get_rng_state())
        results.append(state(model, guide))
    assert_same_state(*results)
    assert not list(pyro.get_param_store().keys())


def test_schedules_reach_the_optimizer():
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(lr_schedule="cosine", kl_weight=lambda progress: 0.5 + progress / 2))
    rates = [row["lr"] for row in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.0005
    # Progress is counted in examples: the last batch begins with 396 of 4 x 100 done.
    assert history[-1]["kl_weight"] == pytest.approx(0.5 + 0.99 / 2)


def test_scales_learn_at_their_own_rate():
    moved = []
    for factor in (1e-6, 1.0):
        model, guide = small()
        before = guide.unconstrained_scale.get_parameter("0.weight").detach().clone()
        fit(model, guide, X, Y, **settings(scale_lr_factor=factor))
        moved.append((guide.unconstrained_scale.get_parameter("0.weight") - before).abs().max().item())
    assert moved[0] < 1e-5
    assert moved[1] > 1e-2


def test_clipping_bounds_the_step():
    # Plain gradient size shows in RMSprop's first step only through its normalization, so look at the gradient itself.
    seen = []
    model, guide = small()
    original = nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        norm = original(parameters, limit)
        clipped = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()
        seen.append((float(norm), clipped))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", spy)
        fit(model, guide, X, Y, **settings(epochs=1, clip_norm=0.01))
    assert seen
    assert all(after <= 0.0101 < before for before, after in seen)


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
    monkeypatch.setattr("ppl_bnn.training.time.monotonic", lambda: now[0])
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


def test_an_infinite_loss_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path):
    model, guide = small()
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        fit(model, guide, X, Y, **settings(), folder=tmp_path, should_stop=lambda: next(asked) >= 5)
    with pytest.raises(Diverged, match=r"at step 6 .*the inputs hold NaN or infinite values"):
        fit(model, guide, X + math.inf, Y, **settings(), folder=tmp_path)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 5
    assert all(torch.isfinite(value).all() for value in state(model, guide).values())


@pytest.mark.parametrize("where", ["0", "2"])
def test_what_went_bad_first_is_named(where):
    model, guide = small()
    asked = iter(range(1000))

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (math.nan if next(asked) >= 3 else 1.0)

    model.net.get_submodule(where).register_forward_hook(lambda module, inputs, output: Overflow.apply(output))
    # The loss is finite throughout: only the gradient is bad, from this layer's weight on towards the input.
    with pytest.raises(Diverged, match=rf"at step 4 \(loss \d.*gradient of .*{where}\.(weight|bias).* is the first"):
        fit(model, guide, X, Y, **settings())
    assert all(torch.isfinite(value).all() for value in state(model, guide).values())


def test_a_layer_whose_output_overflows_is_named():
    model, guide = small()
    with torch.no_grad():
        guide.loc.get_parameter("2.weight").fill_(3e38)
    with pytest.raises(Diverged, match=r"the output of layer net.2 is the first"):
        fit(model, guide, X * 10, Y, **settings(estimator="plain"))


def test_a_parameter_that_is_not_finite_is_named():
    model, guide = small()
    with torch.no_grad():
        guide.unconstrained_scale.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(Diverged, match=r"unconstrained_scale.2.weight of the guide is not finite"):
        fit(model, guide, X, Y, **settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, rmsprop"),
        ({"estimator": "reinforce"}, "estimator must be one of plain"),
        ({"lr_schedule": "step"}, "lr_schedule"),
        ({"lr_warmup": 1.0}, "lr_warmup"),
        ({"beta2": 1.0}, "beta2"),
        ({"augment": "cutout"}, "augment must be one of none, crop_flip"),
        ({"precision": "float16"}, "precision"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes"),
        ({"optimizer": "ivon", "scale_lr_factor": 5.0}, "scale_lr_factor has no effect with ivon"),
        ({"optimizer": "ivon", "kl_weight": lambda progress: 0.5 + progress}, "KL schedule"),
    ],
)
def test_settings_out_of_range(changes, message):
    model, guide = small()
    with pytest.raises(ValueError, match=message):
        fit(model, guide, X, Y, **settings(**changes))


def test_data_that_do_not_match():
    model, guide = small()
    with pytest.raises(ValueError, match="got 50 and 49"):
        fit(model, guide, X, Y[:49], **settings())


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
    with pytest.raises(FileError, match=r"'net.0.bias' is \[8\] there and \[9\] here"):
        checkpoint.restore(checkpoint.load(saved), model=model, guide=guide)


def test_a_checkpoint_of_another_prior_is_named(saved):
    model, guide = small(prior=dist.Normal(0.0, 2.0))
    with pytest.raises(
        FileError, match=r"'net.0.weight' has Normal\(loc=0, scale=1\) there and Normal\(loc=0, scale=2\)"
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
