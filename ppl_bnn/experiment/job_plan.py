"""Which jobs there are: combinations of settings, and the folder of each."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ppl_bnn.errors import UserError
from ppl_bnn.experiment.trust import names_code

# What a training does not depend on.
_AFTER_TRAINING = ("predict.", "pruning.")

Settings = Mapping[str, Any]


class Job(NamedTuple):
    """One process of ``ppl_bnn.run``: its out folder, its stages and its settings."""

    folder: Path
    stages: Sequence[str]
    settings: Settings

    def arguments(self) -> list[str]:
        """The job's part of the command line. It comes last, so that it counts."""
        return [*_options(self.settings), "--out", str(self.folder), "--stages", ",".join(self.stages)]


def vary(options: Iterable[str]) -> list[dict[str, Any]]:
    """All combinations of ``setting=value,value`` (a YAML list without its brackets), the last setting fastest.

    Raises:
        UserError: not of that form, or the same value or setting twice.
    """
    choices: dict[str, list[Any]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not equals or not values or name in choices or len({_text(value) for value in values}) < len(values):
            raise UserError(f"--vary takes SETTING=VALUE,VALUE,... with each value and setting once; got {option!r}")
        choices[name] = values
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def shard(text: str) -> slice:
    """The part of the jobs that ``I/N`` names. Raises UserError for any other text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard takes I/N with I from 0 to N - 1, got {text!r}")
    return slice(int(match[1]), None, int(match[2]))


def varied_code(combinations: Iterable[Settings]) -> list[list[str]]:
    """The options of each combination that may name code of the user's own, each set of them once."""
    found = {}
    for job in combinations:
        code = {name: value for name, value in job.items() if names_code(_text(value))}
        found[name_of(code)] = _options(code)
    return list(found.values())


def check_folders(combinations: Sequence[Settings]) -> None:
    """Raise UserError if two jobs would have the same folder."""
    if len({name_of(job) for job in combinations}) < len(combinations):
        raise UserError("two jobs would have the same folder: choose values that differ in letters and digits")


def training_of(job: Settings) -> dict[str, Any]:
    """The settings of a job that its training depends on."""
    return {name: value for name, value in job.items() if not name.startswith(_AFTER_TRAINING)}


def training_folder(out: Path, job: Settings) -> Path:
    """The out folder of a job's training; `out` itself where the jobs vary no training."""
    training = training_of(job)
    return out / "jobs" / name_of(training) if training else out


def folder_of(out: Path, job: Settings) -> Path:
    """The out folder of a job: that of its training, or one in it for other settings of predictions and pruning."""
    after = {name: value for name, value in job.items() if name.startswith(_AFTER_TRAINING)}
    folder = training_folder(out, job)
    return (folder / name_of(after) if training_of(job) else out / "jobs" / name_of(after)) if after else folder


def link_checkpoints(folder: Path, training: Path) -> None:
    """Give a job the checkpoints of its training."""
    link = folder / "checkpoints"
    if folder != training and not link.is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(training / "checkpoints", folder))


def without_seed(job: Settings) -> dict[str, Any]:
    """The settings in which the chains of one merged result agree."""
    return {name: value for name, value in job.items() if name != "train.seed"}


def name_of(settings: Settings) -> str:
    """The name of a folder for these settings: ``train.seed=0,train.lr=0.01``."""
    return ",".join(f"{name}={re.sub(r'[^A-Za-z0-9._+-]+', '_', _text(value))}" for name, value in settings.items())


def _options(settings: Settings) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
