"""A run's settings, each defined once. `config_check` holds the rules between them, `saved_config` stores them."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ppl_bnn.data import DATASETS, DataSettings
from ppl_bnn.experiment.shift_config import CHECKPOINT, ShiftConfig
from ppl_bnn.guides.normal import SMALLEST_SCALE
from ppl_bnn.inference.settings import OptimizerName, TrainSettings
from ppl_bnn.models import NETWORKS
from ppl_bnn.prediction.draws import COMPACT
from ppl_bnn.prediction.predictive import METHODS, SAMPLINGS
from ppl_bnn.pruning.criteria import CRITERIA, STRUCTURES
from ppl_bnn.pruning.masks import SCOPES, Threshold
from ppl_bnn.settings import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Share,
    documented,
    setting,
    with_default,
)


@documented
@dataclass
class DataConfig(DataSettings):
    """What to learn from."""

    # With its choices, for --help.
    name: Annotated[str, OneOf(DATASETS)] = with_default(DataSettings, "name", "mnist")
    dir: str | None = setting(
        None, help="folder of the named data sets; each is downloaded or made once (default: $PPL_BNN_DATA; else data, "
        "if it has one; else ~/.cache/ppl_bnn)",
        decisive=False, per_host=True,
    )  # fmt: skip
    holdout: Natural = setting(
        0, help="evaluate on this number of the last training examples, kept out of training, instead of the test set "
        "(not for digits100k)",
    )  # fmt: skip
    num_train: Count | None = setting(None, help="use only this number of training examples, the first (default: all)")
    num_test: Count | None = setting(
        None, help="use only this number of test examples, the first (default: all)", decisive=False
    )


@documented
@dataclass
class ModelConfig:
    """The network, its prior and the likelihood."""

    name: Annotated[str, OneOf(NETWORKS)] = setting(
        "bnn-fc", help="bnn-fc or bnn-conv for digits of ten classes; lenet for images of 16 pixels or more, vgg16 or "
        "resnet18 for images of 28 or 32; mlp (two layers of 50 units) for any inputs; or the import path of a "
        "function or class of your own that makes a network: my_package.nets:Net. It gets the shape of one input "
        "first, (channels, height, width) of an image, and num_outputs too if it has such a parameter",
    )  # fmt: skip
    options: dict[str, Any] = setting(
        factory=dict, help="further keyword arguments of that function or class: {width: 64}",
    )  # fmt: skip
    likelihood: str = setting(
        "categorical", help="of the targets: categorical (class labels), bernoulli (0 or 1), normal(scale) or "
        "student_t(df, scale) (numbers), poisson or negative_binomial(overdispersion) (counts), or the import path of "
        "your own; arguments may be left out; a scale or overdispersion is a positive number, learnt (the default), "
        "predicted by the network, or its prior, such as log_normal(-1, 1)",
    )  # fmt: skip
    deterministic: bool = setting(False, help="the network's deterministic twin, trained by maximum likelihood")
    prior: str | dict[str, str] = setting(
        "normal(0, 1)", help="normal(loc, scale), laplace(loc, scale), student_t(df, loc, scale), "
        "scale_mixture(weight, scale1, scale2), or one with parameters of its own: learnt_normal(scale), whose scale "
        "is trained for each layer, hierarchical(hyper_prior), ard(hyper_prior), horseshoe(scale) or "
        "regularized_horseshoe(scale, slab), where a hyper-prior is half_cauchy(scale), half_normal(scale), "
        "log_normal(loc, scale) or gamma(concentration, rate); or the import path of your own, a function of (site, "
        "shape); or a mapping from site-name patterns to such priors",
    )  # fmt: skip
    prior_from: str | None = setting(
        None, help="out folder of a finished run (or one of its checkpoints) whose posterior is this run's prior, in "
        "place of model.prior; it must stay where it is",
        per_host=True,
    )  # fmt: skip
    bayesian_bias: bool = setting(False, help="give the biases the prior too (default: point estimates)")


@documented
@dataclass
class GuideConfig:
    """Where the mean-field Normal guide starts."""

    init_loc: float | str = setting(0.1, help="standard deviation of loc around 0, or he for sqrt(2 / fan_in)")
    init_scale: Annotated[
        float, Range(f"be above {SMALLEST_SCALE} and finite", lambda value: SMALLEST_SCALE < value < float("inf"))
    ] = setting(
        0.0486, help="initial scale of the weights (TensorFlow Probability's default: softplus(-3) = 0.0486)"
    )  # fmt: skip
    init_jitter: NotNegative = setting(0.1, help="standard deviation of the initial unconstrained scale")
    init_relative_scale: Positive | None = setting(
        None, help="start from scale = this times |loc| instead (MOPED; needs init_from)"
    )
    init_from: str | None = setting(
        None, help="out folder (or checkpoint) of a trained deterministic twin whose weights loc starts from",
        per_host=True,
    )  # fmt: skip


@documented
@dataclass
class TrainConfig(TrainSettings):
    """How to train."""

    # A run's defaults that are not `fit`'s; all others are.
    epochs: Count = with_default(TrainSettings, "epochs", 23)
    optimizer: OptimizerName = with_default(TrainSettings, "optimizer", "rmsprop")
    checkpoint_every: Count = with_default(TrainSettings, "checkpoint_every", 5)
    keep_checkpoints: Count | None = with_default(TrainSettings, "keep_checkpoints", 10)

    kl_weight: Positive = setting(
        1.0, help="weight of the KL in the ELBO; 1 is the Bayesian posterior, below 1 a colder one"
    )
    kl_schedule: Literal["constant", "linear", "cyclical"] = setting(
        "constant", help="constant, linear or cyclical rise of the KL weight"
    )
    kl_ramp: Fraction = setting(
        0.5, help="the rise takes this fraction of the training (linear) or of each cycle (cyclical)"
    )
    kl_cycles: Count = setting(4, help="number of cycles")
    validation: Natural = setting(
        0, help="number of the last training examples that are kept out of training for its validation"
    )
    tensorboard: bool = setting(
        False, help="write the training's numbers for TensorBoard too, into out/tensorboard", decisive=False
    )
    rank_timeout: Positive = setting(
        600.0, help="seconds to wait for a silent rank before the others exit", decisive=False
    )


@documented
@dataclass
class PredictConfig:
    """The posterior predictive."""

    num_samples: Count = setting(
        400, help="number of weight draws (the maximum for each example if predict.tolerance is set)"
    )
    method: Annotated[str, OneOf(METHODS)] = setting(
        "auto", help="draws (each is one network), layerwise (pre-activations of dense layers), moments (an "
        "approximation without draws: on average 0.003 to 0.025 of probability from 1000 draws, and its epistemic "
        "uncertainty too small by 11% to 51%, on ResNet-18 by 96%) or auto (of the first two, the one that needs fewer "
        "random numbers)",
    )  # fmt: skip
    sampling: Annotated[str, OneOf(SAMPLINGS)] = setting(
        "independent", help="independent, antithetic (mirrored pairs) or sobol (quasi-random, with the method "
        "layerwise)",
    )  # fmt: skip
    tolerance: Positive | None = setting(
        None, help="stop drawing for an example once its mean is known to within this, with 95% confidence: each "
        "probability of a class, or a number in units of the target (default: the same number of draws for all)",
    )  # fmt: skip
    compact: Annotated[str, OneOf(COMPACT)] = setting(
        "auto", help="compute draws of a pruned posterior in its smaller network, for prune too: yes, no, or auto "
        "(where that takes fewer operations); results differ by rounding",
    )  # fmt: skip
    norm_images: Annotated[int, Range("be 0 or at least 2", lambda value: value == 0 or value >= 2)] = setting(
        0, help="each draw's batch norm takes its statistics from this number of training images, about 1000, instead "
        "of the running averages; each draw, of shift and prune too, then costs that many images more (default: 0, the "
        "running averages)",
    )  # fmt: skip
    checkpoint: str = setting("last", help=f"{CHECKPOINT}, which goes into predictive-step-00006000.nc")
    posterior: str | None = setting(
        None, help="predict with this posterior file in place of the checkpoint's posterior, such as the out folder's "
        "pruned.safetensors; the result goes into predictive-pruned.nc, after the file's name",
        per_host=True,
    )  # fmt: skip
    seed: Natural = setting(0, help="seed of the draws")
    train_log_likelihood: bool = setting(
        False, help="write train_log_likelihood.nc too: each draw's log likelihood of every training example, and its "
        "log prior and log posterior density, for leave-one-out cross-validation",
    )  # fmt: skip


@documented
@dataclass
class PruningConfig:
    """The pruning study."""

    threshold: float | list[float] | dict[str, float] = setting(
        10.0, help="prune weights whose score (|loc| / scale unless criterion says otherwise) is below this; one "
        "number, a list, or a mapping from patterns of site names to a number each",
    )  # fmt: skip
    fractions: list[Share] = setting(
        factory=lambda: [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], help="prune these shares of the weights"
    )
    scope: Annotated[str, OneOf(SCOPES)] = setting(
        "global", help="global ranks all weights together; layer prunes the same share of each layer"
    )
    criterion: Annotated[str, OneOf(CRITERIA)] = setting(
        "snr", help="snr (|loc| / scale), kl (nats) or evidence (nats of log evidence that fixing it at zero costs)"
    )
    structure: Annotated[str, OneOf(STRUCTURES)] = setting(
        "weights", help="weights, or whole units (dense units, filters) or inputs (pixels, units, channels)"
    )
    finetune_epochs: Natural = setting(0, help="fine-tune each level for this number of epochs before it is evaluated")
    finetune_lr: Positive | None = setting(None, help="learning rate of the fine-tuning (default: train.lr)")
    num_samples: Count = setting(
        200, help="number of weight draws at each level; other draws than those in pruning.nc go beside it: "
        "pruning-100draws.nc, pruning-seed1.nc",
    )  # fmt: skip
    checkpoint: str = setting("last", help=f"{CHECKPOINT}, which goes into pruning-step-00006000.nc")
    seed: Natural = setting(0, help="seed of the draws")
    save_fraction: Share | None = setting(
        None, help="write pruned.safetensors with this share of the weights pruned (default: no such file), "
        "fine-tuned if finetune_epochs is set; it is then a level of its own",
    )  # fmt: skip

    keep_images: list[Natural] | None = setting(
        None, help="numbers of the test examples, from 0, whose single draws pruning.nc keeps (default: of each class "
        "the first and, where predictive.nc is there, the ten most uncertain; of numbers 100 from the smallest target "
        "to the largest; of several labels an example 100 evenly and the ten most uncertain)",
    )  # fmt: skip
    save_snr: bool = setting(False, help="write each weight's signal-to-noise ratio into pruning.nc too")

    def thresholds(self) -> list[Threshold]:
        """The thresholds as a list."""
        return list(self.threshold) if isinstance(self.threshold, list) else [self.threshold]


@documented
@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    device: str = setting("cpu", help="cpu, cuda or cuda:N; other torch devices are untested", decisive=False)
    threads: Count | None = setting(
        None, help="CPU threads torch uses (default: torch's own choice)", decisive=False, per_host=True
    )
    channels_last: bool = setting(
        False, help="memory layout of images and convolutions; faster on most machines", decisive=False
    )
