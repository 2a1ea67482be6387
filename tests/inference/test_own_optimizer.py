"""Optimizers and schedulers of the user's own: they train as by name, resume bitwise; what does not fit is named."""

from functools import partial

import pyro
import pytest
import torch
from small_training import X, Y, assert_same_state, settings, small, state, timeless
from torch.optim import lr_scheduler

from ppl_bnn import IVON, fit
from ppl_bnn.errors import Interrupted

WITHOUT_LR = {name: value for name, value in settings().items() if name != "lr"}


def parameters(model, guide):
    return [*guide.parameters(), *model.parameters()]


def sgd(given, **changes):
    return torch.optim.SGD(given, **{"lr": 0.05, "momentum": 0.9, **changes})


KINDS = {
    "sgd": sgd,
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "adam, decayed": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
}


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_an_object_trains_as_the_name_does(name):
    make = {"adam": KINDS["adam"], "rmsprop": partial(torch.optim.RMSprop, lr=0.01, alpha=0.9, eps=1e-7)}[name]
    model, guide = small()
    expected, there = fit(model, guide, X, Y, **settings(optimizer=name)), state(model, guide)
    model, guide = small()
    history = fit(model, guide, X, Y, **WITHOUT_LR, optimizer=make(parameters(model, guide)))
    assert timeless(history) == timeless(expected)
    assert_same_state(state(model, guide), there)


def test_a_class_trains_as_its_import_path_does():
    found = []
    for optimizer in ("torch.optim:AdamW", torch.optim.AdamW):
        model, guide = small()
        fit(model, guide, X, Y, **settings(optimizer=optimizer, scale_lr_factor=2.0))
        found.append(state(model, guide))
    assert_same_state(*found)


def test_ivon_as_an_object_knows_the_number_of_data():
    found = []
    for own in (False, True):
        model, guide = small()
        optimizer = "ivon"
        if own:
            pairs = [guide.parameters_of(site) for site in guide.sites]
            optimizer = IVON(pairs, [layer.bias for layer in (model.net[0], model.net[2])], lr=0.05, beta2=0.99)
        changes = {"optimizer": optimizer, **({} if own else {"lr": 0.05, "beta2": 0.99})}
        fit(model, guide, X, Y, **WITHOUT_LR, kl_weight=0.5, **changes)
        found.append(state(model, guide))
    assert_same_state(*found)
    with pytest.raises(ValueError, match="which a KL schedule would move"):
        fit(model, guide, X, Y, **WITHOUT_LR, optimizer=optimizer, kl_weight=lambda progress: 0.1 + progress)


SCHEDULES = {
    "none": (None, "step"),
    "cosine": (partial(lr_scheduler.CosineAnnealingLR, T_max=20), "step"),
    "one cycle": (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=60), "step"),
    "steps": (partial(lr_scheduler.MultiStepLR, milestones=[1, 3], gamma=0.5), "epoch"),
    "in turn": (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.MultiStepLR(optimizer, [3, 9], 0.5)],
            [5],
        ),
        "step",
    ),
    "plateau": (partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5), "epoch"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam"])
def test_an_interrupted_training_ends_bitwise_the_same(tmp_path, kind, schedule):
    def train(seed=0, **changes):
        model, guide = small(seed=seed)
        optimizer = KINDS[kind](parameters(model, guide))
        make, every = SCHEDULES[schedule]
        # An object, or a function of the optimizer.
        scheduler = make(optimizer) if seed and isinstance(make, partial) else make
        changes |= {"optimizer": optimizer, "scheduler": scheduler, "scheduler_every": every, "validation": (X, Y)}
        try:
            return fit(model, guide, X, Y, **WITHOUT_LR, **changes), state(model, guide)
        except Interrupted:
            return None

    whole, expected = train()
    asked = iter(range(1, 1000))
    assert train(folder=tmp_path, should_stop=lambda: next(asked) >= 16) is None
    resumed, found = train(4, folder=tmp_path)
    assert timeless(resumed) == timeless(whole)
    assert_same_state(expected, found)
    assert (len({row["lr"] for row in whole}) > 1) == (schedule != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_resumes_bitwise_from_a_function_of_the_parameters(tmp_path, kind):
    model, guide = small()
    whole, expected = fit(model, guide, X, Y, **WITHOUT_LR, optimizer=KINDS[kind]), state(model, guide)
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        fit(*small(), X, Y, **WITHOUT_LR, optimizer=KINDS[kind], folder=tmp_path, should_stop=lambda: next(asked) >= 9)
    model, guide = small(seed=3)
    assert timeless(fit(model, guide, X, Y, **WITHOUT_LR, optimizer=KINDS[kind], folder=tmp_path)) == timeless(whole)
    assert_same_state(expected, state(model, guide))
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_a_named_optimizer_takes_a_scheduler_and_its_steps_are_updates():
    rates = []

    class Rates:
        def on_step(self, training):
            rates.append(training.optimizer.param_groups[0]["lr"])

    halving = partial(lr_scheduler.ExponentialLR, gamma=0.5)
    fit(*small(), X, Y, **settings(epochs=1, batch_size=13), scheduler=halving, callbacks=[Rates()])
    assert rates == pytest.approx([0.005, 0.0025, 0.00125, 0.000625])
    rates.clear()
    fit(
        *small(),
        X,
        Y,
        **settings(epochs=2, batch_size=25),
        scheduler=halving,
        scheduler_every="epoch",
        callbacks=[Rates()],
    )
    assert rates == pytest.approx([0.01, 0.01, 0.005, 0.005])


def test_a_plateau_follows_the_monitored_score():
    plateau = partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.999999)
    history = fit(*small(), X, Y, **settings(), scheduler=plateau, validation=(X, Y))
    assert [row["lr"] for row in history] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_a_callback_may_change_the_rate_of_an_own_optimizer():
    class Slower:
        def on_epoch(self, training, record):
            training.optimizer.param_groups[0]["lr"] /= 2

    model, guide = small()
    own = sgd(parameters(model, guide))
    history = fit(model, guide, X, Y, **WITHOUT_LR, optimizer=own, callbacks=[Slower()])
    assert [row["lr"] for row in history] == [0.05, 0.025, 0.0125, 0.00625]


