"""What draws add up to: the predictive, and its sums while it is drawn."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.native.normals import GENERATOR


@dataclass(frozen=True)
class Predictive:
    """S draws of the predictive of N examples.

    With a tolerance an example may have fewer: what it has no draw for is NaN in `probs` and `log_likelihood`.

    Attributes:
        probs: softmax of each draw's logits for the examples kept, float32 [S, K, C]; all examples unless `keep` said.
        kept: the examples' positions, int64 [K].
        log_likelihood: log p(label | draw) of every example, float32 [S, N].
        labels: int64 [N].
        mean_probs: the averaged predictive, float64 [N, C].
        mean_entropy: mean over draws of each draw's entropy, nats, float64 [N].
        accuracies: accuracy of each single draw, float32 [S], NaN where a draw is not of all examples. The network's
            accuracy is that of `mean_probs`.
        seconds: time spent on drawing weights and on forward passes.
        mean_squares: mean over the independent draws (pairs of antithetic ones) of squared probabilities, float64
            [N, C].
        draws: how many draws each example has, int64 [N].
        method: ``draws``: draw s is one network, the same for every example; ``layerwise``: examples are drawn
            independently of each other.
        sampling: ``independent``, ``antithetic``: draws 2k and 2k + 1 are mirror images, or ``sobol``.
        compact: whether the draws were computed in the compact network of a pruned posterior.
        likelihood: of y; it decomposes and scores the averages.
        generator: what made the draws' random numbers; a seed means other draws for another generator.
    """

    probs: Tensor
    kept: Tensor
    log_likelihood: Tensor
    labels: Tensor
    mean_probs: Tensor
    mean_entropy: Tensor
    accuracies: Tensor
    seconds: float
    mean_squares: Tensor
    draws: Tensor
    method: str = "draws"
    sampling: str = "independent"
    compact: bool = False
    likelihood: Likelihood = field(default_factory=Categorical, repr=False, compare=False)
    generator: str = GENERATOR

    @property
    def averages(self) -> dict[str, Tensor]:
        """Averages over draws by the names that the likelihood gives them, float64 [N, ...]."""
        return {"mean": self.mean_probs, "entropy": self.mean_entropy}

    @property
    def mc_error(self) -> Tensor:
        """Standard error of `mean_probs`, [N, C]: sqrt(variance / independent draws); NaN below two of them.

        NaN for Sobol points too: they depend on each other, and only other seeds tell their error.
        """
        if self.sampling == "sobol":
            return torch.full_like(self.mean_probs, math.nan)
        independent = (self.draws // (2 if self.sampling == "antithetic" else 1)).double().unsqueeze(1)
        variance = (self.mean_squares - self.mean_probs.square()).clamp_min(0)
        return (variance / (independent - 1)).sqrt().masked_fill(independent < 2, math.nan)

    def summary(self) -> dict[str, float]:
        """num_samples, seconds, accuracy, nll, ece and brier, all but the first two of the averaged predictive."""
        return {
            "num_samples": len(self.log_likelihood),
            "seconds": self.seconds,
            **self.likelihood.scores(self.averages, self.log_likelihood, self.labels),
        }

    def uncertainties(self) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, nats, each [N]."""
        return self.likelihood.decompose(self.averages)


def check_so_far(
    so_far: Predictive, num_samples: int, labels: Tensor, kept: Tensor, method: str, sampling: str, compact: bool
) -> None:
    """Raise UserError for an earlier result that cannot be added to: it was made otherwise, or of other examples."""
    if len(so_far.log_likelihood) > num_samples:
        raise UserError(f"num_samples is {num_samples}, and so_far has {len(so_far.log_likelihood)} draws already")
    if so_far.generator != GENERATOR:
        raise UserError(
            f"so_far was drawn by the generator {so_far.generator}, and this version draws by {GENERATOR}; the draws "
            "would not fit together: leave out so_far"
        )
    own = {"method": method, "sampling": sampling, "compact": compact}
    for name, here in own.items():
        if getattr(so_far, name) != here:
            raise UserError(f"so_far has {name} {getattr(so_far, name)!r}, and this call {here!r}: leave out so_far")
    if not torch.equal(so_far.labels, labels.cpu()) or not torch.equal(so_far.kept, kept):
        raise UserError("so_far has other labels, or keeps other examples: leave out so_far")


