"""Example weights: each example's log likelihood is multiplied by its own number."""

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.inference.door import Training
from ppl_bnn.models.labels import as_tensor

Weights = Tensor | np.ndarray | Sequence[float]


def check_weights(weights: Weights | None, count: int, trained: Training) -> Tensor | None:
    """Example weights [N] on the device and in the dtype of the first parameter that is trained; None for None.

    Raises:
        UserError: they are not N finite numbers, at least 0, of which one is above 0.
    """
    if weights is None:
        return None
    found = as_tensor(np.asarray(weights) if isinstance(weights, list | tuple) else weights, "weights").detach()
    if found.shape != (count,) or found.is_complex():
        raise UserError(
            f"weights must be one number for each of the {count} examples, [{count}]; got shape {list(found.shape)}"
        )
    learnt = (*trained.guide.parameters(), *trained.model.parameters(), *trained.params.values())
    like = next(value for value in learnt if value.is_floating_point())
    found = found.to(like.device, like.dtype)
    if not bool(found.isfinite().all()) or bool((found < 0).any()) or not bool((found > 0).any()):
        raise UserError(
            f"weights must be finite, at least 0, and not all 0; got {float(found.min()):g} to {float(found.max()):g}"
        )
    return found


def weights_checksum(weights: Tensor | None) -> str | None:
    """A text that differs where the weights differ, None for None: an interrupted training resumes with its own."""
    if weights is None:
        return None
    return f"{zlib.crc32(weights.double().cpu().numpy().tobytes()):08x}"


def weighting(weights: Tensor | None, rows: Tensor) -> AbstractContextManager:
    """The context in which a model runs with the examples `rows`."""
    return nullcontext() if weights is None else ExampleWeights(weights[rows])


class ExampleWeights(Messenger):
    """Pyro handler: multiplies the log likelihood of example i by weights[i].

    Examples are the first batch dimension of an observed site.

    Args:
        weights: of the batch that the model runs with, [B].

    Raises:
        UserError: on exit, if no observed site has B examples.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self._met = False

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            return
        shape = msg["fn"].batch_shape
        if shape[:1] == self.weights.shape:
            self._met = True
            msg["scale"] = msg["scale"] * self.weights.view(-1, *[1] * (len(shape) - 1))

    def __exit__(self, kind: Any, *error: Any) -> Any:
        if kind is None and not self._met:
            raise UserError(
                f"weights of {len(self.weights)} examples, and no observed site has these in its first batch dimension:"
                " observe y in a plate of the examples, or leave out weights"
            )
        return super().__exit__(kind, *error)
