"""The KL weight as a function of training progress."""

import math
from collections.abc import Callable

from ppl_bnn.errors import UserError


def kl_schedule(name: str, kl_weight: float = 1.0, *, ramp: float = 0.5, cycles: int = 4) -> Callable[[float], float]:
    """The KL weight as a function of training progress in [0, 1].

    * ``constant``: `kl_weight` throughout.
    * ``linear``: rises in a line over the first `ramp` of training, then stays.
    * ``cyclical``: `cycles` equal cycles, each rising over its first `ramp`, then staying (Liu et al. 2019, eq. 6-7).

    A ramp starts just above 0: a weight of exactly 0 would drop the prior from the model.

    Raises:
        UserError: an unknown name or a value out of range.
    """
    if name not in ("constant", "linear", "cyclical"):
        raise UserError(f"kl_schedule must be constant, linear or cyclical, got {name!r}")
    if not (math.isfinite(kl_weight) and kl_weight > 0):
        raise UserError(f"kl_weight must be positive and finite, got {kl_weight}")
    if not 0 < ramp <= 1:
        raise UserError(f"kl_ramp must be a fraction in (0, 1], got {ramp}")
    if cycles < 1:
        raise UserError(f"kl_cycles must be at least 1, got {cycles}")

    def weight(progress: float) -> float:
        if name == "constant":
            return kl_weight
        within = progress if name == "linear" else (progress * cycles) % 1.0
        return kl_weight * max(min(1.0, within / ramp), 1e-6)

    return weight
