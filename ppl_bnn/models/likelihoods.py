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
        classes = outputs.shape[-1]
        needs = (
            f"a Categorical likelihood needs class labels 0..{classes - 1}, integers [N] "
            f"({classes} output{'s' * (classes > 1)} here)"
        )
        if not isinstance(y, Tensor | np.ndarray | list | tuple):
            kind = f"{type(y).__module__.partition('.')[0]}.{type(y).__name__}"
            advice = ": pass y.to_numpy()" if hasattr(y, "to_numpy") else ""
            raise UserError(f"{needs}; got {'None' if y is None else kind}{advice}")
        try:
            labels = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{needs}; got values that are no numbers ({error})") from None
        if labels.is_floating_point() or labels.is_complex():
            span = f"values from {float(labels.min()):.4g} to {float(labels.max()):.4g}" if labels.numel() else "none"
            raise UserError(f"{needs}; got {span} of {labels.dtype}: cast labels with y.long()")
        if labels.dim() != 1:
            advice = "one-hot rows become labels with y.argmax(1)" if labels.shape[-1:] == (classes,) else "flatten y"
            raise UserError(f"{needs}; got labels of shape {list(labels.shape)}: {advice}")
        labels = labels.long()
        check_labels(labels, classes)
        return labels

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


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise UserError for labels outside 0 .. classes - 1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        advice = ""
        if int(labels.min()) < 0:
            advice = ": leave out the examples whose label is unknown"
        elif int(labels.min()) == 1 and int(labels.max()) == classes:
            advice = ": labels that start at 1 become y - 1"
        raise UserError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}{advice}"
        )
