"""Times contenders in turns, so that other work on the machine slows all of them alike, and compares them by round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm


def in_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, wait: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Run each contender once a round, in a new random order; return its seconds, round by round.

    Args:
        wait: called before the clock is read, to wait for a device.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name in order.sample(list(contenders), len(contenders)):
            started = time.perf_counter()
            contenders[name]()
            wait()
            found[name].append(time.perf_counter() - started)
    return found


def ratios(own: list[float], base: list[float]) -> tuple[str, str]:
    """Return the ratio of the medians, and the quartiles of the rounds' ratios."""
    quartiles = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4, method="inclusive")
    low, middle, high = (f"{quartile:.2f}" for quartile in quartiles)
    return f"{statistics.median(own) / statistics.median(base):.2f}", f"{low}, {middle}, {high}"
