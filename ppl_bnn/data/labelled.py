"""Which part of an example is its label."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppl_bnn.data.arrays import tensor_of
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import mapped


def labelled(whole: Any, target: str | int | None = None) -> tuple[Any, Any]:
    """Inputs and label of a batch, or of all examples: a tuple's last element is the label, or a dict's ``y``.

    A dict or tuple with one input is that input. What is neither has no label, nor has a dict without ``y``.

    Args:
        target: name or position of another label.

    Raises:
        UserError: there is no such label, nothing beside it, or it is no tensor or array.
    """
    y: Any = None
    if isinstance(whole, Mapping):
        if target is not None and target not in whole:
            raise UserError(f"target {target!r} names no part of an example; it has {', '.join(map(str, whole))}")
        name = "y" if target is None else target
        x: Any = {key: value for key, value in whole.items() if key != name}
        y, rest = whole.get(name), list(x.values())
    elif isinstance(whole, Sequence) and not isinstance(whole, str):
        place = -1 if target is None else target
        if not isinstance(place, int) or not -len(whole) <= place < len(whole):
            raise UserError(f"target {target!r} names no part of an example, which is a tuple of {len(whole)}")
        rest = list(whole)
        if len(rest) > 1 or target is not None:
            y = rest.pop(place)
        x = tuple(rest)
    elif target is not None:
        raise UserError(f"target {target!r} names no part of an example, which is a {type(whole).__name__}")
    else:
        return whole, None
    if not rest:
        raise UserError("the examples have a label and no inputs beside it: give tuples (x, y), or dicts with inputs")
    if y is not None and not hasattr(y, "shape"):
        raise UserError(f"the label of an example must be a number, an array or a tensor, got {y!r:.60}")
    return rest[0] if len(rest) == 1 else x, y


def tensors(batch: Any) -> Any:
    """A batch whose numpy arrays are tensors."""
    return mapped(batch, lambda part: tensor_of(part) if isinstance(part, np.ndarray) else part)
