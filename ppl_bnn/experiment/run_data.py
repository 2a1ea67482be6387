"""The data that a run's settings name."""

from dataclasses import fields

from ppl_bnn.data import DataSettings, Split, load
from ppl_bnn.data.cache import data_folder
from ppl_bnn.data.settings import TargetKind
from ppl_bnn.errors import FileError
from ppl_bnn.experiment.config import Config
from ppl_bnn.models.likelihoods import Bernoulli, Categorical, NegativeBinomial, Normal, Poisson, StudentT
from ppl_bnn.models.likelihoods.parse import parse_likelihood


def load_data(config: Config, *, progress: bool) -> tuple[Split, Split]:
    """The run's training and test data.

    Raises:
        UserError, FileError: as `ppl_bnn.data.load`.
    """
    settings = config.data
    how = {known.name: getattr(settings, known.name) for known in fields(DataSettings)}
    try:
        train, test = load(
            folder=settings.dir, targets=target_kind(config), holdout=settings.holdout, progress=progress, **how
        )
    except OSError as error:
        where = (
            f"the data folder {data_folder(settings.dir)}" if settings.file is None else f"data.file {settings.file}"
        )
        raise FileError(f"{where} cannot be used: {error.strerror or error}") from None
    return train.first(settings.num_train), test.first(settings.num_test)


def target_kind(config: Config) -> TargetKind | None:
    """What the run's likelihood takes as targets; None for one of the user's own, which may take anything."""
    kinds: dict[TargetKind, tuple[type, ...]] = {
        "classes": (Categorical, Bernoulli),
        "counts": (Poisson, NegativeBinomial),
        "numbers": (Normal, StudentT),
    }
    likelihood = parse_likelihood(config.model.likelihood)
    return next((kind for kind, families in kinds.items() if type(likelihood) in families), None)
