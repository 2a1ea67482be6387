"""What draws add up to: the predictive."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Categorical, Likelihood, Summary
from ppl_bnn.native.normals import GENERATOR
from ppl_bnn.prediction.sketch import QuantileSketch


@dataclass(frozen=True)
class Predictive:
    """S draws of the predictive of N examples.

    With a tolerance an example may have fewer: what it has no draw for is NaN in `means`, `samples` and
    `log_likelihood`.

    Attributes:
        means: E[y | draw] for the examples kept, [S, K, ...]: class probabilities [S, K, C], means of numbers. All
            examples are kept unless `keep` was given, or data that are not in memory would take too much.
        kept: the examples' positions, int64 [K].
        y: observed values [N, ...] (class labels are int64), or None.
        log_likelihood: log p(y_i | draw) of every example, float32 [S, N]; None without y, or if it was not kept.
        sums: sums over draws by name, float64 [N, ...]; `averages` are made of them.
        squares: sum over the independent draws (pairs of antithetic ones) of (mean - reference)^2, float64 [N, ...].
        reference: E[y | draw 0], float64 [N, ...].
        draws: number of draws of each example, int64 [N]; 0 for the method moments.
        draw_scores: the score of each single draw, float32 [S] (accuracy, minus squared error), NaN where a draw is
            not of all examples; None without y.
        seconds: time spent on drawing weights and on forward passes.
        samples: a draw of y from each draw of the network, for the examples kept, [S, K, ...]; None where the means
            tell everything about y, as class probabilities do.
        sketch: of the draws of y of every example, where not all examples were kept; None of large data too.
        log_sum: log sum_s p(y_i | draw s), float64 [N], where `log_likelihood` was not kept.
        method: ``draws``: draw s is one network, the same for every example; ``layerwise``: examples are drawn
            independently of each other; ``moments``: no draws.
        sampling: ``independent``, ``antithetic``: draws 2k and 2k + 1 are mirror images, or ``sobol``.
        compact: whether the draws were computed in the compact network of a pruned posterior.
        seed: of the draws.
        likelihood: of y; it decomposes and scores the averages.
        weights: what the log likelihoods were multiplied by, float64 [N]; None for 1.
        generator: what made the draws' random numbers; a seed means other draws for another generator.
    """

    means: Tensor
    kept: Tensor
    y: Tensor | None
    log_likelihood: Tensor | None
    sums: dict[str, Tensor]
    squares: Tensor
    reference: Tensor
    draws: Tensor
    draw_scores: Tensor | None
    seconds: float
    samples: Tensor | None = None
    sketch: QuantileSketch | None = None
    log_sum: Tensor | None = None
    method: str = "draws"
    sampling: str = "independent"
    compact: bool = False
    seed: int = 0
    likelihood: Likelihood = field(default_factory=Categorical, repr=False, compare=False)
    generator: str = GENERATOR
    weights: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """S, the number of draws; 1 row for the method moments."""
        return len(self.means)

    @property
    def averages(self) -> dict[str, Tensor]:
        """Averages over draws by the names that the likelihood gives them, float64 [N, ...].

        ``mean`` is E[y], ``spread`` the variance of E[y | draw] over draws.
        """
        # The method moments has its averages as sums, and no draws.
        count = self.draws.clamp_min(1).double()
        found = {name: total / beside(count, total) for name, total in self.sums.items()}
        found["spread"] = (found["spread"] - (found["mean"] - self.reference).square()).clamp_min(0)
        return found

    @property
    def mean(self) -> Tensor:
        """E[y], float64 [N, ...]: for classes the averaged probabilities [N, C]."""
        return self.sums["mean"] / beside(self.draws.clamp_min(1).double(), self.sums["mean"])

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, float64 [N, ...]; for classes that of each probability over the draws."""
        return self.likelihood.std(self.averages)

    @property
    def mc_error(self) -> Tensor:
        """Standard error of `mean`, [N, ...]: sqrt(variance / independent draws); NaN below two of them.

        NaN for Sobol points too: they depend on each other, and only other seeds tell their error.
        """
        if self.sampling == "sobol":
            return torch.full_like(self.squares, math.nan)
        independent = beside((self.draws // (2 if self.sampling == "antithetic" else 1)).double(), self.squares)
        variance = (self.squares / independent - (self.mean - self.reference).square()).clamp_min(0)
        return (variance / (independent - 1)).sqrt().masked_fill(independent < 2, math.nan)

    def quantiles(self, levels: Sequence[float] | Tensor, *, of: str | None = None) -> Tensor:
        """Quantiles of y, or of E[y | draw], at levels in (0, 1), [Q, N, ...].

        They are read off the kept draws, where all draws of all examples are kept. Otherwise those of y come from a
        sketch (`QuantileSketch.rank_error`), if there is one. All others are NaN for the examples that were not kept.

        Args:
            of: ``y``: future observations, noise included (the default for numbers); ``mean``: E[y | draw], the
                uncertainty about the function (the only one for classes, where it is of the probabilities).

        Raises:
            UserError: levels outside (0, 1), quantiles of class labels, or a predictive without draws.
        """
        levels = checked_levels(levels)
        kind = of or ("y" if self.likelihood.drawn else "mean")
        if kind not in ("y", "mean"):
            raise UserError(f"quantiles are of 'y' or of the 'mean', got of={of!r}")
        if self.method == "moments":
            raise UserError("the method moments has no draws to take quantiles of; use the method draws")
        if kind == "y" and self.samples is None:
            name = type(self.likelihood).__name__
            raise UserError(f"a {name} likelihood has no quantiles of y; take those of the probabilities: of='mean'")
        if kind == "y" and self.sketch is not None:
            return self.sketch.quantiles(levels)
        drawn = self.samples if kind == "y" else self.means
        assert drawn is not None
        found = torch.full((len(levels), len(self.draws), *drawn.shape[2:]), math.nan, dtype=drawn.dtype)
        found[:, self.kept] = _quantiles(drawn, levels)
        return found

    def interval(self, level: float, *, of: str | None = None) -> tuple[Tensor, Tensor]:
        """The equal-tailed interval that holds a share `level` of the draws, two of [N, ...]. See `quantiles`."""
        if not 0 < level < 1:
            raise UserError(f"level must be above 0 and below 1, got {level}")
        lower, upper = self.quantiles([0.5 - level / 2, 0.5 + level / 2], of=of)
        return lower, upper

    def summary(self) -> dict[str, float]:
        """num_samples, seconds, and (with y) the likelihood's scores of the averaged predictive."""
        how = {"num_samples": self.num_samples, "seconds": self.seconds}
        return how if self.y is None else {**how, **self.scores()}

    def scores(self) -> dict[str, float]:
        """The likelihood's scores of the averaged predictive; computed once.

        Raises:
            UserError: a predictive without observed y.
        """
        return dict(self._scores)

    @cached_property
    def _scores(self) -> dict[str, float]:
        if self.y is None:
            raise UserError("scores need the observed y: predict(model, posterior, x, y)")
        found = Summary(
            averages=self.averages,
            y=self.y,
            nll=self.nll,
            quantiles=self._quantiles_for_scores,
            samples=self.samples,
            kept=self.kept,
            pit=self.pit,
        )
        return self.likelihood.scores(found)

    def _quantiles_for_scores(self, levels: Tensor) -> Tensor:
        """Quantiles of y of all examples, or, where neither draws nor a sketch tell them, of those that were kept."""
        if self.samples is not None and self.sketch is None and len(self.kept) < len(self.draws):
            return _quantiles(self.samples, checked_levels(levels))
        return self.quantiles(levels)

    @property
    def pit(self) -> tuple[Tensor, Tensor] | None:
        """Between which the probability integral transform of y is uniform under a perfect predictive, [N, ...] each.

        `number_metrics.pit_limits` of the draws of y; None where y was not drawn, or not observed.
        """
        if "below" not in self.sums:
            return None
        below, up_to = self.sums["below"], self.sums["up_to"]
        count = beside(self.draws.double(), below)
        return below / (count + 1), (up_to + 1) / (count + 1)

    @property
    def nll(self) -> float:
        """Negative log likelihood of the averaged predictive, nats per datum."""
        if self.log_likelihood is not None:
            return metrics.nll(self.log_likelihood)
        if self.log_sum is None:
            raise UserError("the log likelihood needs the observed y: predict(model, posterior, x, y)")
        return float((self.draws.double().log() - self.log_sum).mean())

    def uncertainties(self) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, each [N, ...]: nats for classes, variances for numbers."""
        return self.likelihood.decompose(self.averages)

    # What a predictive of classes calls its parts.

    @property
    def probs(self) -> Tensor:
        """Class probabilities of each draw, [S, K, C]: `means`."""
        return self.means

    @property
    def labels(self) -> Tensor:
        """Class labels [N]: `y`. Raises UserError without them."""
        if self.y is None:
            raise UserError("the predictive has no labels: predict(model, posterior, x, y)")
        return self.y

    @property
    def mean_probs(self) -> Tensor:
        """The averaged class probabilities, float64 [N, C]: `mean`."""
        return self.mean

    @property
    def mean_entropy(self) -> Tensor:
        """Mean over draws of each draw's entropy, nats, float64 [N]."""
        return self.averages["entropy"]

    @property
    def accuracies(self) -> Tensor:
        """Accuracy of each single draw, float32 [S]: `draw_scores`. The network's accuracy is that of `mean`."""
        if self.draw_scores is None:
            raise UserError("accuracies need the labels: predict(model, posterior, x, y)")
        return self.draw_scores


def _quantiles(drawn: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [Q, K, ...] over draws [S, K, ...]."""
    found = torch.empty((len(levels), *drawn.shape[1:]), dtype=drawn.dtype)
    # In parts: the quantiles sort a copy of the draws, and torch takes at most 2^24 numbers.
    size = max(1, 10_000_000 // max(1, drawn[:, :1].numel()))
    for at in range(0, drawn.shape[1], size):
        found[:, at : at + size] = drawn[:, at : at + size].nanquantile(levels.to(drawn.dtype), 0)
    return found


def checked_levels(levels: Sequence[float] | Tensor) -> Tensor:
    """Quantile levels as float64 [Q]. Raises UserError for a level outside (0, 1)."""
    found = torch.as_tensor(levels, dtype=torch.float64, device="cpu").reshape(-1)
    if not len(found) or not bool(((found > 0) & (found < 1)).all()):
        raise UserError(f"quantile levels must be above 0 and below 1, got {torch.as_tensor(levels).tolist()}")
    return found


def beside(count: Tensor, values: Tensor) -> Tensor:
    """Counts [N] as a factor of values [N, ...]."""
    return count.view(-1, *[1] * (values.dim() - 1))
