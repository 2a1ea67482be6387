"""Settings are defined once: `fit`, the command line and the comparison of trainings agree field by field."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import torch

from ppl_bnn import fit
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.config import Config, TrainConfig
from ppl_bnn.experiment.saved_config import trained_part
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.registry import lookup
from ppl_bnn.run import _parser
from ppl_bnn.settings import Count, OneOf, Positive, check, decisive, documented, setting

# A run's defaults that are not fit's, and no others.
OTHER_DEFAULTS = {"epochs": 23, "optimizer": "rmsprop", "checkpoint_every": 5, "keep_checkpoints": 10}
# Without a batch size, fit takes that of a DataLoader, and only then the default.
WITHOUT_DEFAULT = {"batch_size": None}
NOT_SETTINGS = {
    "model", "guide", "x", "y", "weights", "progress", "folder", "origin", "should_stop", "communicator", "validation",
    "callbacks", "loggers", "scheduler", "scheduler_every",
}  # fmt: skip


def test_fit_its_settings_and_the_config_agree_field_by_field():
    signature = inspect.signature(fit).parameters
    config = {known.name: known for known in dataclasses.fields(TrainConfig)}
    own = dataclasses.fields(TrainSettings)
    # The command line makes the KL weight out of four settings of its own.
    assert {known.name for known in own} == signature.keys() - NOT_SETTINGS - {"kl_weight"}
    assert signature["kl_weight"].default == config["kl_weight"].default
    for known in own:
        default = signature[known.name].default
        if known.name in WITHOUT_DEFAULT:
            assert default is WITHOUT_DEFAULT[known.name]
            default = known.default
        assert known.default == (dataclasses.MISSING if default is inspect.Parameter.empty else default), known.name
        assert config[known.name].default == OTHER_DEFAULTS.get(known.name, default), known.name
        assert config[known.name].metadata == known.metadata
        assert TrainConfig.__annotations__.get(known.name, known.type) == known.type
        assert f"{known.name}: {known.metadata['help']}" in fit.__doc__
    assert OTHER_DEFAULTS.keys() <= {known.name for known in own}


def test_the_settings_that_decide_a_training_are_one_list():
    of_fit = set(decisive(TrainSettings))
    assert {"lr_per_rank", "compression", "seed", "epochs"} <= of_fit
    assert not {"bucket_mb", "compare_every", "keep_checkpoints"} & of_fit
    assert trained_part(Config())["train"].keys() == of_fit | {
        "kl_weight", "kl_schedule", "kl_ramp", "kl_cycles", "validation",
    }  # fmt: skip


def test_help_shows_choices_and_ranges():
    text = " ".join(_parser().format_help().split())
    for part in (
        "{adam,rmsprop,ivon} or an import path",
        "--train.precision {float32,bfloat16}",
        "Annotated[int, at least 1], default: 23",
        "Annotated[float, in [0, 1)]",
    ):
        assert part in text


@documented
@dataclass
class Oven:
    """An oven."""

    trays: Count | None = setting(None, help="how many")
    degrees: list[Positive] = setting(factory=lambda: [180.0], help="one after the other")
    mode: Literal["fan", "grill"] = setting("fan", help="which")
    food: Annotated[str, OneOf({"bread": object})] = setting("bread", help="what")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trays": 0}, "oven.trays must be at least 1, got 0"),
        ({"trays": 1.5}, "oven.trays must be a whole number and be at least 1, got 1.5"),
        ({"trays": True}, "oven.trays must be a whole number and be at least 1, got True"),
        ({"degrees": [180.0, -1.0]}, "oven.degrees must be positive and finite, got -1.0"),
        ({"degrees": [float("nan")]}, "oven.degrees must be positive and finite, got nan"),
        ({"degrees": ["hot"]}, "oven.degrees must be a number and be positive and finite, got 'hot'"),
        ({"mode": "steam"}, "oven.mode must be one of fan, grill; got 'steam'"),
        ({"food": "cake"}, "oven.food must be one of bread; got 'cake' (or give the import path"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_what_is_expected(changes, message):
    check(Oven())
    check(Oven(trays=2, food="collections:OrderedDict"))
    with pytest.raises(UserError) as error:
        check(Oven(**changes), prefix="oven.")
    assert str(error.value).startswith(message)


def test_the_help_of_each_setting_stands_in_the_docstring():
    assert "Args:\n        trays: how many\n        degrees: one after the other\n" in Oven.__doc__


def test_a_registry_takes_an_import_path_of_the_users_own():
    assert lookup({"adam": torch.optim.Adam}, "adam") is torch.optim.Adam
    assert lookup({}, "torch.optim:SGD") is torch.optim.SGD
    assert lookup({}, "torch:nn.ReLU") is torch.nn.ReLU
    for name, message in (
        ("adam", "the name must be one of sgd; got 'adam'"),
        ("nowhere:build", "must be importable, got 'nowhere:build': ModuleNotFoundError: No module named 'nowhere'"),
        ("torch.optim:Nothing", "must be importable, got 'torch.optim:Nothing'"),
        ("math:pi", "must name something callable, got 'math:pi', a float"),
    ):
        with pytest.raises(UserError, match=message):
            lookup({"sgd": torch.optim.SGD}, name)


def test_an_optimizer_a_network_and_an_estimator_of_the_users_own_train():
    from small_training import X, Y, settings, small, state

    model, guide = small()
    before = state(model, guide)
    fit(model, guide, X, Y, **settings(epochs=1, optimizer="torch.optim:SGD", estimator="contextlib:nullcontext"))
    assert all(not torch.equal(value, before[name]) for name, value in state(model, guide).items())
