"""Example weights: each example's log likelihood is multiplied by its own number."""

import zlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.inference.door import Training
from ppl_bnn.models.example_weights import Weights, example_weights


def checked_weights(weights: Weights | None, count: int, trained: Training) -> Tensor | None:
    """`example_weights` [N] on the device and in the dtype of the first parameter that is trained; None for None."""
    if weights is None:
        return None
    learnt = (*trained.guide.parameters(), *trained.model.parameters(), *trained.params.values())
    like = next(value for value in learnt if value.is_floating_point())
    return example_weights(weights, count).to(like.device, like.dtype)


def weights_checksum(weights: Tensor | None) -> str | None:
    """A text that differs where the weights differ, None for None: an interrupted training resumes with its own."""
    if weights is None:
        return None
    return f"{zlib.crc32(weights.double().cpu().numpy().tobytes()):08x}"


def weighting(weights: Tensor | None) -> AbstractContextManager:
    """The context in which a model runs with examples of these weights, [B]."""
    return nullcontext() if weights is None else ExampleWeights(weights)


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
