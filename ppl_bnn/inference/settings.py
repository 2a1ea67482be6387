"""The settings of a training, each defined once: `fit`, the command line and the checkpoints read them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.errors import UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.optimizers import OPTIMIZERS
from ppl_bnn.settings import Count, Natural, OneOf, Positive, Share, check, documented, setting

# Of the scores that `TrainSettings.monitor` names; all others are better when smaller.
BETTER_WHEN_LARGER = frozenset({"accuracy"})
OptimizerName = Annotated[str, OneOf(OPTIMIZERS)]


@documented
@dataclass
class TrainSettings:
    """How to train: the settings of `ppl_bnn.fit`."""

    epochs: Count = setting(help="passes over the training data")
    batch_size: Count = setting(100, help="examples a step, on each rank")
    lr: Positive = setting(1e-3, help="learning rate; ivon's is on SGD's scale, about 0.1")
    optimizer: OptimizerName = setting(
        "adam", help="adam, rmsprop or ivon (natural gradients, the scale from the curvature), or a torch optimizer's "
        "import path, such as torch.optim:SGD",
    )  # fmt: skip
    beta2: Share = setting(0.99999, help="decay of ivon's curvature")
    lr_schedule: Literal["constant", "cosine"] = setting(
        "constant", help="constant, or cosine down to 0 over the training"
    )
    lr_warmup: Share = setting(0.0, help="the learning rate rises linearly over this fraction of the training")
    scale_lr_factor: Positive = setting(
        1.0, help="the learning rate of the guide's scales is this times lr; it has no effect with ivon"
    )
    clip_norm: Positive | None = setting(None, help="clip the gradient's total norm to this (default: no clipping)")
    estimator: Annotated[str, OneOf(ESTIMATORS)] = setting(
        "groups", help="plain, flipout, flipout-bfloat16 (its noise in half precision), groups (sign-flipped groups) "
        "or local (local reparameterization)",
    )  # fmt: skip
    num_particles: Count = setting(1, help="weight draws a step")
    accumulate: Count = setting(
        1, help="batches an update: the gradient is that of one batch as large as all of them, in the memory of one"
    )
    validate_every: Count = setting(1, help="epochs between validations; the last epoch has one, too")
    validation_samples: Count = setting(10, help="weight draws of a validation")
    patience: Count | None = setting(
        None, help="end the training after this number of validations without a better score, with the best parameters "
        "(default: train all epochs, and keep the last)",
    )  # fmt: skip
    monitor: str = setting(
        "nll", help="the score of the validation that best parameters and patience go by: nll, accuracy, rmse, ..."
    )
    augment: Annotated[str, OneOf(AUGMENTATIONS)] = setting(
        "none", help="none or crop_flip (random shifts and mirror images)"
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", help="float32, or bfloat16 for the layers (torch.autocast); parameters and the KL stay float32"
    )
    compile: bool = setting(
        False,
        help="run the network through torch.compile, with the estimator plain; and on a GPU what of the weights' "
        "arithmetic is done site by site",
    )
    lr_per_rank: bool = setting(False, help="the learning rate is lr times the number of ranks")
    compression: Literal["none", "fp16"] = setting(
        "none", help="none, or fp16: ranks send their gradients in half precision"
    )
    checkpoint_every: Count = setting(1, help="epochs between checkpoints", decisive=False)
    checkpoint_minutes: Positive = setting(
        10.0, help="minutes between checkpoints within an epoch; longer if writing would take over 5% of the time",
        decisive=False,
    )  # fmt: skip
    keep_checkpoints: Count | None = setting(
        None, help="number of checkpoints to keep beside the start (step-00000000); null keeps all", decisive=False
    )
    bucket_mb: Positive = setting(
        25.0, help="ranks send their gradients in messages of about this many MiB", decisive=False
    )
    compare_every: Count | None = setting(
        50, help="steps between comparisons of the ranks' parameters, bit by bit, beside those before each checkpoint; "
        "null never compares", decisive=False,
    )  # fmt: skip
    cuda_graph: bool = setting(
        True, help="replay steps as a CUDA graph on a GPU, where a step can be captured: small kernels then follow "
        "each other without a pause", decisive=False,
    )  # fmt: skip
    log_every: Count = setting(
        50, help="steps between reads of what a GPU computed: its losses, and whether to stop", decisive=False,
    )  # fmt: skip
    seed: Natural = setting(0, help="seed of initialization, batches and noise")

    def check(self, *, prefix: str = "") -> None:
        """Raise UserError for the first setting that is out of range or has no effect, by prefix + name."""
        check(self, prefix=prefix)
        if self.optimizer == "ivon" and self.scale_lr_factor != 1:
            raise UserError(f"{prefix}scale_lr_factor has no effect with ivon: its scales follow the curvature")


def kl_weight_at(kl_weight: float | Callable[[float], float]) -> Callable[[float], float]:
    """The KL weight as a function of training progress in [0, 1]. Raises UserError if it is neither or no number."""
    if callable(kl_weight):
        return kl_weight
    try:
        constant = float(kl_weight)
    except (TypeError, ValueError):
        raise UserError(f"kl_weight must be a number or a function of progress, got {kl_weight!r}") from None
    return lambda _: constant


def kl_weights(weight_at: Callable[[float], float], optimizer: str) -> list[float]:
    """The KL weight at 17 points of a training, which tell one schedule from another.

    Raises:
        UserError: a weight that is not a positive and finite number, or a schedule with ivon.
    """
    try:
        weights = [float(weight_at(k / 97)) for k in range(0, 97, 6)]
    except TypeError as error:
        raise UserError(f"kl_weight, a function of progress in [0, 1], must return numbers: {error}") from None
    if bad := [weight for weight in weights if not 0 < weight < math.inf]:
        raise UserError(f"kl_weight must be positive and finite throughout training, got {bad[0]}")
    if optimizer in ("ivon", "ppl_bnn.inference.ivon:IVON") and len(set(weights)) > 1:
        raise UserError("ivon reads its curvature off the scale, which a KL schedule would move: use a constant one")
    return weights
