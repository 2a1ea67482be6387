"""The check of a run's settings before any work: each one's range and choices, and the rules between them."""

import math
from dataclasses import fields, is_dataclass

from ppl_bnn.data import DATASETS, IMAGE_SETS
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.config import Config, ModelConfig, PredictConfig, PruningConfig, ShiftConfig
from ppl_bnn.models import parse_prior
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.models.likelihoods.parse import parse_likelihood
from ppl_bnn.pruning.masks import check_threshold
from ppl_bnn.registry import lookup
from ppl_bnn.settings import check as check_ranges

# Out-of-distribution data that are made of the test examples.
MADE_OF_TEST = ("noise", "shuffled")


def check(config: Config) -> None:
    """Raise UserError for the first setting that is out of range or does not fit the others, by its dotted name."""
    config.train.check(prefix="train.")
    if config.train.patience is not None and config.train.validation == 0:
        raise UserError(
            f"train.patience {config.train.patience} waits for a better score of a validation: set train.validation to "
            "the number of training examples to keep out for it"
        )
    for known in fields(Config):
        part = getattr(config, known.name)
        if is_dataclass(part) and known.name != "train":
            check_ranges(part, prefix=f"{known.name}.")
    check_ranges(config)
    init_loc = config.guide.init_loc
    if init_loc != "he" and (isinstance(init_loc, str) or not 0 <= init_loc < math.inf):
        raise UserError(f"guide.init_loc must be 'he' or a standard deviation of at least 0, got {init_loc!r}")
    _check_shift(config.shift, config.data.name)
    likelihood = parse_likelihood(config.model.likelihood)
    _check_latents(config.model, likelihood)
    _check_predict(config.predict, likelihood)
    _check_pruning(config.pruning)
    _check_prior(config.model)


def _check_prior(model: ModelConfig) -> None:
    parse_prior(model.prior)
    if model.prior_from is not None and model.prior != ModelConfig().prior:
        raise UserError(
            f"model.prior_from takes the place of model.prior, got both: {model.prior_from} and {model.prior}; "
            "leave one out"
        )
    if model.prior_from is not None and model.deterministic:
        raise UserError("model.prior_from has no effect on a deterministic network: leave out one of the two")


def _check_shift(shift: ShiftConfig, data: str) -> None:
    for name in shift.ood or []:
        source, _, file = name.partition(":")
        if name in (*IMAGE_SETS, *MADE_OF_TEST) and name != data:
            continue
        if not file or name == data:
            raise UserError(
                f"shift.ood must name other data than data.name: some of {', '.join(IMAGE_SETS)}, "
                f"{', '.join(MADE_OF_TEST)}, a source with its file (csv:other.csv) or an import path; got {name!r}"
            )
        if source not in DATASETS:
            lookup({}, name, what="shift.ood")
    for name, levels in shift.own.items():
        if ":" not in name:
            raise UserError(f"shift.own must map import paths, my_package.shifts:fog, to severities; got {name!r}")
        lookup({}, name, what="shift.own")
        if not levels or not all(math.isfinite(level) for level in levels):
            raise UserError(f"shift.own must give {name} one finite severity or more, got {levels}")


def _check_latents(model: ModelConfig, likelihood: Likelihood) -> None:
    if not model.deterministic:
        return
    with forked_random():
        latents = likelihood.latents()
    if latents:
        raise UserError(
            f"model.deterministic is trained by maximum likelihood, and model.likelihood {model.likelihood} has a "
            "prior on its scale: make that a number, learnt or predicted"
        )


def _check_predict(predict: PredictConfig, likelihood: Likelihood) -> None:
    if predict.tolerance is not None and not likelihood.drawn and predict.tolerance >= 1:
        raise UserError(f"predict.tolerance must be above 0 and below 1 for probabilities, got {predict.tolerance}")
    if predict.sampling == "antithetic" and predict.num_samples % 2:
        raise UserError(f"predict.num_samples must be even for antithetic pairs, got {predict.num_samples}")
    if predict.sampling == "sobol" and (predict.method == "draws" or predict.tolerance is not None):
        raise UserError("predict.sampling sobol needs predict.method layerwise, and no predict.tolerance")
    if predict.norm_images and (predict.method not in ("auto", "draws") or predict.sampling == "sobol"):
        raise UserError(
            "predict.norm_images needs predict.method draws and independent or antithetic sampling, got "
            f"method {predict.method} and sampling {predict.sampling}"
        )
    if predict.posterior is not None and predict.train_log_likelihood:
        raise UserError("predict.train_log_likelihood is of a checkpoint's posterior: leave out predict.posterior")
    whole = predict.method in ("auto", "draws") and predict.sampling != "sobol" and not predict.norm_images
    if predict.compact == "yes" and not whole:
        raise UserError("predict.compact yes needs predict.method draws, and no predict.norm_images")


def _check_pruning(pruning: PruningConfig) -> None:
    if not pruning.thresholds() and not pruning.fractions:
        raise UserError("pruning needs at least one threshold or fraction; leave out the prune stage to skip it")
    if pruning.keep_images == []:
        raise UserError("pruning.keep_images must name at least one image, or be null for the usual ones; got []")
    for threshold in pruning.thresholds():
        check_threshold(threshold, pruning.criterion)
