"""How good and how sure a predictive distribution is: pure functions of probabilities and log likelihoods."""

import math

import torch
from torch import Tensor


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label; probs [N, C], labels [N]."""
    return float((probs.argmax(1) == labels).double().mean())


def nll(log_likelihood: Tensor) -> float:
    """Negative log likelihood of the averaged predictive, nats per datum: -mean_i log (1/S) sum_s p(y_i | draw s).

    Args:
        log_likelihood: log p(y_i | x_i, draw s), [S, N]; NaN where an example has no such draw.
    """
    missing = log_likelihood.isnan()
    total = torch.logsumexp(log_likelihood.double().masked_fill(missing, -math.inf), 0)
    return float(-(total - (~missing).sum(0).log()).mean())


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score, from 0 to 2: the mean over examples of sum_c (p_c - [c = label])^2 (Brier 1950)."""
    truth = torch.nn.functional.one_hot(labels, probs.shape[1])
    return float((probs - truth).square().sum(1).mean())


def ece(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins of the top probability (Guo et al. 2017, eq. 3)."""
    # Imported here: torchmetrics loads torchvision, 3 seconds that training should not wait for.
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(
        multiclass_calibration_error(probs.float(), labels, num_classes=probs.shape[1], n_bins=bins, norm="l1")
    )


def reliability(probs: Tensor, labels: Tensor, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Mean top probability, accuracy and number of examples in each bin, each [bins]; NaN where a bin is empty."""
    top, choice = probs.max(1)
    # The bins are (k / bins, (k + 1) / bins], as in `ece`.
    index = (top * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins).double()
    confidence = torch.bincount(index, weights=top.double(), minlength=bins) / count
    correct = torch.bincount(index, weights=(choice == labels).double(), minlength=bins) / count
    return confidence, correct, count


def entropy(probs: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats; 0 log 0 is 0."""
    return torch.special.entr(probs).sum(-1)


def uncertainties(mean_probs: Tensor, mean_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total, aleatoric and epistemic uncertainty of each example, in nats, each [N] (Depeweg et al. 2018, eq. 4).

    Total is the entropy of the mean, aleatoric the mean of the draws' entropies, epistemic their difference: the
    mutual information between label and weights, which rounding alone could make negative.

    Args:
        mean_probs: mean over draws of the probabilities, [N, C].
        mean_entropy: mean over draws of the entropy, [N].
    """
    total = entropy(mean_probs)
    return total, mean_entropy, (total - mean_entropy).clamp_min(0)
