"""What a result tells of the data that it is of."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ppl_bnn.data import Arrays, Images, Split, Table
from ppl_bnn.data.splits import is_split
from ppl_bnn.errors import UserError
from ppl_bnn.prediction.result import Predictive

_ROWS = 2


class Told(NamedTuple):
    """The arguments of `ppl_bnn.to_inference_data` about data, with those of a `Split` that holds no images spelt out.

    Attributes:
        images: the data, if they are images in memory.
    """

    images: Images | None
    x: Tensor | np.ndarray | None
    feature_names: Sequence[str] | None
    classes: Sequence[str] | None
    attrs: Mapping[str, Any]

    @property
    def names(self) -> Sequence[str] | None:
        """The names of the classes, as far as they are known."""
        return self.classes if self.images is None else self.images.classes


def told(
    predictive: Predictive, data: Split | None, x: Tensor | np.ndarray | None, feature_names: Sequence[str] | None,
    classes: Sequence[str] | None, attrs: Mapping[str, Any] | None,
) -> Told:  # fmt: skip
    """Spell out what `data` tell: titles, names, and the inputs of a table, or of rows of numbers.

    Inputs of other kinds, such as sequences, would make the result as large as the data.

    Raises:
        UserError: `data` or `x` and the predictive differ in number, or their labels do; both `data` and `x`.
    """
    count, attrs = len(predictive.draws), attrs or {}
    if data is not None and not is_split(data):
        raise UserError(
            f"data must be Images, a Table or another Split of ppl_bnn.data, got a {type(data).__name__}: pass inputs "
            "of other kinds as x="
        )
    if data is not None and x is not None:
        raise UserError("got both data and x: pass one of them")
    if data is not None:
        what = "images" if isinstance(data, Images) else "examples"
        if len(data) != count:
            raise UserError(f"the predictive has {count} {what}, got {len(data)}")
        if predictive.y is not None and _differ(data.targets, predictive.y):
            raise UserError(f"{what} must be those that the predictive was made of, in its order; their labels differ")
    if x is not None and (not isinstance(x, Tensor | np.ndarray) or not x.ndim or len(x) != count):
        got = list(x.shape) if isinstance(x, Tensor | np.ndarray) else type(x).__name__
        raise UserError(f"x must be the inputs of the {count} examples of the predictive, [{count}, ...], got {got}")
    if data is None:
        return Told(None, x, feature_names, classes, {"title": f"{count} examples", **attrs})
    if isinstance(data, Images):
        return Told(data, None, None, None, {"title": data.title, **attrs})
    attrs = {"title": data.title, "y_label": data.target, **attrs}
    if isinstance(data, Table):
        return Told(None, data.x, data.features, data.classes or None, attrs)
    rows = data.x if isinstance(data, Arrays) and isinstance(data.x, Tensor) and data.x.dim() <= _ROWS else None
    return Told(None, rows, None, data.classes or None, attrs)


def _differ(targets: Tensor, y: Tensor) -> bool:
    """Whether labels in whole numbers are others; numbers may have been converted."""
    if targets.is_floating_point() or y.is_floating_point() or targets.shape != y.shape:
        return False
    return bool((targets.cpu().long() != y.cpu().long()).any())