def test_a_schedule_by_name_is_of_the_rates_that_an_own_optimizer_has():
    model, guide = small()
    groups = [{"params": [*guide.parameters()], "lr": 0.1}, {"params": [*model.parameters()], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    rates = []

    class Rates:
        def on_step(self, training):
            rates.append([group["lr"] for group in training.optimizer.param_groups])

    fit(model, guide, X, Y, **WITHOUT_LR, optimizer=optimizer, lr_schedule="cosine", callbacks=[Rates()])
    assert rates[0] == [0.1, 0.2]
    assert rates[-1][0] == pytest.approx(rates[-1][1] / 2)
    assert rates[-1][0] < 0.01


def test_pyro_params_are_among_the_parameters():
    def model(x, y=None):
        bias = pyro.param("bias", torch.tensor(0.0))
        with pyro.plate("data", 50, subsample_size=len(x)):
            return pyro.sample("y", pyro.distributions.Bernoulli(logits=x[:, 0] + bias), obs=y)

    pyro.clear_param_store()
    fit(model, lambda x, y=None: None, X, Y.float(), **WITHOUT_LR, optimizer=partial(torch.optim.SGD, lr=1.0))
    assert pyro.param("bias") != 0


def another(model, guide):
    return torch.optim.SGD([*parameters(model, guide), torch.nn.Parameter(torch.zeros(3))], lr=0.1)


OTHER = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "changes", "message"),
    [
        (another, {}, r"1 parameters that are neither the model's nor the guide's, the first of shape \[3\]"),
        (lambda model, guide: sgd(guide.parameters()), {}, "the optimizer lacks 'net.0.bias', 'net.2.bias': build"),
        (lambda model, guide: sgd([*model.parameters(), *[*guide.parameters()][1:]]), {}, "'loc.0.weight of the guide"),
        (lambda model, guide: torch.optim.LBFGS(parameters(model, guide)), {}, "LBFGS calls the model several times"),
        (lambda model, guide: lambda given: given, {}, "must give a torch.optim.Optimizer, got a list"),
        (lambda model, guide: 3, {}, "optimizer must be a name, an object or a function, got 3"),
        (lambda model, guide: partial(sgd, lr=torch.tensor(0.1)), {}, "cannot hold .* give numbers"),
        (lambda model, guide: sgd, {"lr": 0.3}, "lr 0.3 has no effect beside an own optimizer"),
        (lambda model, guide: sgd, {"scale_lr_factor": 2.0}, "scale_lr_factor 2.0 has no effect"),
        (lambda model, guide: "adam", {"scheduler": partial(lr_scheduler.StepLR, step_size=1), "lr_schedule": "cosine"},
         "lr_schedule 'cosine' has no effect beside an own scheduler"),
        (lambda model, guide: "adam", {"scheduler": partial(lr_scheduler.StepLR, step_size=1), "lr_warmup": 0.1},
         "lr_warmup 0.1 has no effect"),
        (lambda model, guide: "adam", {"scheduler": lr_scheduler.StepLR(OTHER, 1)}, "of another optimizer"),
        (lambda model, guide: "adam", {"scheduler": lambda optimizer: None}, "torch scheduler, got a NoneType"),
        (lambda model, guide: "adam", {"scheduler": lr_scheduler.ReduceLROnPlateau}, "give fit validation data"),
        (lambda model, guide: "adam", {"scheduler": partial(lr_scheduler.StepLR, step_size=1),
                                       "scheduler_every": "batch"}, "must be step or epoch, got 'batch'"),
        (lambda model, guide: "adam", {"scheduler_every": "epoch"}, "'epoch' has no effect without a scheduler"),
        (lambda model, guide: "adam", {"scheduler": lr_scheduler.ReduceLROnPlateau, "validation": (X, Y),
                                       "monitor": "accuracy"}, "follows accuracy, so its mode must be max, got min"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(optimizer, changes, message):
    model, guide = small()
    before = state(model, guide)
    with pytest.raises(ValueError, match=message):
        fit(model, guide, X, Y, **WITHOUT_LR, optimizer=optimizer(model, guide), **changes)
    assert_same_state(before, state(model, guide))


def test_a_training_does_not_go_on_with_another_optimizer_or_scheduler(tmp_path):
    changes = {**WITHOUT_LR, "epochs": 1, "folder": tmp_path}
    fit(*small(), X, Y, **changes, optimizer=sgd)
    with pytest.raises(ValueError, match="holds a training with optimizer 'test_own_optimizer:sgd'"):
        fit(*small(), X, Y, **changes, optimizer=KINDS["adamw"])
    with pytest.raises(ValueError, match="holds a training with scheduler None, this one has 'torch"):
        fit(*small(), X, Y, **changes, optimizer=sgd, scheduler=partial(lr_scheduler.StepLR, step_size=1))


def mirrored(x):
    return x.flip(1)


def test_an_augmentation_may_be_a_function():
    model, guide = small()
    expected = fit(model, guide, X.flip(1), Y, **settings())
    model, guide = small()
    assert timeless(fit(model, guide, X, Y, **settings(augment=mirrored))) == timeless(expected)
