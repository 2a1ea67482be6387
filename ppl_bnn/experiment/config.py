"""A run's settings, typed. `config_check` validates them before any work, `saved_config` stores and compares them."""

from dataclasses import dataclass, field

from ppl_bnn.pruning.masks import Threshold


@dataclass
class DataConfig:
    """What to learn from.

    Args:
        name: mnist, fashion-mnist, cifar10 or digits100k (100,000 deformed and shifted digits made of MNIST's:
            infimnist-compatible indexing, own fields).
        dir: folder where data sets are kept; downloaded or made once.
        file: cifar10 only: an .npz of its images as JPEGs, to read instead of downloading.
        holdout: evaluate on the last so many training examples, kept out of training, instead of the test set
            (not for digits100k).
        num_train: use only the first so many training examples (default: all).
        num_test: use only the first so many test examples (default: all).
    """

    name: str = "mnist"
    dir: str = "data"
    file: str | None = None
    holdout: int = 0
    num_train: int | None = None
    num_test: int | None = None


@dataclass
class ModelConfig:
    """The network and its prior.

    Args:
        name: bnn-fc, bnn-conv, lenet, vgg16 or resnet18.
        deterministic: the network's deterministic twin, trained by maximum likelihood.
        prior: normal(loc, scale), laplace(loc, scale), student_t(df, loc, scale) or
            scale_mixture(weight, scale1, scale2); or a mapping from site-name patterns to such priors.
        bayesian_bias: give the biases the prior too (default: point estimates).
    """

    name: str = "bnn-fc"
    deterministic: bool = False
    prior: str | dict[str, str] = "normal(0, 1)"
    bayesian_bias: bool = False


@dataclass
class GuideConfig:
    """Where the mean-field Normal guide starts.

    Args:
        init_loc: standard deviation of loc around 0, or he for sqrt(2 / fan_in).
        init_scale: the weights' first scale (TensorFlow Probability's default: softplus(-3) = 0.0486).
        init_jitter: standard deviation of the unconstrained scale around it.
        init_relative_scale: start from scale = this times |loc| instead (MOPED; with init_from).
        init_from: out folder (or checkpoint) of a trained deterministic twin whose weights loc starts from.
    """

    init_loc: float | str = 0.1
    init_scale: float = 0.0486
    init_jitter: float = 0.1
    init_relative_scale: float | None = None
    init_from: str | None = None


@dataclass
class TrainConfig:
    """How to train.

    Args:
        epochs: passes over the training data.
        batch_size: examples a step, on each rank.
        lr: learning rate (ivon: on SGD's scale, about 0.1).
        optimizer: adam, rmsprop or ivon (natural gradients, the scale from the curvature).
        beta2: decay of ivon's curvature.
        lr_schedule: constant, or cosine down to 0.
        lr_warmup: the learning rate rises in a line over this fraction of training.
        scale_lr_factor: the guide's scales learn at this times lr.
        clip_norm: clip the gradient's norm to this (default: no clipping).
        estimator: plain, flipout, flipout-bfloat16 (its noise in half precision), groups (sign-flipped groups) or
            local (local reparameterization).
        kl_weight: weight of the KL in the ELBO; 1 is the Bayesian posterior, below 1 a colder one.
        kl_schedule: constant, linear or cyclical rise of the KL weight.
        kl_ramp: the rise takes this fraction of training (linear) or of each cycle (cyclical).
        kl_cycles: number of cycles.
        num_particles: weight draws a step.
        augment: none or crop_flip (random shifts and mirror images).
        precision: float32, or bfloat16 for the layers (torch.autocast).
        compile: run the weights' arithmetic through torch.compile where it is not C code: on a GPU.
        checkpoint_every: epochs between checkpoints.
        checkpoint_minutes: minutes between checkpoints inside an epoch.
        keep_checkpoints: how many to keep, beside the start (step-00000000).
        lr_per_rank: the learning rate is lr times the number of ranks.
        bucket_mb: ranks send their gradients in messages of about so many MiB.
        compression: none, or fp16 to send them in half precision.
        compare_every: steps after which the ranks' parameters must be the same bit by bit; null never compares.
        rank_timeout: seconds to wait for a rank that gives no sign before the others end.
        seed: of initialization, batches and noise.
    """

    epochs: int = 23
    batch_size: int = 100
    lr: float = 1e-3
    optimizer: str = "rmsprop"
    beta2: float = 0.99999
    lr_schedule: str = "constant"
    lr_warmup: float = 0.0
    scale_lr_factor: float = 1.0
    clip_norm: float | None = None
    estimator: str = "groups"
    kl_weight: float = 1.0
    kl_schedule: str = "constant"
    kl_ramp: float = 0.5
    kl_cycles: int = 4
    num_particles: int = 1
    augment: str = "none"
    precision: str = "float32"
    compile: bool = False
    checkpoint_every: int = 5
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int | None = 10
    lr_per_rank: bool = False
    bucket_mb: float = 25.0
    compression: str = "none"
    compare_every: int | None = 50
    rank_timeout: float = 600.0
    seed: int = 0


