"""Example weights as they come from users: one number for each example, at least 0."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.models.labels import as_tensor

Weights: TypeAlias = Tensor | np.ndarray | Sequence[float]


def example_weights(weights: Weights, count: int) -> Tensor:
    """Example weights [N], float64.

    Raises:
        UserError: they are not N finite numbers, at least 0, of which one is above 0.
    """
    found = as_tensor(np.asarray(weights) if isinstance(weights, list | tuple) else weights, "weights").detach()
    if found.shape != (count,) or found.is_complex():
        raise UserError(
            f"weights must be one number for each of the {count} examples, [{count}]; got shape {list(found.shape)}"
        )
    found = found.cpu().double()
    if not bool(found.isfinite().all()) or bool((found < 0).any()) or not bool((found > 0).any()):
        raise UserError(
            f"weights must be finite, at least 0, and not all 0; got {float(found.min()):g} to {float(found.max()):g}"
        )
    return found
