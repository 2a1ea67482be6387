"""How many draws the predictive needs: its error against the number of draws, measured on draws that are there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_bnn import metrics

COUNTS = (10, 20, 50, 100, 200, 400, 1000)


def convergence(
    probs: Tensor, log_likelihood: Tensor, labels: Tensor, *, together: int = 1, counts: Sequence[int] = COUNTS
) -> list[dict[str, float]]:
    """One row for each number of draws n up to S.

    Each row has ``draws``; ``images``, the number of examples it is of; ``error``, the spread of the averaged top
    probability among the S // n groups of n draws (root mean square over examples; NaN below two groups);
    ``standard_error``, what a single group's own variance says it is; ``worst``, the largest of those over examples;
    ``accuracy`` and ``nll`` (nats per datum) of the first n draws and ``accuracy_error`` and ``nll_error``, their
    standard deviations among the groups (NaN below two).

    Args:
        probs: each draw's probabilities, [S, N, C]; examples that lack draws (NaN) are left out.
        log_likelihood: log p(y_i | x_i, draw s), [S, N], of which NLL is made: probabilities may be rounded to 0.
        labels: [N].
        together: draws that depend on each other, 2 for antithetic pairs.
    """
    whole = probs.isfinite().all(2).all(0)
    probs, log_likelihood, labels = probs[:, whole], log_likelihood[:, whole], labels[whole]
    if not len(labels):
        return []
    choice = probs.mean(0).argmax(1)
    top = probs.gather(2, choice.expand(len(probs), -1).unsqueeze(2))[..., 0].double()
    rows = []
    for count in (count for count in counts if 2 * together <= count <= len(probs)):
        groups = len(probs) // count
        means = top[: groups * count].unflatten(0, (groups, count)).mean(1)
        own = top[: count // together * together].unflatten(0, (-1, together)).mean(1)
        variance = own.var(0) / len(own)
        parts = [slice(at * count, (at + 1) * count) for at in range(groups)]
        scores = torch.tensor(
            [[metrics.accuracy(probs[part].mean(0), labels), metrics.nll(log_likelihood[part])] for part in parts]
        )
        spread = scores.std(0) if groups > 1 else torch.full((2,), math.nan)
        rows.append(
            {
                "draws": count,
                "images": len(labels),
                "error": float(means.var(0).mean().sqrt()) if groups > 1 else math.nan,
                "standard_error": float(variance.mean().sqrt()),
                "worst": float(variance.amax().sqrt()),
                "accuracy": float(scores[0, 0]),
                "nll": float(scores[0, 1]),
                "accuracy_error": float(spread[0]),
                "nll_error": float(spread[1]),
            }
        )
    return rows