@dataclass
class PredictConfig:
    """The posterior predictive.

    Args:
        num_samples: Monte Carlo draws of the weights; the most, where there is a tolerance.
        method: draws (each is one network), layerwise (pre-activations of dense layers), moments (an approximation
            without draws: on average 0.003 to 0.025 of probability from 1000 draws, and its epistemic uncertainty too
            small by 11% to 51%, on ResNet-18 by 96%) or auto (of the first two, the one that needs fewer random
            numbers).
        sampling: independent, antithetic (mirrored pairs) or sobol (quasi-random, with the method layerwise).
        tolerance: no further draws of an image whose probabilities are known to within this, with 95% confidence
            (default: the same number of draws for all).
        compact: compute draws of a pruned posterior in its smaller network, for prune too: yes, no, or auto (where that
            takes fewer operations). Results differ by rounding.
        norm_images: each draw's batch norm has its own statistics, of the first so many training images, in place of
            averages over training's draws: as many images more to predict, for the draws of shift and prune too; about
            1000 (default: 0, the running averages).
        checkpoint: which saved step to use: last, or a name such as step-00006000.
        seed: of the draws.
        train_log_likelihood: write train_log_likelihood.nc too: each draw's log likelihood of every training example,
            and its log prior and log posterior density, for leave-one-out cross-validation.
    """

    num_samples: int = 400
    method: str = "auto"
    sampling: str = "independent"
    tolerance: float | None = None
    compact: str = "auto"
    norm_images: int = 0
    checkpoint: str = "last"
    seed: int = 0
    train_log_likelihood: bool = False


@dataclass
class ShiftConfig:
    """What the network was not trained for.

    Args:
        num_samples: Monte Carlo draws for each set of images.
        rotation: degrees to turn the test images by.
        noise: standard deviations of Gaussian noise added to the test images, whose pixels are in [0, 1].
        blur: standard deviations of a Gaussian blur, in pixels.
        ood: what lies out of distribution: names of data sets, or noise for the test images under the strongest noise
            (default: fashion-mnist and digits100k for mnist, mnist for fashion-mnist and digits100k, noise for
            cifar10).
        temperature_on: fit a temperature on the first so many test images and measure it on the others (default: none).
        checkpoint: which saved step to use: last, or a name such as step-00006000.
        seed: of the draws.
    """

    num_samples: int = 100
    rotation: list[float] = field(default_factory=lambda: [15.0, 30.0, 45.0, 60.0, 75.0])
    noise: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5])
    blur: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0, 3.0])
    ood: list[str] | None = None
    temperature_on: int = 0
    checkpoint: str = "last"
    seed: int = 0

    def severities(self) -> dict[str, list[float]]:
        """{kind of shift: its severities}."""
        return {"rotation": self.rotation, "noise": self.noise, "blur": self.blur}

    def sets(self, name: str) -> list[str]:
        """What lies out of distribution for the data set `name`."""
        usual = {"mnist": ["fashion-mnist", "digits100k"], "cifar10": ["noise"]}
        return usual.get(name, ["mnist"]) if self.ood is None else self.ood


@dataclass
class PruningConfig:
    """The pruning study.

    Args:
        threshold: prune weights whose score (|loc| / scale unless criterion says otherwise) is below this; one number,
            a list, or a mapping from patterns of site names to a number each.
        fractions: prune these shares of the weights.
        scope: global ranks all weights together; layer prunes the same share of each layer.
        criterion: snr (|loc| / scale), kl (nats) or evidence (nats of log evidence that fixing it at zero costs).
        structure: weights, or whole units (dense units, filters) or inputs (pixels, units, channels).
        finetune_epochs: train what is left of each level for so many epochs before it is measured.
        finetune_lr: learning rate of that (default: train.lr).
        num_samples: Monte Carlo draws at each level.
        checkpoint: which saved step to prune: last, or a name such as step-00006000.
        seed: of the draws.
        save_fraction: write pruned.safetensors with this share of the weights pruned (default: no such file), and
            fine-tuned where finetune_epochs is set: it is then a level of its own.
    """

    threshold: float | list[float] | dict[str, float] = 10.0
    fractions: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
    scope: str = "global"
    criterion: str = "snr"
    structure: str = "weights"
    finetune_epochs: int = 0
    finetune_lr: float | None = None
    num_samples: int = 200
    checkpoint: str = "last"
    seed: int = 0
    save_fraction: float | None = None

    def thresholds(self) -> list[Threshold]:
        """The thresholds as a list."""
        return list(self.threshold) if isinstance(self.threshold, list) else [self.threshold]


@dataclass
class Config:
    """All settings of a run.

    Args:
        device: cpu, cuda or cuda:N; other devices that torch knows were not tried.
        threads: CPU threads torch uses (default: torch's own choice).
        channels_last: memory layout of images and convolutions; faster on most machines.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    device: str = "cpu"
    threads: int | None = None
    channels_last: bool = False
