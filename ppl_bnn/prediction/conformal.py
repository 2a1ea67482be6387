"""Split-conformal intervals and sets: held-out examples make the predictive's coverage right, however wrong it is.

The promise: if held-out and new examples are exchangeable (independent of the training data, and drawn alike), a new y
is inside with a probability of at least `level`, on average over held-out sets and new examples. It holds for any
predictive made in the same way for both, say with the same posterior, draws and seed. It does not hold given x, nor
under a shift of the data. For one held-out set of n the coverage is Beta(k, n + 1 - k) with k = ceil((n + 1) level),
where no two scores are equal: 0.9 with a standard deviation of 0.0095 for n = 1000.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.models.labels import class_labels


def conformal_interval(
    lower_held: Tensor, upper_held: Tensor, y_held: Tensor, lower: Tensor, upper: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Conformalized quantile regression: intervals moved until they hold y often enough (Romano et al. 2019, eq. 6-8).

    Both bounds move outward by the ceil((n + 1) level)-th smallest of max(lower - y, y - upper) over the held-out
    examples, inward where it is negative. Each number of y [...] has its own, so the promise is for each alone. Where
    the bounds would cross, both are their middle; crossed bounds would hold no y. For counts, the lower bound may be
    rounded up and the upper one down.

    Args:
        lower_held, upper_held: predicted bounds of the held-out examples, of any nominal probability, [n, ...].
        y_held: their observed values [n, ...].
        lower, upper: predicted bounds of new examples, [N, ...].
        level: the promised coverage, between 0 and 1.

    Returns:
        (lower, upper), float64 [N, ...] each.

    Raises:
        UserError: shapes that do not fit, values that are not finite, a level outside (0, 1), or fewer than
            level / (1 - level) held-out examples.
    """
    values = {"lower_held": lower_held, "upper_held": upper_held, "y_held": y_held, "lower": lower, "upper": upper}
    for name, value in values.items():
        expected = y_held.shape if name.endswith("_held") else (len(lower), *y_held.shape[1:])
        if value.shape != expected:
            raise UserError(
                f"{name} has shape {list(value.shape)}, expected {list(expected)} beside y_held {list(y_held.shape)}: "
                "pass bounds and y of the same examples"
            )
        _check_finite(name, value)
    lower_held, upper_held, y_held, lower, upper = (value.double() for value in values.values())
    margin = _quantile(torch.maximum(lower_held - y_held, y_held - upper_held), level)
    middle = (lower + upper) / 2
    crossed = lower - margin > upper + margin
    return torch.where(crossed, middle, lower - margin), torch.where(crossed, middle, upper + margin)


def conformal_sets(
    probs_held: Tensor, labels_held: Tensor, probs: Tensor, level: float, *, seed: int | None = None
) -> Tensor:
    """Adaptive prediction sets: the most probable classes, until they hold the label often enough (Romano et al. 2020).

    The score of a class is the probability of all classes that are more probable, plus u times its own. A set has the
    classes with a score up to the ceil((n + 1) level)-th smallest score of the held-out labels. Without a seed u is 0:
    a set is never empty, it is the same in every call, and coverage may exceed the level, for a set cannot hold a part
    of a class. With a seed u is uniform in (0, 1), one for each example: coverage is the level to within 1 / (n + 1),
    and a set may be empty.

    Args:
        probs_held: predicted probabilities of the held-out examples, [n, C].
        labels_held: their labels, integers [n].
        probs: predicted probabilities of new examples, [N, C].
        level: the promised coverage, between 0 and 1.
        seed: of the random u; None for none.

    Returns:
        Whether a class is in an example's set, bool [N, C].

    Raises:
        UserError: as `conformal_interval`; or rows that are no probabilities, or labels that are no classes.
    """
    for name, value in {"probs_held": probs_held, "probs": probs}.items():
        if value.dim() != 2 or value.shape[1] != probs_held.shape[-1]:
            raise UserError(
                f"{name} has shape {list(value.shape)} beside probs_held {list(probs_held.shape)}, expected [examples, "
                "classes] with as many classes: pass probabilities of one predictive"
            )
        _check_finite(name, value)
        if (value < 0).any() or ((value.double().sum(1) - 1).abs() > 1e-3).any():
            raise UserError(f"the rows of {name} are not all probabilities that add up to 1: pass softmax(logits)")
    labels_held = class_labels(labels_held, probs_held.shape[1], "labels_held").to(probs_held.device)
    if len(labels_held) != len(probs_held):
        raise UserError(
            f"labels_held has {len(labels_held)} labels, expected {len(probs_held)}, one for each row of probs_held: "
            "pass probabilities and labels of the same examples"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    held, new = (_class_scores(value.double(), generator) for value in (probs_held, probs))
    return new <= _quantile(held.gather(1, labels_held.unsqueeze(1))[:, 0], level)


def _class_scores(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    ordered, order = probs.sort(dim=1, descending=True, stable=True)
    # The probability of the classes before each.
    scores = torch.cat((torch.zeros_like(ordered[:, :1]), ordered.cumsum(1)[:, :-1]), 1)
    if generator is not None:
        scores += torch.rand(len(probs), 1, dtype=torch.float64, generator=generator).to(probs.device) * ordered
    return torch.empty_like(scores).scatter_(1, order, scores)


def _quantile(scores: Tensor, level: float) -> Tensor:
    # The ceil((n + 1) level)-th smallest of scores [n, ...]: [...].
    if not 0 < level < 1:
        raise UserError(f"level is {level}, expected a probability between 0 and 1, both excluded: 0.9 for 90%")
    # In binary 100 times 0.55 is more than 55.
    exact = Fraction(str(float(level)))
    rank, needed = math.ceil((len(scores) + 1) * exact), math.ceil(exact / (1 - exact))
    if rank > len(scores):
        raise UserError(
            f"a conformal level of {level} needs at least {needed} held-out examples, got {len(scores)}: hold out "
            "more, or lower the level"
        )
    return scores.kthvalue(rank, 0).values


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise UserError(f"{name} has values that are NaN or infinite, expected finite ones: leave those examples out")
