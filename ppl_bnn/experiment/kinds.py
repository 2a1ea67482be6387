"""What kind of examples a run's data are: the word for them, and the shifts and figures that fit them."""

from torch import Tensor

from ppl_bnn.data import Images, Split, Table, first_inputs

_CHANNELS = (1, 3)


def kind_of(data: Split) -> str:
    """``images``, ``rows`` (of a table), ``sequences`` or, of any other inputs, ``examples``.

    Images are of one or three channels with values in [0, 1], in memory or not. Rows are numbers [D]. Sequences are
    [T, D], or [T] of whole numbers, which are tokens.
    """
    if isinstance(data, Images):
        return "images"
    if isinstance(data, Table):
        return "rows"
    x = first_inputs(data, 2)
    if not isinstance(x, Tensor):
        return "examples"
    if x.dim() == 4 and x.shape[1] in _CHANNELS and bool(((x >= 0) & (x <= 1)).all()):
        return "images"
    if x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point()):
        return "sequences"
    return "rows" if x.dim() == 2 else "examples"