class Tally:
    """The sums of a predictive while it is drawn, the same on every rank.

    Sums are of multiples of 2^-36 in float64, so they are exact while they stay below 2^17: the result is the same to
    the last bit however the draws were divided among ranks or sessions.

    Args:
        like: outputs [n, *] of a few examples, n >= 1, which tell the statistics' shapes.

    Attributes:
        done: draws so far.
        active: positions of the examples that get further draws.
        seconds: time spent on draws.
    """

    def __init__(
        self, num_samples: int, kept: Tensor, labels: Tensor, like: Tensor, likelihood: Likelihood, *, sampling: str,
        method: str, compact: bool = False,
    ) -> None:  # fmt: skip
        self.num_samples, self.kept, self.labels = num_samples, kept, labels.cpu()
        self.likelihood, self.sampling, self.method, self.compact = likelihood, sampling, method, compact
        self.done, self.seconds = 0, 0.0
        count = len(labels)
        self.active = torch.arange(count, device="cpu")
        self.draws = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.log_likelihood = torch.full((num_samples, count), math.nan, dtype=torch.float32)
        self.scores = torch.full((num_samples,), math.nan, dtype=torch.float32)
        shapes = likelihood.statistics(like[:1].float().unsqueeze(0), self.labels[:1])
        by_name = {"mean": shapes.mean, **shapes.others}
        self.sums = {name: torch.zeros(count, *value.shape[2:], dtype=torch.float64) for name, value in by_name.items()}
        self.squares = torch.zeros_like(self.sums["mean"])
        self.means = torch.full((num_samples, len(kept), *shapes.mean.shape[2:]), math.nan, dtype=torch.float32)
        self._find_kept()

    def add(self, outputs: Tensor) -> None:
        """Add the next draws [S, active, *].

        Raises:
            UserError: outputs that make the predictive NaN.
        """
        found = self.likelihood.statistics(outputs, self.labels[self.active])
        draws = len(found.mean)
        if found.mean.isnan().any():
            bad = int(found.mean.isnan().flatten(1).any(1).nonzero()[0])
            raise UserError(f"draw {self.done + bad} gives NaN: its weights or outputs overflow or are NaN")
        rows = slice(self.done, self.done + draws)
        self.log_likelihood[rows, self.active] = found.log_likelihood
        if len(self.active) == len(self.labels):
            self.scores[rows] = found.score
        self.means[rows, self._at] = found.mean[:, self._of]
        for name, values in {"mean": found.mean, **found.others}.items():
            self.sums[name][self.active] += _exact(values).sum(0)
        means = found.mean.double()
        if self.sampling == "antithetic":
            means = means.unflatten(0, (-1, 2)).mean(1)
        self.squares[self.active] += _exact(means.square()).sum(0)
        self.draws[self.active] += draws
        self.done += draws

    def leave_out(self, known: Tensor) -> None:
        """No further draws of the examples that `known` [N] says."""
        self.active = self.active[~known[self.active]]
        self._find_kept()

    def averages(self) -> dict[str, Tensor]:
        """Averages over the draws so far, by name, float64 [N, ...]."""
        return {name: values / _beside(self.draws.double(), values) for name, values in self.sums.items()}

    def result(self) -> Predictive:
        """The predictive of the draws so far, of class labels."""
        averages = self.averages()
        return Predictive(
            probs=self.means[: self.done],
            kept=self.kept,
            log_likelihood=self.log_likelihood[: self.done],
            labels=self.labels,
            mean_probs=averages["mean"],
            mean_entropy=averages["entropy"],
            accuracies=self.scores[: self.done],
            seconds=self.seconds,
            mean_squares=self.squares / _beside(self._independent(self.draws), self.squares),
            draws=self.draws,
            method=self.method,
            sampling=self.sampling,
            compact=self.compact,
            likelihood=self.likelihood,
        )

    def go_on_from(self, before: Predictive | None, ranks: Communicator) -> None:
        """Begin with the draws of an earlier result: rank 0's, on every rank."""
        self.done = int(ranks.share([0 if before is None else len(before.log_likelihood)])[0])
        if not self.done:
            return
        if before is not None and ranks.is_main:
            self.means[: self.done] = before.probs
            self.log_likelihood[: self.done], self.scores[: self.done] = before.log_likelihood, before.accuracies
            self.draws, self.seconds = before.draws.clone(), before.seconds
            for name, average in before.averages.items():
                self.sums[name] = _exact(average * _beside(self.draws.double(), average))
            self.squares = _exact(before.mean_squares * _beside(self._independent(self.draws), self.squares))
        ranks.broadcast([self.log_likelihood, self.scores, *self.sums.values(), self.squares, self.draws])
        self.leave_out(self.draws < self.done)

    def _independent(self, draws: Tensor) -> Tensor:
        count = draws.double()
        return count // 2 if self.sampling == "antithetic" else count

    def _find_kept(self) -> None:
        # Where the kept examples are in `means`, and where among the active ones.
        where = torch.full((len(self.labels),), -1)
        where[self.active] = torch.arange(len(self.active))
        self._at = (where[self.kept] >= 0).nonzero().flatten()
        self._of = where[self.kept][self._at]


def _exact(values: Tensor) -> Tensor:
    return (values.double() * 2**36).round() / 2**36


def _beside(count: Tensor, values: Tensor) -> Tensor:
    # [N] as a factor of [N, ...].
    return count.view(-1, *[1] * (values.dim() - 1))
