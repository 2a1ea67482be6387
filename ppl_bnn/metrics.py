"""How good and how sure a predictive distribution is: pure functions of probabilities and log likelihoods."""

import math

import torch
from torch import Tensor

from ppl_bnn.errors import UserError


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
    """Expected calibration error over the bins of `reliability` (Guo et al. 2017, eq. 3)."""
    # Not by torchmetrics, which has one bin more: of the top probabilities that are exactly 1.
    confidence, correct, count = reliability(probs, labels, bins=bins)
    return float(((confidence - correct).abs() * count).nansum() / count.sum())


def reliability(probs: Tensor, labels: Tensor, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Mean top probability, accuracy and number of examples in each bin (k / bins, (k + 1) / bins], each [bins].

    Mean and accuracy are NaN where a bin is empty.
    """
    top, choice = probs.max(1)
    return _binned(top, choice == labels, bins)


def binary_accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of labels that are 1 exactly where their probability is above 1 / 2; both [N, ...], pooled over labels."""
    return float(((probs > 0.5) == labels.bool()).double().mean())


def binary_brier(probs: Tensor, labels: Tensor) -> float:
    """Mean of (p - y)^2 over examples and labels, from 0 to 1; p(y = 1) and y [N, ...].

    Half of `brier` of the two classes (1 - p, p).
    """
    return float((probs.double() - labels.double()).square().mean())


def binary_ece(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of p(y = 1) over the bins of `binary_reliability`, pooled over labels."""
    probability, share, count = binary_reliability(probs, labels, bins=bins)
    return float(((probability - share).abs() * count).nansum() / count.sum())


def binary_reliability(probs: Tensor, labels: Tensor, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Mean p(y = 1), share of y = 1 and number of labels in each bin (k / bins, (k + 1) / bins], each [bins].

    Unlike in `reliability` the probability is that of 1, not that of the more probable label, where a p(y = 1) that is
    always too high is partly cancelled: it makes the answer 1 too sure and the answer 0 too unsure.

    Args:
        probs, labels: p(y = 1) and y of 0 and 1, [N, ...]; one label of several is ``probs[:, k]``.
    """
    return _binned(probs.flatten(), labels.flatten(), bins)


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


def adaptive_ece(probs: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Calibration error of the top probability over bins that hold equally many examples (Nixon et al. 2019, sec. 3).

    Equal-width bins leave a confident network with one full bin; these follow its confidences. With fewer examples
    than `bins` each has a bin of its own.
    """
    top, choice = probs.double().max(1)
    gap = (choice == labels).double() - top
    return float(sum(part.sum().abs() for part in gap[top.argsort(stable=True)].tensor_split(bins)) / len(labels))


def risk_coverage(certainty: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Error rate among the k most certain examples against k / N, k = 1 .. N: (coverage [N], risk [N]).

    Examples of equal certainty count with their mean error, so that their order does not matter. The area under the
    curve is the mean of `risk` (AURC; Geifman and El-Yaniv 2017).

    Args:
        certainty: the higher, the sooner an example is kept: a top probability or a negative uncertainty, [N].
        correct: whether the prediction was right, [N].
    """
    _, group, size = certainty.neg().unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(size), dtype=torch.double).index_add_(0, group, 1 - correct.double()) / size
    kept = torch.arange(1, len(certainty) + 1, dtype=torch.double)
    return kept / len(certainty), wrong.repeat_interleave(size).cumsum(0) / kept


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an example from outside is the more uncertain of a pair, ties counting half.

    Args:
        inside, outside: uncertainties of examples the network was made for, [N], and of others, [M].
    """
    ordered = inside.sort().values
    # How many from inside each one exceeds, and how many it does not fall below; a tie is in the second alone.
    below, up_to = (torch.searchsorted(ordered, outside, right=right) for right in (False, True))
    return float((below + up_to).double().mean()) / (2 * len(inside))


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of the examples from outside that pass for inside at the threshold that lets 95% of the inside pass."""
    # The least that lets 95% pass. Of 0.95 times a number that is whole, rounding may make a little more.
    threshold = inside.sort().values[math.ceil(0.95 * len(inside) - 1e-9) - 1]
    return float((outside <= threshold).double().mean())


def tempered(probs: Tensor, temperature: float) -> Tensor:
    """Probabilities [N, C] with log p / temperature in place of log p, normalized (Guo et al. 2017, eq. 9)."""
    return (_log(probs) / temperature).softmax(1)


def fit_temperature(probs: Tensor, labels: Tensor) -> float:
    """The temperature between 0.01 and 100 with the least NLL on these examples, which must be held out from training.

    The averaged predictive is scaled, not each draw. The NLL is convex in 1 / temperature, so the minimum is the only
    one.

    Raises:
        UserError: no examples, or labels out of range.
    """
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= probs.shape[1]:
        raise UserError(f"a temperature needs held-out labels from 0 to {probs.shape[1] - 1}, got {labels.tolist()}")
    from scipy.optimize import minimize_scalar

    log_probs = _log(probs)

    def held_out_nll(inverse: float) -> float:
        return float(torch.nn.functional.cross_entropy(inverse * log_probs, labels))

    # Brent's method goes by the logarithm, in which the minimum is as unique.
    found = minimize_scalar(lambda log_inverse: held_out_nll(math.exp(log_inverse)), bounds=(-4.605, 4.605))
    return math.exp(-found.x)


def _log(probs: Tensor) -> Tensor:
    return probs.double().clamp_min(torch.finfo(torch.float32).tiny).log()


def _binned(probability: Tensor, happened: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    # Mean probability, share that happened and number of values in each bin, NaN where it is empty.
    index = (probability * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(index, minlength=bins).double()
    confidence = torch.bincount(index, weights=probability.double(), minlength=bins) / count
    return confidence, torch.bincount(index, weights=happened.double(), minlength=bins) / count, count
