"""The settings of the shift stage."""

from dataclasses import dataclass

from ppl_bnn.settings import Count, Finite, Fraction, Natural, Positive, documented, setting

CHECKPOINT = "saved step to use: last, best (by train.validation), or a name such as step-00006000"


@documented
@dataclass
class ShiftConfig:
    """Shifted and out-of-distribution data. The shifts that fit the data are used."""

    num_samples: Count = setting(100, help="number of weight draws for each set of examples")
    rotation: list[Finite] = setting(
        factory=lambda: [15.0, 30.0, 45.0, 60.0, 75.0], help="images: degrees to turn the test images by"
    )
    noise: list[Positive] = setting(
        factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5],
        help="images: standard deviations of Gaussian noise added to the test images, whose pixels are in [0, 1]",
    )
    blur: list[Positive] = setting(
        factory=lambda: [0.5, 1.0, 1.5, 2.0, 3.0], help="images: standard deviations of a Gaussian blur, in pixels"
    )
    feature_noise: list[Positive] = setting(
        factory=lambda: [0.25, 0.5, 1.0, 2.0],
        help="numbers that are no images: standard deviations of Gaussian noise, in training standard deviations of "
        "each column (one-hot columns stay)",
    )
    missing: list[Fraction] = setting(
        factory=lambda: [0.1, 0.25, 0.5, 0.75], help="rows: share of the columns set to their training mean"
    )
    covariate: list[Finite] = setting(
        factory=lambda: [0.5, 1.0, 1.5, 2.0],
        help="rows: the test rows are drawn again with weights exp(severity * column), the column in training standard "
        "deviations; a negative severity prefers small values",
    )
    column: str | None = setting(
        None, help="rows: column of the covariate shift (default: the one that has most in common with the target)"
    )
    dropped: list[Fraction] = setting(
        factory=lambda: [0.1, 0.25, 0.5, 0.75], help="sequences: share of the time steps set to 0"
    )
    truncated: list[Fraction] = setting(
        factory=lambda: [0.1, 0.25, 0.5, 0.75], help="sequences: share of the time steps, the last, set to 0"
    )
    replaced: list[Fraction] = setting(
        factory=lambda: [0.1, 0.25, 0.5, 0.75], help="tokens: share replaced by tokens of the training sequences"
    )
    own: dict[str, list[float]] = setting(
        factory=dict, help="shifts of your own: a mapping from import paths, my_package.shifts:fog, to severities; the "
        "function takes (inputs [N, ...], severity) and returns inputs of the same shape",
    )  # fmt: skip
    ood: list[str] | None = setting(
        None, help="out-of-distribution data: names of data sets, any source with its file (csv:other.csv, looked for "
        "as data.file is) or import path, noise (the test examples under the strongest noise), or shuffled (each "
        "column of a row from another training row; the steps of a sequence in another order; tokens at random) "
        "(default: fashion-mnist and digits100k for mnist, mnist for fashion-mnist and digits100k, noise for other "
        "images, shuffled for others where it fits)",
    )  # fmt: skip
    temperature_on: Natural = setting(
        0, help="classes: fit a temperature on the first test examples, this number of them, and evaluate it on the "
        "others (default: none)",
    )  # fmt: skip
    checkpoint: str = setting("last", help=CHECKPOINT)
    seed: Natural = setting(0, help="seed of the draws")

    def severities(self) -> dict[str, list[float]]:
        """{kind of shift: its severities}, those of the user's own last."""
        return {**{name: getattr(self, name) for name in SHIFT_KINDS}, **self.own}


# The shifts whose severities are settings.
SHIFT_KINDS = (
    "rotation", "noise", "blur", "feature_noise", "missing", "covariate", "dropped", "truncated", "replaced",
)  # fmt: skip
