"""The check of a run's settings before any work."""

import dataclasses
import math

from ppl_bnn.data import DATASETS
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.config import Config
from ppl_bnn.guides.normal import SMALLEST_SCALE
from ppl_bnn.inference.elbo import kl_schedule
from ppl_bnn.inference.settings import check_settings
from ppl_bnn.models import NETWORKS, parse_prior
from ppl_bnn.prediction.draws import COMPACT
from ppl_bnn.prediction.predictive import METHODS, SAMPLINGS
from ppl_bnn.pruning.criteria import CRITERIA, STRUCTURES
from ppl_bnn.pruning.masks import SCOPES, check_threshold


def check(config: Config) -> None:
    """Raise UserError for the first setting that is out of range, by its dotted name."""
    data, model, guide, train = config.data, config.model, config.guide, config.train
    for name, value, known in (
        ("data.name", data.name, DATASETS),
        ("model.name", model.name, tuple(NETWORKS)),
        ("pruning.scope", config.pruning.scope, SCOPES),
        ("pruning.criterion", config.pruning.criterion, tuple(CRITERIA)),
        ("pruning.structure", config.pruning.structure, STRUCTURES),
        ("predict.method", config.predict.method, METHODS),
        ("predict.sampling", config.predict.sampling, SAMPLINGS),
        ("predict.compact", config.predict.compact, COMPACT),
    ):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    for name, count in (
        ("predict.num_samples", config.predict.num_samples),
        ("shift.num_samples", config.shift.num_samples),
        ("pruning.num_samples", config.pruning.num_samples),
        ("data.num_train", data.num_train),
        ("data.num_test", data.num_test),
        ("threads", config.threads),
    ):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    check_settings(dataclasses.asdict(train), prefix="train.")
    if not (math.isfinite(train.rank_timeout) and train.rank_timeout > 0):
        raise UserError(f"train.rank_timeout must be positive and finite, got {train.rank_timeout}")
    if not (math.isfinite(guide.init_scale) and guide.init_scale > SMALLEST_SCALE):
        raise UserError(f"guide.init_scale must be above {SMALLEST_SCALE} and finite, got {guide.init_scale}")
    for name, least in (
        ("train.seed", train.seed),
        ("predict.seed", config.predict.seed),
        ("shift.seed", config.shift.seed),
        ("shift.temperature_on", config.shift.temperature_on),
        ("pruning.seed", config.pruning.seed),
        ("pruning.finetune_epochs", config.pruning.finetune_epochs),
        ("data.holdout", data.holdout),
        ("guide.init_jitter", guide.init_jitter),
    ):
        if not 0 <= least < 2**63:
            raise UserError(f"{name} must be at least 0 and below 2^63, got {least}")
    finetune_lr = config.pruning.finetune_lr
    if finetune_lr is not None and not (math.isfinite(finetune_lr) and finetune_lr > 0):
        raise UserError(f"pruning.finetune_lr must be positive and finite, got {finetune_lr}")
    for name, levels in config.shift.severities().items():
        if not all(math.isfinite(level) and (level > 0 or name == "rotation") for level in levels):
            raise UserError(f"shift.{name} must be positive and finite, got {levels}")
    for name in config.shift.ood or []:
        if name not in (*DATASETS, "noise") or name == data.name:
            raise UserError(
                f"shift.ood must name other data than data.name, or noise: some of {', '.join(DATASETS)}, noise; "
                f"got {name!r}"
            )
    if "noise" in config.shift.sets(data.name) and not config.shift.noise:
        raise UserError("shift.ood has noise, but shift.noise has no severity")
    relative = guide.init_relative_scale
    if relative is not None and not (math.isfinite(relative) and relative > 0):
        raise UserError(f"guide.init_relative_scale must be positive and finite, got {relative}")
    if guide.init_loc != "he" and (isinstance(guide.init_loc, str) or not 0 <= guide.init_loc < math.inf):
        raise UserError(f"guide.init_loc must be 'he' or a standard deviation of at least 0, got {guide.init_loc!r}")
    if config.predict.sampling == "antithetic" and config.predict.num_samples % 2:
        raise UserError(f"predict.num_samples must be even for antithetic pairs, got {config.predict.num_samples}")
    if config.predict.sampling == "sobol" and (
        config.predict.method == "draws" or config.predict.tolerance is not None
    ):
        raise UserError("predict.sampling sobol goes with predict.method layerwise and without predict.tolerance")
    if config.predict.norm_images and (
        config.predict.method not in ("auto", "draws") or config.predict.sampling == "sobol"
    ):
        raise UserError(
            "predict.norm_images goes with predict.method draws and independent or antithetic sampling, got "
            f"method {config.predict.method} and sampling {config.predict.sampling}"
        )
    if config.predict.compact == "yes" and (
        config.predict.method not in ("auto", "draws")
        or config.predict.sampling == "sobol"
        or config.predict.norm_images
    ):
        raise UserError("predict.compact yes goes with predict.method draws and without predict.norm_images")
    if config.predict.norm_images < 0 or config.predict.norm_images == 1:
        raise UserError(f"predict.norm_images must be 0 or at least 2, got {config.predict.norm_images}")
    if config.predict.tolerance is not None and not 0 < config.predict.tolerance < 1:
        raise UserError(f"predict.tolerance must be above 0 and below 1, got {config.predict.tolerance}")
    if not config.pruning.thresholds() and not config.pruning.fractions:
        raise UserError("pruning needs at least one threshold or fraction; leave out the prune stage to skip it")
    for threshold in config.pruning.thresholds():
        check_threshold(threshold, config.pruning.criterion)
    for fraction in config.pruning.fractions:
        if not 0 <= fraction < 1:
            raise UserError(f"pruning.fractions must lie in [0, 1), got {fraction}")
    if config.pruning.save_fraction is not None and not 0 <= config.pruning.save_fraction < 1:
        raise UserError(f"pruning.save_fraction must lie in [0, 1), got {config.pruning.save_fraction}")
    try:
        kl_schedule(train.kl_schedule, train.kl_weight, ramp=train.kl_ramp, cycles=train.kl_cycles)
    except ValueError as error:
        raise UserError(f"train.{error}") from None
    parse_prior(model.prior)
