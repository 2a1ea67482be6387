"""The data of a run, by its settings."""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ppl_bnn.data import DataSettings, Split, load
from ppl_bnn.data.cache import data_folder
from ppl_bnn.data.classes import warn_of_classes
from ppl_bnn.data.settings import FILES, TargetKind
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.experiment.config import Config, DataConfig
from ppl_bnn.models.likelihoods import Bernoulli, Categorical, NegativeBinomial, Normal, Poisson, StudentT
from ppl_bnn.models.likelihoods.parse import parse_likelihood
from ppl_bnn.models.networks import NETWORKS


class RunData(NamedTuple):
    """The data of a run; `validation` are the last training examples, kept out of training, or None."""

    train: Split
    validation: Split | None
    test: Split


def load_data(config: Config, *, progress: bool) -> RunData:
    """The data that a run's settings name.

    Raises:
        UserError, FileError: as `ppl_bnn.data.load`; or validation leaves no examples to train on.
    """
    settings = config.data
    _check_files(settings)
    how = vars(data_settings(config)) | read_for(config)
    try:
        train, test = load(folder=settings.dir, progress=progress, **how)
    except OSError as error:
        where = (
            f"the data folder {data_folder(settings.dir)}" if settings.file is None else f"data.file {settings.file}"
        )
        raise FileError(f"{where} cannot be used: {error.strerror or error}") from None
    test = test.first(settings.num_test)
    held_out = config.train.validation
    if not held_out:
        return RunData(train, None, test)
    if held_out >= len(train):
        raise UserError(f"train.validation must be below the number of training examples, {len(train)}; got {held_out}")
    cut = len(train) - held_out
    validation = train.rows(slice(cut, None), "validation")
    train = train.first(cut)
    warn_of_classes(train, validation)
    return RunData(train, validation, test)


def data_settings(config: Config) -> DataSettings:
    """What a run's data are read from, and how."""
    return DataSettings(**{known.name: getattr(config.data, known.name) for known in fields(DataSettings)})


def read_for(config: Config) -> dict[str, Any]:
    """What a run's data are read for, by the names of `Request`: its targets, and which rows it trains on."""
    settings = config.data
    # A network of the user's own may embed tokens.
    return {
        "targets": target_kind(config), "holdout": settings.holdout, "num_train": settings.num_train,
        "validation": config.train.validation, "tokens": config.model.name not in NETWORKS,
    }  # fmt: skip


def _check_files(settings: DataConfig) -> None:
    """Raise FileError for a file that is neither where settings have it nor in `data.dir` (`located.locate_files`)."""
    if settings.dir is None or settings.name not in FILES:
        return
    for name in ("file", "test_file"):
        given = getattr(settings, name)
        if given is not None and not Path(given).exists():
            raise FileError(f"data.{name} {given} is not there, and neither is {Path(settings.dir, Path(given).name)}")


def target_kind(config: Config) -> TargetKind | None:
    """What the run's likelihood takes as targets; None for one of the user's own, which may take anything."""
    kinds: dict[TargetKind, tuple[type, ...]] = {
        "classes": (Categorical, Bernoulli),
        "counts": (Poisson, NegativeBinomial),
        "numbers": (Normal, StudentT),
    }
    likelihood = parse_likelihood(config.model.likelihood)
    return next((kind for kind, families in kinds.items() if type(likelihood) in families), None)
