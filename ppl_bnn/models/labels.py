"""Inputs and class labels as they come from users: converted where that is unambiguous, or refused."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor
from torch.distributions import Categorical, Distribution

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, finite, parts


def as_tensor(value: Any, name: str, *, like: Tensor | None = None) -> Tensor:
    """A tensor as it is, or a numpy array as a tensor: on the device of `like`, real numbers in its dtype.

    Args:
        name: what the value is called in a message.
        like: a floating-point tensor; None leaves device and dtype as they are.

    Raises:
        UserError: anything else, or an array whose dtype torch does not have.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        kind = type(value).__name__
        advice = f"pass {name}.to_numpy()" if hasattr(value, "to_numpy") else "convert it first"
        raise UserError(f"{name} must be one tensor or numpy array of N examples, got a {kind}: {advice}")
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(value))
    except (TypeError, ValueError):
        raise UserError(f"{name} is a numpy array of dtype {value.dtype}; torch needs numbers: convert it") from None
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


def not_finite(values: Tensor, *, first: int = 0) -> str:
    """Which examples of [N, ...], from number `first` on, are not finite, in words; empty if all are."""
    if values.isfinite().all():
        return ""
    bad = (~finite(values)).nonzero()
    return f"{len(bad)} examples have NaN or infinite values, the first is {first + int(bad[0])}"


def refuse_dtype(x: Any, parameters: Iterable[Tensor], run: Callable[[Any], object]) -> None:
    """Raise UserError if a forward pass failed by the dtype of `x`: in the parameters' dtype it does not fail.

    Args:
        x: the inputs [n, ...] of the forward pass that failed; of several inputs nothing is said.
        parameters: the network's; the first in floating point tells their dtype.
        run: the forward pass, of inputs [n, ...].
    """
    if not isinstance(x, Tensor):
        # Of several inputs each has a dtype of its own.
        return
    dtype = next((value.dtype for value in parameters if value.is_floating_point()), x.dtype)
    if x.dtype == dtype or x.is_complex():
        return
    try:
        run(x.to(dtype))
    except RuntimeError:
        return
    except ValueError:
        # The run got further than before, so the dtype is to be put right first.
        pass
    own, theirs = (str(kind).removeprefix("torch.") for kind in (x.dtype, dtype))
    raise UserError(
        f"x has dtype {own} and the network's parameters have {theirs}, and the network fails on this mix: "
        f"pass x.to(torch.{theirs})"
    ) from None


def failing(x: Inputs, error: Exception) -> UserError:
    """The error that says on which inputs [n, ...] the network fails, and how."""
    kinds = [f"{part.dtype} {['N', *part.shape[1:]]}".replace("'", "").removeprefix("torch.") for part in parts(x)]
    reason = next(iter(str(error).splitlines()), "")
    return UserError(
        f"the network fails on x of {' and '.join(kinds)} ({type(error).__name__}: {reason}): give it inputs of the "
        "shape and dtype that it takes"
    )


def class_labels(
    y: Any, num_classes: int, name: str = "y", *, example_shape: Size | tuple[int, ...] = (),
    ignore_index: int | None = None,
) -> Tensor:  # fmt: skip
    """Labels 0..C-1 as int64 [N, *example_shape]; any integer dtype, bool and numpy arrays are converted.

    Args:
        num_classes: C, the number of the network's outputs.
        name: what the labels are called in a message.
        example_shape: the shape of one example's labels; () is one label an example.
        ignore_index: another number that is allowed, of labels that do not count.

    Raises:
        UserError: labels that are no integers, of another shape, or outside 0..C-1. All of them are looked at.
    """
    y = as_tensor(y, f"the labels {name}")
    beside = "" if ignore_index is None else f" or {ignore_index}"
    shape = str(["N", *example_shape]).replace("'", "")
    expected = f"expected integer class labels 0..{num_classes - 1}{beside} of shape {shape}"
    got = f"the labels {name} have shape {list(y.shape)} and dtype {str(y.dtype).removeprefix('torch.')}; {expected}"
    if y.shape[1:] != tuple(example_shape):
        if y.shape[1:] == (*example_shape, num_classes):
            raise UserError(f"{got}. They look one-hot: pass {name}.argmax(-1)")
        if y.shape[1:] == (*example_shape, 1):
            raise UserError(f"{got}: pass {name}.squeeze(-1)")
        raise UserError(f"{got}: reshape them")
    if y.is_floating_point() or y.is_complex():
        span = (
            f" Their values are from {float(y.min()):g} to {float(y.max()):g}"
            if y.numel() and not y.is_complex()
            else ""
        )
        raise UserError(f"{got}.{span}: pass {name}.long() if they are labels")
    y = y.long()
    counted = y if ignore_index is None else y[y != ignore_index]
    low, high = (int(bound) for bound in torch.aminmax(counted)) if counted.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        advice = f"drop the examples without a label, or ignore one number: Categorical(ignore_index={low})"
        if low >= 0:
            advice = "subtract 1" if low == 1 and high == num_classes else "give the network an output for each class"
        raise UserError(f"the labels {name} are from {low} to {high}; {expected}: {advice}")
    return y


def right_answers(of: Distribution, y: Tensor) -> Tensor | None:
    """The number of labels y [N] that are the most probable of p(y_i); None unless each is one of some classes."""
    if not isinstance(of, Categorical) or of.logits.dim() != 2:
        return None
    # As the numbers beside it are: one kernel less where these are put together.
    return (of.logits.argmax(-1) == y).sum(dtype=of.logits.dtype)
