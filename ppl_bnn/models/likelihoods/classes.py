"""Likelihoods of class labels."""

from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.labels import class_labels
from ppl_bnn.models.likelihoods.base import Averages, DrawStatistics, Likelihood, Summary


class Categorical(Likelihood):
    """y is one of C classes, with probabilities softmax(outputs [N, C]); labels are 0 .. C - 1."""

    drawn: ClassVar[bool] = False
    answers: ClassVar[tuple[str, str]] = ("probs", "entropy")
    units: ClassVar[str] = "nats"

    def distribution(self, outputs: Tensor) -> dist.Categorical:  # type: ignore[override]
        """p(label | logits [..., N, C])."""
        return dist.Categorical(logits=outputs)

    def check(self, outputs: Tensor) -> None:  # type: ignore[override]
        """Raise UserError unless outputs are [N, C] with at least 2 classes: a softmax of one column is always 1."""
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise UserError(
                "a Categorical likelihood needs at least 2 outputs, one for each class, [N, C]; the network gives "
                f"{list(outputs.shape)}. A regression network needs a Model with the likelihood Normal, one logit Bernoulli"
            )

    def observed(self, y: object, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Class labels [N] as int64. Integers of any width and booleans are converted, of numpy and lists too."""
        if isinstance(y, list | tuple):
            y = np.asarray(y)
        return class_labels(y, outputs.shape[-1])

    def mean(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Class probabilities [..., N, C]."""
        return outputs.softmax(-1)

    def parts(self, outputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Probabilities [..., N, C] and their entropy [..., N] in nats."""
        probs = self.mean(outputs)
        return {"mean": probs, "entropy": metrics.entropy(probs)}

    def statistics(self, outputs: Tensor, y: Tensor | None = None) -> DrawStatistics:  # type: ignore[override]
        """Probabilities [S, N, C], their entropy [S, N] in nats, and accuracy as the score."""
        log_probs = F.log_softmax(outputs, -1).cpu()
        probs = log_probs.exp()
        others = {"entropy": metrics.entropy(probs)}
        if y is None:
            return DrawStatistics(probs, others=others)
        return DrawStatistics(
            mean=probs,
            log_likelihood=log_probs.gather(2, y.expand(len(probs), -1).unsqueeze(2))[..., 0],
            score=(log_probs.argmax(-1) == y).float().mean(1),
            others=others,
        )

    def decompose(self, averages: Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy of the mean, mean entropy and mutual information, nats (`ppl_bnn.metrics.uncertainties`)."""
        return metrics.uncertainties(averages["mean"], averages["entropy"])

    def std(self, averages: Averages) -> Tensor:
        """Standard deviation over the draws of each class's probability, [N, C]: a label has none."""
        return averages["spread"].sqrt()

    def answer(self, averages: Averages) -> tuple[Tensor, Tensor]:
        """Probabilities [N, C] and the draws' mean entropy [N], nats."""
        return averages["mean"], averages["entropy"]

    def scores(self, found: Summary) -> dict[str, float]:
        """accuracy, nll, ece and brier of the averaged predictive."""
        probs = found.averages["mean"]
        return {
            "accuracy": metrics.accuracy(probs, found.y),
            "nll": found.nll,
            "ece": metrics.ece(probs, found.y),
            "brier": metrics.brier(probs, found.y),
        }
