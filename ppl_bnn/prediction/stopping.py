"""When an example's predictive is known well enough: a test at a few fixed numbers of draws.

The mean of n draws of a probability is off by at most t * sqrt(variance / n) with the confidence that the quantile t of
Student's distribution has. It is looked at after 50, 100, 200, 400 ... draws, and whoever looks again and again until
it fits is too sure of it: each of at most 16 looks gets a sixteenth of the probability of error (Bonferroni), so that
the bound holds at all of them together. How often it holds where draws are few and far from normal is measured in
docs/prediction.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_bnn.prediction.result import Predictive

FIRST_LOOK, LOOKS, CONFIDENCE = 50, 16, 0.95


def is_look(draws: int) -> bool:
    """Whether precision is looked at after so many draws: 50, 100, 200, ..."""
    times, rest = divmod(draws, FIRST_LOOK)
    return rest == 0 and times.bit_count() == 1


def schedule(done: int, num_samples: int, size: int, ranks: int, looks: bool) -> Iterator[tuple[int, slice]]:
    """Which blocks come next: (first block, which of the draws of it and the following ones are new).

    Each step takes one block of `size` draws on each rank. A block is computed whole wherever it is needed in part: its
    numbers are the same.

    Args:
        done: draws that are made already.
        looks: end at the next number of draws at which precision is looked at, after which blocks may be others.
    """
    while done < num_samples:
        first = done // size
        last = min(num_samples, (first + ranks) * size)
        if looks:
            last = next((draw for draw in range(done + 1, last) if is_look(draw)), last)
        yield first, slice(done - first * size, last - first * size)
        if looks and is_look(last):
            return
        done = last


def precise(predictive: Predictive, tolerance: float) -> Tensor:
    """Whether each mean (probability) is within the tolerance of its limit, with 95% confidence each, [N]."""
    # Imported here: it takes a second.
    from scipy.stats import t

    independent = predictive.draws // (2 if predictive.sampling == "antithetic" else 1)
    quantiles = t.ppf(1 - (1 - CONFIDENCE) / LOOKS / 2, (independent - 1).numpy())
    error = predictive.mc_error.flatten(1) if predictive.squares.dim() > 1 else predictive.mc_error.unsqueeze(1)
    return (error * torch.as_tensor(quantiles).unsqueeze(1)).amax(1) <= tolerance
