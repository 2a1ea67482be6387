"""The settings of a training: which there are, which of them decide what comes out, and what is refused."""

import math
from collections.abc import Mapping
from typing import Any

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.distributed import check_buckets
from ppl_bnn.errors import UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.optimizers import LR_SCHEDULES, OPTIMIZERS

PRECISIONS = ("float32", "bfloat16")
# The settings that decide what comes out; two trainings that agree on them may share a folder.
DECISIVE = (
    "epochs", "batch_size", "lr", "optimizer", "beta2", "lr_schedule", "lr_warmup", "scale_lr_factor", "clip_norm",
    "estimator", "num_particles", "augment", "precision", "compile", "lr_per_rank", "compression",
)  # fmt: skip
SETTINGS = (
    *DECISIVE, "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "bucket_mb", "compare_every",
)  # fmt: skip


def check_settings(settings: Mapping[str, Any], *, prefix: str = "") -> None:
    """Raise UserError for the first of `fit`'s settings (those in SETTINGS) that is out of range, as prefix + name."""
    for name, known in (
        ("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES), ("estimator", tuple(ESTIMATORS)),
        ("augment", tuple(AUGMENTATIONS)), ("precision", PRECISIONS),
    ):  # fmt: skip
        if settings[name] not in known:
            raise UserError(f"{prefix}{name} must be one of {', '.join(known)}; got {settings[name]!r}")
    check_buckets(settings["bucket_mb"], settings["compression"], prefix=prefix)
    for name in ("epochs", "batch_size", "num_particles", "checkpoint_every", "keep_checkpoints", "compare_every"):
        if settings[name] is not None and settings[name] < 1:
            raise UserError(f"{prefix}{name} must be at least 1, got {settings[name]}")
    for name in ("lr", "scale_lr_factor", "clip_norm", "checkpoint_minutes"):
        value = settings[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{prefix}{name} must be positive and finite, got {value}")
    for name in ("beta2", "lr_warmup"):
        if not 0 <= settings[name] < 1:
            raise UserError(f"{prefix}{name} must lie in [0, 1), got {settings[name]}")
    if settings["optimizer"] == "ivon" and settings["scale_lr_factor"] != 1:
        raise UserError(f"{prefix}scale_lr_factor has no effect with ivon: its scales follow the curvature")
