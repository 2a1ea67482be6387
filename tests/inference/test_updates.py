"""An update in flat buffers is the optimizer's own, its state too, and nothing that is not finite moves anything."""

import copy
import math

import pytest
import torch
from small_training import X, Y
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit
from ppl_bnn.inference.direct import DirectELBO
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inference.optimizers import build_optimizer, set_lr
from ppl_bnn.inference.updates import NonFiniteGradient, Update

OPTIMIZERS = ["adam", "rmsprop", "ivon", "torch.optim:SGD"]


def twins(name, frozen=None):
    """Twice the same model, guide and optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(bayesian(net), len(X))
    guide = MeanFieldNormal(model, X[:1], Y[:1])
    if frozen:
        for part in ("loc", "unconstrained_scale"):
            guide.get_parameter(f"{part}.{frozen}").requires_grad_(False)
    found = []
    for pair in ((model, guide), copy.deepcopy((model, guide))):
        optimizer = build_optimizer(name, *pair, lr=0.05, scale_lr_factor=1.0 if name == "ivon" else 2.0, beta2=0.9)
        optimizer.param_groups[0]["kl_per_datum"] = 1 / len(X)
        found.append((*pair, optimizer))
    return found


def take_steps(model, guide, optimizer, *, in_buffers, count=3, first=0, clip_norm=None):
    elbo = DirectELBO(model, guide, len(X))
    update = Update(optimizer, elbo.flat if in_buffers else None, clip_norm=clip_norm)
    for step in range(first, first + count):
        torch.manual_seed(step)
        set_lr(optimizer, "cosine", step / 10)
        update.prepare()
        found = elbo.completed(elbo.add(X, Y, kl_weight=0.5), 0.5)
        if in_buffers:
            update(found.squares)
        else:
            elbo.flat.give_gradients()
            update()
    return elbo


def assert_same(one, other):
    for (name, value), (_, expected) in zip(one[1].named_parameters(), other[1].named_parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    states = [optimizer.state_dict()["state"] for _, _, optimizer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for name, value in state.items():
            assert value.shape == states[1][number][name].shape
            torch.testing.assert_close(value, states[1][number][name], rtol=1e-4, atol=1e-7, msg=f"{number} {name}")


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("frozen", [None, "2.weight"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_in_buffers_are_three_steps_of_the_optimizer(name, frozen, clip_norm):
    one, other = twins(name, frozen)
    take_steps(*one, in_buffers=True, clip_norm=clip_norm)
    take_steps(*other, in_buffers=False, clip_norm=clip_norm)
    assert_same(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_is_loaded_goes_on_in_buffers(name):
    one, other = twins(name)
    take_steps(*one, in_buffers=True, count=5)
    take_steps(*other, in_buffers=False, count=2)
    # As a checkpoint does: a new optimizer has the state of the one before.
    model, guide, before = other
    again = build_optimizer(name, model, guide, lr=0.05, scale_lr_factor=1.0 if name == "ivon" else 2.0, beta2=0.9)
    again.load_state_dict(copy.deepcopy(before.state_dict()))
    again.param_groups[0]["kl_per_datum"] = 1 / len(X)
    take_steps(model, guide, again, in_buffers=True, count=3, first=2)
    assert_same(one, (model, guide, again))


@pytest.mark.parametrize("where", ["value", "bias"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_finite_moves_nothing(name, where):
    model, guide, optimizer = twins(name)[0]
    elbo = take_steps(model, guide, optimizer, in_buffers=True)
    update = Update(optimizer, elbo.flat)
    before = copy.deepcopy([*guide.parameters(), *model.parameters()]), copy.deepcopy(optimizer.state_dict())
    update.prepare()
    found = elbo.completed(elbo.add(X, Y, kl_weight=0.5), 0.5)
    if where == "bias":
        model.net[0].bias.grad[0] = math.nan
    with pytest.raises(NonFiniteGradient):
        update(math.inf if where == "value" else found.squares)
    for value, expected in zip([*guide.parameters(), *model.parameters()], before[0], strict=True):
        assert torch.equal(value, expected)
    for number, state in before[1]["state"].items():
        for key, value in state.items():
            # IVON counts the step.
            assert key == "step" or torch.equal(value, optimizer.state_dict()["state"][number][key])


def test_the_parameters_of_the_guide_lie_in_two_buffers():
    model, guide, _ = twins("adam")[0]
    flat = DirectELBO(model, guide, len(X)).flat
    for parameters, buffer in ((flat.locs, flat.arithmetic.loc), (flat.unconstrained_scales, flat.arithmetic.u)):
        assert {one.untyped_storage().data_ptr() for one in parameters} == {buffer.untyped_storage().data_ptr()}
        assert torch.equal(torch.cat([one.detach().flatten() for one in parameters]), buffer)


def test_a_guide_in_buffers_is_copied_moved_and_loaded_like_any_other():
    model, guide, optimizer = twins("adam")[0]
    take_steps(model, guide, optimizer, in_buffers=True)
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    copied = copy.deepcopy(guide)
    take_steps(model, guide, optimizer, in_buffers=True)
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
    guide.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in guide.state_dict().items())
    guide.double()
    assert {value.dtype for value in guide.parameters()} == {torch.float64}
    model.double()
    elbo = DirectELBO(model, guide, len(X))
    assert elbo.flat.arithmetic.loc.dtype == torch.float64
    assert math.isfinite(elbo.completed(elbo.add(X.double(), Y, kl_weight=1.0), 1.0).loss)


def test_an_optimizer_with_hooks_or_a_group_for_each_layer_runs_itself():
    model, guide, optimizer = twins("adam")[0]
    flat = DirectELBO(model, guide, len(X)).flat
    by_layer = torch.optim.RMSprop([{"params": [one], "lr": 0.1 / k} for k, one in enumerate(guide.parameters(), 1)])
    assert Update(by_layer, flat)._run is None
    assert Update(optimizer, flat)._run is not None
    optimizer.register_step_post_hook(lambda *_: None)
    assert Update(optimizer, flat)._run is None


def test_a_site_that_was_frozen_before_a_resume_counts_its_own_steps():
    one, other = twins("adam", "0.weight")
    for model, guide, optimizer in (one, other):
        take_steps(model, guide, optimizer, in_buffers=optimizer is one[2], count=4)
        for part in ("loc", "unconstrained_scale"):
            guide.get_parameter(f"{part}.0.weight").requires_grad_(True)
        take_steps(model, guide, optimizer, in_buffers=optimizer is one[2], count=2, first=4)
    assert_same(one, other)


def test_after_a_training_each_parameter_has_its_own_memory():
    model, guide, _ = twins("adam")[0]
    fit(model, guide, X, Y, epochs=1, batch_size=10, progress=False)
    parameters = [*guide.parameters()]
    assert len({one.untyped_storage().data_ptr() for one in parameters}) == len(parameters)
    assert all(one.untyped_storage().nbytes() == one.nbytes and one.grad is None for one in parameters)


def test_an_adam_with_settings_of_its_own_runs_itself():
    model, guide, _ = twins("adam")[0]
    optimizer = torch.optim.Adam([*guide.parameters(), model.net[0].bias], 0.1, weight_decay=0.1, fused=True)
    elbo = DirectELBO(model, guide, len(X))
    assert not Update(optimizer, elbo.flat).skips
    assert Update(build_optimizer("adam", model, guide, lr=0.1), elbo.flat).skips
    assert isinstance(build_optimizer("ivon", model, guide, lr=0.1), IVON)
