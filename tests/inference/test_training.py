"""The training loop: what a posterior learns, its settings, and faults named where they began."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_training import X, Y, assert_same_state, settings, small, state

from ppl_bnn import fit
from ppl_bnn.data import TensorExamples
from ppl_bnn.errors import Diverged, Interrupted, UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import checkpoint
from ppl_bnn.inference.optimizers import OPTIMIZERS


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
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
    history = fit(model, guide, X, Y, **settings(epochs=20))
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
    # The weight still changes in the last epoch.
    history = fit(model, guide, X, Y, **settings(lr_schedule="cosine", kl_weight=lambda progress: 0.5 + progress / 2))
    rates = [row["lr"] for row in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.0005
    # Progress is counted in examples: the last epoch's batches begin with 150, 158, ... 198 of 4 x 50 done.
    assert 0.5 + 150 / 400 < history[-1]["kl_weight"] < 0.5 + 198 / 400
    for row in history:
        assert row["loss"] == pytest.approx(row["nll"] + row["kl_weight"] * row["kl"], rel=1e-9)


def test_scales_learn_at_their_own_rate():
    moved = []
    for factor in (1e-6, 1.0):
        model, guide = small()
        before = guide.unconstrained_scale.get_parameter("0.weight").detach().clone()
        fit(model, guide, X, Y, **settings(scale_lr_factor=factor))
        moved.append((guide.unconstrained_scale.get_parameter("0.weight") - before).abs().max().item())
    assert moved[0] < 1e-5
    assert moved[1] > 1e-2


def noted_adam(made, groups):
    made.append(torch.optim.Adam(groups, fused=True))
    return made[-1]


@pytest.mark.parametrize("optimizer", ["torch.optim:SGD", "adam"])
def test_clipping_bounds_the_step(optimizer):
    # SGD at a learning rate of 1 moves by the gradient itself; Adam's first step hides its size, not its state.
    norms = []
    for clip_norm in (0.01, None):
        model, guide = small()
        before, made = state(model, guide), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(OPTIMIZERS, "adam", partial(noted_adam, made))
            lr = 1e-3 if optimizer == "adam" else 1.0
            fit(
                model, guide, X, Y, **settings(epochs=1, batch_size=50, lr=lr, clip_norm=clip_norm, optimizer=optimizer)
            )
        after = state(model, guide)
        # A tenth of the first gradient.
        averages = [10 * one["exp_avg"] for one in made[0].state.values()] if made else []
        parts = averages or [after[name] - before[name] for name in before]
        norms.append(torch.cat([part.flatten() for part in parts]).norm().item())
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


class Unnamed(TensorExamples):
    """Examples that no change of their values tells from others."""

    def fingerprint(self):
        return "unnamed"


def test_an_infinite_loss_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path):
    model, guide = small()
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        fit(model, guide, Unnamed(X, Y), **settings(), folder=tmp_path, should_stop=lambda: next(asked) >= 5)
    with pytest.raises(UserError, match=r"^example \d+: its inputs have NaN or infinite values \(step 6\)"):
        fit(model, guide, Unnamed(X + math.inf, Y), **settings(), folder=tmp_path)
    assert checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step == 5
    assert all(torch.isfinite(value).all() for value in state(model, guide).values())


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("where", ["0", "2"])
def test_what_went_bad_first_is_named(where, clip_norm):
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
        fit(model, guide, X, Y, **settings(clip_norm=clip_norm))
    assert all(torch.isfinite(value).all() for value in state(model, guide).values())


def test_gradients_that_were_there_before_do_not_count():
    model, guide = small()
    expected = fit(model, guide, X, Y, **settings())
    model, guide = small()
    with pytest.raises(UserError, match=r"^example 3: its inputs"):
        fit(model, guide, X.index_fill(0, torch.tensor([3, 7]), math.nan), Y, **settings(batch_size=50))
    # Nothing was updated, and it is in evaluation mode as after any training.
    assert not model.training
    assert fit(model, guide, X, Y, **settings())[-1]["loss"] == expected[-1]["loss"]


def test_a_layer_whose_output_overflows_is_named():
    model, guide = small()
    with torch.no_grad():
        guide.loc.get_parameter("2.weight").fill_(3e38)
    with pytest.raises(Diverged, match=r"the output of layer net.2 is the first"):
        fit(model, guide, X * 10, Y, **settings(estimator="plain"))


def test_a_parameter_that_is_not_finite_is_named():
    model, guide = small()

    def spoil():
        with torch.no_grad():
            guide.unconstrained_scale.get_parameter("2.weight")[0, 0] = math.nan
        return False

    with pytest.raises(Diverged, match=r"unconstrained_scale.2.weight of the guide is not finite"):
        fit(model, guide, X, Y, **settings(), should_stop=spoil)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, rmsprop, ivon; got 'sgd'"),
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
        ({"optimizer": "ivon", "kl_weight": 0.0}, "kl_weight must be positive and finite throughout training, got 0.0"),
        (
            {"kl_weight": lambda progress: 0.5 - progress},
            "kl_weight must be positive and finite throughout training, got -",
        ),
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
