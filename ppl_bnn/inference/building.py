"""Puts together what a step of a training needs."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.distributed import Communicator
from ppl_bnn.inference.door import Training
from ppl_bnn.inference.gradient_step import GradientStep
from ppl_bnn.inference.objective import gradient_buckets, objective_for
from ppl_bnn.inference.optimizers import build_optimizer
from ppl_bnn.inference.own_optimizer import OwnOptimizer, own_optimizer
from ppl_bnn.inference.reading import Reader
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inference.step import Step
from ppl_bnn.inference.updates import Update
from ppl_bnn.models.modes import mode_setter
from ppl_bnn.native.arithmetic import compiled_arithmetic
from ppl_bnn.registry import lookup


def build_step(
    trained: Training, reader: Reader, settings: TrainSettings, ranks: Communicator, kl_weight: float, *,
    optimizer: OwnOptimizer | None = None, augment: Callable[[Any], Any] | None = None,
) -> Step:  # fmt: skip
    """The step of a training.

    Args:
        trained: what passed the check at the door.
        kl_weight: at the start; IVON's throughout.
        optimizer, augment: the user's own, in place of those that the settings name.

    Raises:
        UserError: an optimizer that does not fit what is trained.
    """
    model, guide, params = trained.model, trained.guide, trained.params
    num_data = len(reader.examples)
    kl_per_datum = kl_weight / num_data
    if optimizer is None:
        used = build_optimizer(
            settings.optimizer, model, guide, params.values(), lr=settings.lr, scale_lr_factor=settings.scale_lr_factor,
            beta2=settings.beta2, kl_per_datum=kl_per_datum,
        )  # fmt: skip
    else:
        used = own_optimizer(optimizer, model, guide, params, kl_per_datum=kl_per_datum)
    objective = objective_for(
        trained, settings.estimator, num_data, num_particles=settings.num_particles, compile=settings.compile,
        gathers=ranks.size == 1, tells=ranks.is_main,
    )  # fmt: skip
    flat = objective.flat
    buckets = gradient_buckets(
        model, guide, flat, ranks, bucket_mb=settings.bucket_mb, compression=settings.compression,
        params=params.values(),
    )  # fmt: skip
    core = GradientStep(
        objective, Update(used, flat, clip_norm=settings.clip_norm), buckets=buckets if ranks.size > 1 else None,
        device=used.param_groups[0]["params"][0].device, cuda_graph=settings.cuda_graph,
    )  # fmt: skip
    return Step(
        model, guide, params, reader, settings, ranks, used, core, mode_setter(model),
        augment or lookup(AUGMENTATIONS, settings.augment), lambda progress: None,
    )  # fmt: skip


def enter(scopes: ExitStack, step: Step) -> None:
    """Enter what a step runs in."""
    settings = step.settings
    # A step adds to the gradients that are there: those of a training that diverged, or of the caller's own.
    step.optimizer.zero_grad()
    if step.core.buckets is not None:
        scopes.enter_context(step.core.buckets)
    scopes.enter_context(step.core.objective)
    if settings.compile:
        scopes.enter_context(compiled_arithmetic())
    # Its cache of parameters in half precision outlives their updates, as long as the context.
    half = settings.precision == "bfloat16"
    scopes.enter_context(torch.autocast(step.device.type, torch.bfloat16, enabled=half, cache_enabled=False))
