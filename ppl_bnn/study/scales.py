"""How large the study is: the settings of its trainings and timings at each scale."""

from dataclasses import dataclass

from ppl_bnn.errors import UserError


@dataclass(frozen=True)
class Scale:
    """The size of the study. What the study itself did is the scale ``full``.

    Args:
        ranks: numbers of ranks to time and to train on.
        estimators: estimators to time, the study's own first.
        steps: timed steps of a point.
        batch, time_batch: batches of a rank in figures 2a, b and in 2c.
        digit_batches, digit_steps: batches of a rank and timed steps in figure 6.
        cycles: Horovod's cycle times to time, in milliseconds.
        fusion: Horovod's fusion buffer, in MB.
        large: settings of a whole training of VGG-16 and ResNet-18.
        large_batch, large_epochs: the batch of a rank and the epochs of such a training.
        test_images: test images of these networks.
        draws: draws of figure 4, as many as the last of its counts.
        few_draws: draws of the other timing beside it.
        class_draws: draws of figure 5.
        dense, convolutional: settings of BNN-FC and BNN-Conv on MNIST.
        seeds: trainings of BNN-FC.
        pruning_draws: draws of a pruning level.
        betas: weights of the KL beside 1.
    """

    name: str
    ranks: tuple[int, ...]
    estimators: tuple[str, ...]
    steps: int
    batch: int
    time_batch: int
    digit_batches: tuple[int, ...]
    digit_steps: int
    cycles: tuple[float, ...]
    fusion: float
    large: tuple[str, ...]
    large_batch: int
    large_epochs: int
    test_images: int
    draws: int
    few_draws: int
    class_draws: int
    dense: tuple[str, ...]
    convolutional: tuple[str, ...]
    seeds: int
    pruning_draws: int
    betas: tuple[float, ...]

    @property
    def convolutional_use(self) -> tuple[str, ...]:
        """Settings of the predictions of a BNN-Conv that is there: its number of test digits, if not all."""
        count = dict(zip(self.convolutional[::2], self.convolutional[1::2], strict=True)).get("--data.num_test")
        return () if count is None else ("--data.num_test", count)

    @property
    def test_digits(self) -> int:
        """The number of test digits that BNN-FC and BNN-Conv share."""
        return int(self.convolutional_use[1]) if self.convolutional_use else 10_000


_FULL = Scale(
    name="full", ranks=(1, 2, 4, 8, 16, 32, 64, 128), estimators=("flipout", "groups", "plain"), steps=50, batch=128,
    time_batch=256, digit_batches=(512, 1024), digit_steps=20, cycles=(1.0, 5.0, 10.0), fusion=64.0,
    large=("--channels_last", "true"), large_batch=256, large_epochs=64, test_images=1000, draws=1000, few_draws=10,
    class_draws=400,
    dense=(), convolutional=(), seeds=2, pruning_draws=200, betas=(0.1, 10.0),
)  # fmt: skip
_SMALL = Scale(
    name="small", ranks=(1, 2), estimators=("flipout", "groups", "plain"), steps=4, batch=128, time_batch=256,
    digit_batches=(512, 1024), digit_steps=2, cycles=(1.0, 5.0, 10.0), fusion=64.0,
    large=("--data.num_train", "20000", "--channels_last", "true"), large_batch=64, large_epochs=2,
    test_images=100, draws=1000, few_draws=10, class_draws=400,
    dense=(), convolutional=("--data.num_train", "6000", "--data.num_test", "100", "--train.epochs", "2"),
    seeds=2, pruning_draws=200, betas=(0.1, 10.0),
)  # fmt: skip
_TINY = Scale(
    name="tiny", ranks=(1,), estimators=("flipout",), steps=2, batch=2, time_batch=2, digit_batches=(2, 4),
    digit_steps=2, cycles=(1.0,), fusion=64.0, large=("--data.num_train", "64"),
    large_batch=8, large_epochs=1, test_images=20, draws=12, few_draws=4, class_draws=10,
    dense=("--data.num_train", "2000", "--data.num_test", "200", "--train.epochs", "1"),
    convolutional=("--data.num_train", "100", "--data.num_test", "20", "--train.epochs", "1"),
    seeds=1, pruning_draws=4, betas=(10.0,),
)  # fmt: skip
SCALES = {scale.name: scale for scale in (_TINY, _SMALL, _FULL)}


def scale_named(name: str) -> Scale:
    """The scale of this name. Raises UserError for one that does not exist."""
    if name not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}; got {name!r}")
    return SCALES[name]
