"""Likelihoods of labels: Categorical and Bernoulli."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_bnn import metrics
from ppl_bnn.errors import UserError
from ppl_bnn.models.labels import class_labels
from ppl_bnn.models.likelihoods.base import Averages, DrawStatistics, Likelihood, Summary, numbers
from ppl_bnn.models.likelihoods.cross_entropy import Labels
from ppl_bnn.models.likelihoods.numbers import independent, one_number

# Outputs of one label an example have at most so many dimensions: [S, N, C], of several draws.
_ONE_LABEL = 3


class Categorical(Likelihood):
    """y is one of C classes, with probabilities softmax(outputs [N, C]); labels are 0 .. C - 1.

    An example may have many labels (pixels, tokens), and its log likelihood is their sum. Then ``mean`` is
    probabilities [N, ..., C], the class last, and uncertainties are [N, ...], of each label. Scores other than the nll
    are averages over all labels that count, each counting once.

    Args:
        class_dim: which dimension of the outputs [N, ...] is the class: 1 for [N, C, H, W], -1 for [N, T, C]. None: the
            outputs are [N, C], or images and volumes [N, C, H, W, ...], as ``torch.nn.CrossEntropyLoss`` has them.
        ignore_index: labels with this number (-100, say) do not count: they add nothing to the log likelihood or to any
            score.
        class_weights: [C], at least 0: the log probability of a label is multiplied by the weight of its class, in
            `fit` and in the log likelihood and nll of `predict`.
        soft_labels: y is probabilities [N, ..., C] that add up to 1. The log likelihood is sum_c y_c log p_c; accuracy
            and ece take the most probable label.

    Raises:
        UserError: options that are out of range or do not go together.
    """

    drawn: ClassVar[bool] = False
    answers: ClassVar[tuple[str, str]] = ("probs", "entropy")
    units: ClassVar[str] = "nats"
    class_weights: Tensor | None

    def __init__(
        self, *, class_dim: int | None = None, ignore_index: int | None = None,
        class_weights: Tensor | Sequence[float] | None = None, soft_labels: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if class_dim == 0:
            raise UserError("class_dim must not be 0, which is the examples' dimension: 1 for [N, C, H, W], say")
        if soft_labels and ignore_index is not None:
            raise UserError("soft labels have no number to ignore: leave out ignore_index, or soft_labels")
        self.class_dim, self.ignore_index, self.soft_labels = class_dim, ignore_index, soft_labels
        self.plain = class_dim is None and ignore_index is None and class_weights is None and not soft_labels
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None and not (
            weights.dim() == 1 and bool((weights >= 0).all() & weights.isfinite().all()) and bool((weights > 0).any())
        ):
            raise UserError(
                f"class_weights must be one number for each class, at least 0 and finite, got {weights.tolist()}"
            )
        self.register_buffer("class_weights", weights, persistent=False)

    def distribution(self, outputs: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(label | logits [..., N, C]), or p(labels | logits [N, *])."""
        if self._has_one_label(outputs):
            return dist.Categorical(logits=outputs)
        weights = None if self.class_weights is None else self.class_weights.to(outputs)
        return Labels(self._class_last(outputs), weight=weights, ignore_index=self.ignore_index, soft=self.soft_labels)

    def check(self, outputs: Tensor) -> None:  # type: ignore[override]
        """Raise UserError unless outputs are [N, C] with at least 2 classes: a softmax of one column is always 1.

        With `class_dim` they have C classes in that dimension, as many as there are class weights.
        """
        if self.class_dim is None and (outputs.dim() in (0, 1, 3) or outputs.shape[1] < 2):
            advice = "" if outputs.dim() < 3 else ". For labels of each pixel or token give class_dim"
            raise UserError(
                "a Categorical likelihood needs at least 2 outputs, one for each class, [N, C]; the network gives "
                f"{list(outputs.shape)}. A regression network needs a Model with the likelihood Normal, one logit "
                f"Bernoulli{advice}"
            )
        classes = self._class_last(outputs).shape[-1]
        if classes < 2:
            raise UserError(
                f"a Categorical likelihood needs at least 2 classes in dimension {self.class_dim} of the outputs, got "
                f"{list(outputs.shape)}"
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"there are {len(self.class_weights)} class_weights, and the network has {classes} classes")

    def observed(self, y: object, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Class labels [N, ...] as int64. Integers of any width and booleans are converted, of numpy and lists too.

        Soft labels [N, ..., C] are in the dtype of the outputs.
        """
        if isinstance(y, list | tuple):
            y = np.asarray(y)
        if self._has_one_label(outputs):
            return class_labels(y, outputs.shape[-1])
        if self.soft_labels:
            return numbers(y, outputs, self.distribution(outputs), "Categorical")
        *_, classes = shape = self._class_last(outputs).shape
        return class_labels(y, classes, example_shape=shape[1:-1], ignore_index=self.ignore_index)

    def nll(self, outputs: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """See `Likelihood`."""
        if weights is None and self._is_softmax(outputs):
            return F.cross_entropy(outputs, y, reduction="sum")
        return super().nll(outputs, y, weights)

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """See `Likelihood`."""
        if self._is_softmax(outputs) and outputs.dim() == 2:
            return (outputs.argmax(-1) == y).sum(dtype=outputs.dtype)
        return super().correct(outputs, y)

    def _is_softmax(self, outputs: Tensor) -> bool:
        """Whether the distribution is that of one label an example, and no subclass's."""
        return type(self).distribution is Categorical.distribution and self._has_one_label(outputs)

    def mean(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Class probabilities [..., N, C], or [N, ..., C]."""
        return self._class_last(outputs).softmax(-1)

    def parts(self, outputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Probabilities [..., N, C] and their entropy [..., N] in nats."""
        probs = self.mean(outputs)
        return {"mean": probs, "entropy": metrics.entropy(probs)}

    @torch.no_grad()
    def statistics(self, outputs: Tensor, y: Tensor | None = None) -> DrawStatistics:  # type: ignore[override]
        """Probabilities [S, N, C], their entropy [S, N] in nats, and accuracy as the score."""
        if not self._has_one_label(outputs):
            return super().statistics(outputs, y)
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

    def score(self, mean: Tensor, y: Tensor) -> Tensor:
        """Each draw's share of right labels among those that count, [S]."""
        labels = self._hard(y)
        counted = self._counted(labels)
        return ((mean.argmax(-1) == labels) & counted).flatten(1).sum(1) / counted.sum()

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
        """accuracy, nll, ece and brier of the averaged predictive; over the labels that count, nan if there are none.

        The nll is of each example's labels together, nats per example.
        """
        probs, labels = found.averages["mean"], self._hard(found.y)
        if not self.plain or labels.dim() > 1:
            counted = self._counted(labels)
            probs, labels = probs[counted], labels[counted]
        if self.soft_labels:
            brier = float((probs - found.y.reshape(probs.shape)).square().sum(-1).mean())
        else:
            brier = metrics.brier(probs, labels)
        return {
            "accuracy": metrics.accuracy(probs, labels),
            "nll": found.nll,
            "ece": metrics.ece(probs, labels),
            "brier": brier,
        }

    def _has_one_label(self, outputs: Tensor) -> bool:
        return self.plain and outputs.dim() <= _ONE_LABEL

    def _class_last(self, outputs: Tensor) -> Tensor:
        at = self.class_dim
        if at is None:
            return outputs if outputs.dim() <= _ONE_LABEL else outputs.movedim(1, -1)
        if not 1 <= (at if at >= 0 else at + outputs.dim()) < outputs.dim():
            raise UserError(
                f"class_dim is {at}, and the network gives {list(outputs.shape)}: name the dimension of the classes, "
                "behind that of the examples"
            )
        return outputs.movedim(at, -1)

    def _hard(self, y: Tensor) -> Tensor:
        return y.argmax(-1) if self.soft_labels else y

    def _counted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index


class Bernoulli(Likelihood):
    """y is one label 0 or 1, or L of them, with p(y = 1) = sigmoid(outputs [N, L]); for L = 1 y is [N].

    Labels of one example are independent given the network; their log probabilities are summed. ``mean`` is p(y = 1),
    and uncertainties are of each label, [N, L]. Scores other than the nll are averages over all labels.
    """

    drawn: ClassVar[bool] = False
    answers: ClassVar[tuple[str, str]] = ("probs", "entropy")
    units: ClassVar[str] = "nats"

    def distribution(self, outputs: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(y | logits [N] or [N, L])."""
        return independent(dist.Bernoulli(logits=one_number(outputs)))

    def parts(self, outputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """p(y = 1) and the entropy of each label, nats, both [N, L]."""
        logits = one_number(outputs)
        return {"mean": logits.sigmoid(), "entropy": metrics.entropy(torch.stack([logits, -logits], -1).sigmoid())}

    def score(self, mean: Tensor, y: Tensor) -> Tensor:
        """Each draw's share of labels that are right, [S]."""
        return ((mean > 0.5) == y.bool()).float().flatten(1).mean(1)

    def decompose(self, averages: Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy of the mean, mean entropy and mutual information of each label, nats [N, L]."""
        p = averages["mean"]
        return metrics.uncertainties(torch.stack([1 - p, p], -1), averages["entropy"])

    def std(self, averages: Averages) -> Tensor:
        """Standard deviation over the draws of p(y = 1), [N, L]."""
        return averages["spread"].sqrt()

    def answer(self, averages: Averages) -> tuple[Tensor, Tensor]:
        """p(y = 1) and the draws' mean entropy, [N, L] each, nats."""
        return averages["mean"], averages["entropy"]

    def scores(self, found: Summary) -> dict[str, float]:
        """accuracy, nll, ece (of p(y = 1)) and brier, (p - y)^2, of the averaged predictive."""
        p = found.averages["mean"]
        return {
            "accuracy": metrics.binary_accuracy(p, found.y),
            "nll": found.nll,
            "ece": metrics.binary_ece(p, found.y),
            "brier": metrics.binary_brier(p, found.y),
        }
