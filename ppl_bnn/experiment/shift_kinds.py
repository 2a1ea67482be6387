"""Which shifts and which out-of-distribution data fit a run's data, and the check of their settings."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.data import DATASETS, IMAGE_SETS, Split, Table, described, first_inputs
from ppl_bnn.data.cache import data_folder
from ppl_bnn.data.settings import ARRAYS, TABLES, Request
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.config import DataConfig
from ppl_bnn.experiment.identity import Identity, identity
from ppl_bnn.experiment.located import without_folder
from ppl_bnn.experiment.run_data import data_settings, load_data, read_for
from ppl_bnn.experiment.setup import Experiment
from ppl_bnn.experiment.shift_config import SHIFT_KINDS, ShiftConfig
from ppl_bnn.inputs import form_of
from ppl_bnn.prediction.shifts import SHIFTS, Shift, shifts_of
from ppl_bnn.registry import lookup

# Of training data that are not in memory: examples whose standard deviations and values a shift knows.
_KNOWN = 10_000
# Out-of-distribution data of the named image sets.
_USUAL = {
    "mnist": ["fashion-mnist", "digits100k"],
    "fashion-mnist": ["mnist"],
    "digits100k": ["mnist"],
    "cifar10": ["noise"],
}


def shifts_for(run: Experiment, *, known: int | None = None) -> dict[str, Shift]:
    """{name: shift} of the run's data: those that fit them, and the user's own.

    Args:
        known: number of training examples that the shifts know (default: all in memory; of others some thousands).
    """
    data = run.train_data
    if run.examples == "images":
        fitting = dict(SHIFTS)
    else:
        known = known or (len(data) if data.in_memory else _KNOWN)
        columns = data.columns if isinstance(data, Table) else None
        fitting = shifts_of(first_inputs(data, known), columns=columns)
    return fitting | {name: lookup({}, name, what="shift.own") for name in run.config.shift.own}


def severities_for(run: Experiment, shifts: Mapping[str, Shift]) -> dict[str, list[float]]:
    """{name of a shift that fits the run's data: its severities}."""
    fitting, settings = _fitting(run, shifts), run.config.shift
    found = {name: levels for name, levels in settings.severities().items() if name in fitting and levels}
    if "blur" in found and settings.blur == ShiftConfig().blur:
        found["blur"] = [scale for scale in found["blur"] if scale <= _widest_blur(run)]
    return found


def without_effect(run: Experiment) -> set[str]:
    """The names of the settings in `ShiftConfig` that do not fit the run's data: no result depends on them."""
    return set(SHIFT_KINDS) - _fitting(run, shifts_for(run, known=2))


def _fitting(run: Experiment, shifts: Mapping[str, Shift]) -> set[str]:
    return {*shifts, *(("covariate",) if isinstance(run.test_data, Table) else ())}


def tilt_column(run: Experiment) -> tuple[str, Tensor] | None:
    """The column of the covariate shift: its name, and the test rows' values in training standard deviations [N].

    None where the data are no table. Unless `shift.column` names it, it is the column of numbers whose variance the
    targets share the most: the squared correlation ratio (of classes) or correlation (of numbers) over the training
    rows.

    Raises:
        UserError: shift.column names no column of numbers.
    """
    train, test = run.train_data, run.test_data
    if not (isinstance(train, Table) and isinstance(test, Table)):
        return None
    alone = {name: at[0] for name, at in train.columns.items() if len(at) == 1}
    named = {**{name: at for at, name in enumerate(train.features)}, **alone}
    name = run.config.shift.column
    if name is None:
        shared = _shared_variance(train)
        name = max(alone or named, key=lambda one: float(shared[named[one]]))
    elif name not in named:
        raise UserError(f"shift.column must be a column of numbers, one of {', '.join(named)}; got {name!r}")
    at = named[name]
    return name, (test.x[:, at] - train.x[:, at].mean()) / train.x[:, at].std(correction=0).clamp_min(1e-12)


def ood_names(run: Experiment, shifts: Mapping[str, Shift]) -> list[str]:
    """The names of the run's out-of-distribution data."""
    settings = run.config.shift
    if settings.ood is not None:
        return settings.ood
    noise = [name for name in ("noise", "feature_noise") if name in shifts and getattr(settings, name)]
    if run.examples == "images":
        return _USUAL.get(run.config.data.name, ["noise"])
    # One column alone has no dependence to lose.
    several = not isinstance(run.train_data, Table) or len(run.train_data.columns) > 1
    return ["shuffled"] if "shuffled" in shifts and several else ["noise"] * bool(noise)


def noise_of(settings: ShiftConfig, shifts: Mapping[str, Shift]) -> tuple[Shift, float]:
    """The noise that fits the data, and its largest severity.

    Raises:
        UserError: no noise fits, or it has no severities.
    """
    name = "noise" if "noise" in shifts else "feature_noise"
    if name not in shifts:
        raise UserError("shift.ood has noise, but no input of the network is a number; leave it out")
    if not getattr(settings, name):
        raise UserError(f"shift.ood has noise, but shift.{name} has no severity")
    return shifts[name], max(getattr(settings, name))


def other_data(run: Experiment, name: str) -> Split:
    """Another data source: a named set, a file such as ``csv:other.csv``, or an import path; its test part as a rule.

    Of it, as many examples as the run's test set has; each source is read once. A table or arrays of the run's own
    kind are read as the run's test rows are: standardized by the rows that the run trains on. A file without test data
    of its own is read whole if it is of the run's kind, else its test share.

    Raises:
        UserError, FileError: it cannot be read.
    """
    if name not in run.others:
        run.others[name] = _read(run, name).first(len(run.test_data))
    return run.others[name]


def outside_identities(run: Experiment) -> dict[str, Identity]:
    """What identifies the out-of-distribution data that are not images of a named set, by their names."""
    return {
        without_folder(name): identity(other_data(run, name), checksum=True)
        for name in _of_others(run.config.shift.ood or [])
    }


def _of_others(names: list[str]) -> list[str]:
    return [name for name in names if name not in ("noise", "shuffled", *IMAGE_SETS)]


def _read(run: Experiment, name: str) -> Split:
    own, (source, _, file) = run.config.data, name.partition(":")
    if source == own.name and source in (*TABLES, *ARRAYS):
        # Here, for pandas takes half a second to import.
        from ppl_bnn.data.array_data import read_more_arrays
        from ppl_bnn.data.table_files import read_more

        asked = Request(data_settings(run.config), data_folder(own.dir), **read_for(run.config))
        read = read_more if source in TABLES else read_more_arrays
        return read(asked, Path(file))
    if name in DATASETS or source not in DATASETS:
        data = DataConfig(name=name, dir=own.dir)
    elif source == own.name:
        data = replace(own, test_file=file, test_fraction=None, holdout=0, num_test=None)
    else:
        data = DataConfig(name=source, dir=own.dir, file=file, target=own.target)
    whole = replace(run.config.train, validation=0)
    try:
        found = load_data(replace(run.config, data=data, train=whole), progress=run.progress)
    except UserError as error:
        # It tells of data.file or data.test_file, which the user did not set.
        raise UserError(f"shift.ood {name} cannot be used: {error}") from error
    # The test set of the transformed digits is MNIST's own.
    return found.train if name == "digits100k" else found.test


def check_shift(run: Experiment) -> None:
    """Raise UserError for the first setting of the shift stage that does not fit the run's data."""
    settings, usual, count = run.config.shift, ShiftConfig(), len(run.test_data)
    shifts = shifts_for(run, known=2)
    severities = severities_for(run, shifts)
    for name in SHIFT_KINDS:
        if getattr(settings, name) != getattr(usual, name) and getattr(settings, name) and name not in severities:
            raise UserError(
                f"shift.{name} does not fit the {run.examples} of data.name {run.config.data.name}: leave it out"
            )
    if settings.column is not None and not isinstance(run.test_data, Table):
        raise UserError(f"shift.column is for tables, and data.name {run.config.data.name} has {run.examples}")
    tilt_column(run)
    names = ood_names(run, shifts)
    if "noise" in names:
        noise_of(settings, shifts)
    for name in names:
        if name in IMAGE_SETS and (shape := described(name).shape) != run.test_data.shape:
            raise _other_shape(name, shape, run.test_data.shape)
    for name in _of_others(names):
        both = other_data(run, name), run.test_data
        # As `predict_shifted` compares them.
        sizes = all(data.in_memory for data in both)
        given, taken = (form_of(first_inputs(data, 2), sizes=sizes) for data in both)
        if given != taken:
            raise _other_shape(name, given, taken)
    _check_titles(run, _of_others(names))
    if "shuffled" in names and "shuffled" not in shifts:
        raise UserError(f"shift.ood shuffled does not fit {run.examples}: leave it out")
    if not severities and not names:
        raise UserError(
            f"no shift fits the {run.examples} of data.name {run.config.data.name}: give one of your own by shift.own, "
            "or leave the stage shift out of --stages"
        )
    if too_wide := [scale for scale in severities.get("blur", ()) if scale > _widest_blur(run)]:
        raise UserError(
            f"shift.blur must be at most {_widest_blur(run)} for images of {min(run.test_data.shape[1:])} pixels, got "
            f"{too_wide[0]:g}"
        )
    if settings.temperature_on and not run.of_classes:
        raise UserError(
            f"shift.temperature_on is for classes, and model.likelihood is {run.config.model.likelihood}: leave it out"
        )
    if settings.temperature_on >= count:
        raise UserError(
            f"shift.temperature_on must leave test {run.examples} to measure on: below {count}, got "
            f"{settings.temperature_on}"
        )


def _check_titles(run: Experiment, names: list[str]) -> None:
    # A result tells the sets apart by their titles.
    seen: dict[str, str] = {}
    for name in names:
        title = other_data(run, name).title
        if title in seen:
            raise UserError(f"shift.ood {seen[title]} and {name} are both called {title!r}: rename one")
        seen[title] = name


def _other_shape(name: str, given: Any, taken: Any) -> UserError:
    given, taken = (list(shape) if isinstance(shape, tuple) else shape for shape in (given, taken))
    return UserError(f"shift.ood {name} has inputs {given}, and the network takes {taken}: leave it out")


def _widest_blur(run: Experiment) -> int:
    # Three standard deviations each way, in whole pixels, are mirrored at the edge.
    return int(min(run.test_data.shape[1:]) - 1) // 3


def _shared_variance(train: Table) -> Tensor:
    """Of each column the share of its variance that a linear function of the target explains, [D]."""
    x, y = train.x.double(), train.y
    basis = torch.nn.functional.one_hot(y, len(train.classes)).double() if train.classes else y.double().unsqueeze(1)
    x, basis = x - x.mean(0), basis - basis.mean(0)
    fitted = basis @ torch.linalg.lstsq(basis, x, driver="gelsd").solution
    return fitted.square().sum(0) / x.square().sum(0).clamp_min(1e-12)
