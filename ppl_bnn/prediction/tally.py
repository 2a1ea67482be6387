"""What draws add up to: the predictive, and its sums while it is drawn."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
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
    generator: str = GENERATOR

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
            "accuracy": metrics.accuracy(self.mean_probs, self.labels),
            "nll": metrics.nll(self.log_likelihood),
            "ece": metrics.ece(self.mean_probs, self.labels),
            "brier": metrics.brier(self.mean_probs, self.labels),
        }

    def uncertainties(self) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, nats, each [N]."""
        return metrics.uncertainties(self.mean_probs, self.mean_entropy)


class Tally:
    """The sums of a predictive while it is drawn, the same on every rank.

    Sums are of multiples of 2^-36 in float64, so they are exact: the result is the same to the last bit however the
    draws were divided among ranks or sessions.

    Attributes:
        done: draws so far.
        active: positions of the examples that get further draws.
        seconds: time spent on draws.
    """

    def __init__(self, num_samples: int, kept: Tensor, labels: Tensor, sampling: str, method: str) -> None:
        self.num_samples, self.kept, self.labels = num_samples, kept, labels.cpu()
        self.sampling, self.method = sampling, method
        self.done, self.seconds = 0, 0.0
        count = len(labels)
        self.active = torch.arange(count)
        self.draws = torch.zeros(count, dtype=torch.int64)
        self.log_likelihood = torch.full((num_samples, count), math.nan)
        self.accuracies = torch.full((num_samples,), math.nan)
        self.entropy = torch.zeros(count, dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Add the next draws [S, active, C].

        Raises:
            UserError: labels that do not fit.
        """
        if not self.done:
            self._begin(logits.shape[2])
        log_probs = F.log_softmax(logits, -1).cpu()
        probs = log_probs.exp()
        rows = slice(self.done, self.done + len(probs))
        labels = self.labels[self.active]
        self.log_likelihood[rows, self.active] = log_probs.gather(2, labels.expand(len(probs), -1).unsqueeze(2))[..., 0]
        if len(self.active) == len(self.labels):
            self.accuracies[rows] = (log_probs.argmax(-1) == labels).float().mean(1)
        self.probs[rows, self._at] = probs[:, self._of]
        self.sums[self.active] += _exact(probs).sum(0)
        self.entropy[self.active] += _exact(metrics.entropy(probs)).sum(0)
        means = probs.double()
        if self.sampling == "antithetic":
            means = means.unflatten(0, (-1, 2)).mean(1)
        self.squares[self.active] += _exact(means.square()).sum(0)
        self.draws[self.active] += len(probs)
        self.done += len(probs)

    def leave_out(self, known: Tensor) -> None:
        """No further draws of the examples that `known` [N] says."""
        self.active = self.active[~known[self.active]]
        self._find_kept()

    def result(self) -> Predictive:
        """The predictive of the draws so far."""
        count = self.draws.double()
        independent = count // 2 if self.sampling == "antithetic" else count
        return Predictive(
            self.probs[: self.done], self.kept, self.log_likelihood[: self.done], self.labels,
            self.sums / count.unsqueeze(1), self.entropy / count, self.accuracies[: self.done], self.seconds,
            self.squares / independent.unsqueeze(1), self.draws, self.method, self.sampling,
        )  # fmt: skip

    def go_on_from(self, before: Predictive | None, ranks: Communicator) -> None:
        """Begin with the draws of an earlier result: rank 0's, on every rank."""
        size = [0, 0] if before is None else [len(before.log_likelihood), before.mean_probs.shape[1]]
        self.done, classes = ranks.share(size)
        if not self.done:
            return
        self._begin(classes)
        if before is not None and ranks.is_main:
            self.probs[: self.done] = before.probs
            self.log_likelihood[: self.done], self.accuracies[: self.done] = before.log_likelihood, before.accuracies
            count = before.draws.double()
            independent = count // 2 if self.sampling == "antithetic" else count
            self.sums = _exact(before.mean_probs * count.unsqueeze(1))
            self.entropy = _exact(before.mean_entropy * count)
            self.squares = _exact(before.mean_squares * independent.unsqueeze(1))
            self.draws, self.seconds = before.draws.clone(), before.seconds
        ranks.broadcast([self.log_likelihood, self.accuracies, self.sums, self.entropy, self.squares, self.draws])
        self.leave_out(self.draws < self.done)

    def _begin(self, classes: int) -> None:
        check_labels(self.labels, classes)
        self.probs = torch.full((self.num_samples, len(self.kept), classes), math.nan)
        self.sums = torch.zeros(len(self.labels), classes, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sums)
        self._find_kept()

    def _find_kept(self) -> None:
        # Where the kept examples are in `probs`, and where among the active ones.
        where = torch.full((len(self.labels),), -1)
        where[self.active] = torch.arange(len(self.active))
        self._at = (where[self.kept] >= 0).nonzero().flatten()
        self._of = where[self.kept][self._at]


def _exact(values: Tensor) -> Tensor:
    return (values.double() * 2**36).round() / 2**36


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise UserError for labels outside 0 .. classes - 1."""
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
