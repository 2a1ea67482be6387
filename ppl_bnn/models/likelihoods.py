"""The Likelihood protocol, p(y | network outputs), and Categorical, its first implementation.

A likelihood says how outputs become a distribution of y, and how draws of the predictive are summarized. Prediction
keeps running sums of `DrawStatistics` and knows nothing else of y. tests/models/likelihood_conformance.py runs any
implementation through this contract.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.labels import class_labels

Averages = Mapping[str, Tensor]


@dataclass(frozen=True)
class DrawStatistics:
    """What S draws say about N examples, on the CPU.

    Attributes:
        mean: E[y | draw], [S, N, ...]: class probabilities, means. Kept for each draw; its Monte Carlo error is
            tracked.
        log_likelihood: log p(y_i | x_i, draw s), [S, N], nats.
        score: each draw's own score over the N examples, [S], larger is better: accuracy, minus squared error.
        others: further numbers [S, N, ...] whose average over draws the predictive needs.
    """

    mean: Tensor
    log_likelihood: Tensor
    score: Tensor
    others: Averages = field(default_factory=dict)


class Likelihood(Protocol):
    """p(y | outputs) of one example; examples are independent given the network.

    ``averages`` are averages over draws, float64 [N, ...]: ``mean`` and the names of `DrawStatistics.others`.
    """

    def distribution(self, outputs: Tensor) -> TorchDistribution:
        """p(y | outputs [..., N, *]), with batch shape [..., N]."""
        ...

    def check(self, outputs: Tensor) -> None:
        """Raise UserError for outputs [N, *] that are no parameters of this distribution."""
        ...

    def observed(self, y: object, outputs: Tensor) -> Tensor:
        """The observed values as a tensor [N, ...], converted where that is unambiguous.

        Args:
            outputs: of a few examples [n, *]; n may differ from N.

        Raises:
            UserError: values that this distribution cannot give.
        """
        ...

    def mean(self, outputs: Tensor) -> Tensor:
        """E[y | outputs [..., N, *]], [..., N, ...]. A function of torch operations alone: it is exported."""
        ...

    def statistics(self, outputs: Tensor, y: Tensor) -> DrawStatistics:
        """What S draws' outputs [S, N, *] say about the observed y [N, ...]."""
        ...

    def decompose(self, averages: Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Total, aleatoric and epistemic uncertainty, each [N, ...]; total = aleatoric + epistemic up to rounding."""
        ...

    def scores(self, averages: Averages, log_likelihood: Tensor, y: Tensor) -> dict[str, float]:
        """Scores of the averaged predictive, ``nll`` (nats per datum) among them; log_likelihood [S, N]."""
        ...

    def sample(self, outputs: Tensor, *, seed: int) -> Tensor:
        """One y of each draw and example, [..., N, ...], the same for the same seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.distribution(outputs.cpu()).sample()


class Categorical(Likelihood):
    """y is one of C classes, with probabilities softmax(outputs [N, C]); labels are 0 .. C - 1."""

    def distribution(self, outputs: Tensor) -> dist.Categorical:
        """p(label | logits [..., N, C])."""
        return dist.Categorical(logits=outputs)

    def check(self, outputs: Tensor) -> None:
        """Raise UserError unless outputs are [N, C] with at least 2 classes: a softmax of one column is always 1."""
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise UserError(
                "a Categorical likelihood needs at least 2 outputs, one for each class, [N, C]; the network gives "
                f"{list(outputs.shape)}. For one logit z let it return two, (0, z); a regression network has no "
                "class labels to predict"
            )

    def observed(self, y: object, outputs: Tensor) -> Tensor:
        """Class labels [N] as int64. Integers of any width and booleans are converted, of numpy and lists too."""
        if isinstance(y, list | tuple):
            y = np.asarray(y)
        return class_labels(y, outputs.shape[-1])

    def mean(self, outputs: Tensor) -> Tensor:
        """Class probabilities [..., N, C]."""
        return outputs.softmax(-1)

    def statistics(self, outputs: Tensor, y: Tensor) -> DrawStatistics:
        """Probabilities [S, N, C], their entropy [S, N] in nats, and accuracy as the score."""
        log_probs = F.log_softmax(outputs, -1).cpu()
        probs = log_probs.exp()
        return DrawStatistics(
            mean=probs,
            log_likelihood=log_probs.gather(2, y.expand(len(probs), -1).unsqueeze(2))[..., 0],
            score=(log_probs.argmax(-1) == y).float().mean(1),
            others={"entropy": metrics.entropy(probs)},
        )

    def decompose(self, averages: Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy of the mean, mean entropy and mutual information, nats (`ppl_bnn.metrics.uncertainties`)."""
        return metrics.uncertainties(averages["mean"], averages["entropy"])

    def scores(self, averages: Averages, log_likelihood: Tensor, y: Tensor) -> dict[str, float]:
        """accuracy, nll, ece and brier of the averaged predictive."""
        probs = averages["mean"]
        return {
            "accuracy": metrics.accuracy(probs, y),
            "nll": metrics.nll(log_likelihood),
            "ece": metrics.ece(probs, y),
            "brier": metrics.brier(probs, y),
        }
