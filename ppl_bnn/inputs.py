"""What a network is given: a tensor of examples, or a tuple or dict of such tensors."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError

# Tensors of the same number of examples, [N, ...] each.
Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
I = TypeVar("I", bound=Any)  # noqa: E741 -- the same kind of inputs in and out


def parts(x: Any) -> list[Any]:
    """The tensors of some inputs, in order."""
    if isinstance(x, Mapping):
        return [part for value in x.values() for part in parts(value)]
    if isinstance(x, tuple | list):
        return [part for value in x for part in parts(value)]
    return [x]


def lead(x: Any) -> Tensor:
    """The first tensor of some inputs: it tells device and number of examples."""
    found = parts(x)
    if not found or not isinstance(found[0], Tensor):
        raise UserError(f"inputs must be a tensor, or a tuple or dict of tensors, got a {type(x).__name__}")
    return found[0]


def mapped(x: I, function: Callable[[Any], Any]) -> I:
    """Inputs of the same kind, with `function` of each tensor."""
    if isinstance(x, Mapping):
        return {name: mapped(value, function) for name, value in x.items()}  # type: ignore[return-value]
    if isinstance(x, tuple | list):
        return tuple(mapped(value, function) for value in x)  # type: ignore[return-value]
    return function(x)  # type: ignore[no-any-return]


def count(x: Any) -> int:
    """The number of examples.

    Raises:
        UserError: no tensors, a tensor without examples' dimension, or tensors of different lengths.
    """
    first = lead(x)
    for part in parts(x):
        if not isinstance(part, Tensor) or part.dim() == 0:
            raise UserError(f"inputs must be tensors [N, ...], got {part!r:.60}")
        if len(part) != len(first):
            raise UserError(f"all input tensors need the same number of examples, got {len(first)} and {len(part)}")
    return len(first)


def rows(x: I, which: Any) -> I:
    """The examples that a slice, a mask or an index tensor chooses."""
    return mapped(x, lambda part: part[which.to(part.device) if isinstance(which, Tensor) else which])


def finite(part: Tensor) -> Tensor:
    """Which examples of a tensor [N, ...] have finite values alone, bool [N]."""
    return part.detach().reshape(len(part), -1).isfinite().all(1)


def joined(found: Sequence[I]) -> I:
    """Inputs [N1, ...], [N2, ...], ... of one kind as one, [N1 + N2 + ..., ...]."""
    first: Any = found[0]
    if isinstance(first, Mapping):
        return {name: joined([one[name] for one in found]) for name in first}  # type: ignore[return-value, index]
    if isinstance(first, tuple):
        return tuple(joined(list(each)) for each in zip(*found, strict=True))  # type: ignore[return-value]
    return torch.cat(list(found))  # type: ignore[return-value]


def shape_of(x: Any) -> Any:
    """The shape of one example: a tuple of numbers, or a tuple or dict of such."""
    return mapped(x, lambda part: tuple(part.shape[1:]))


def form_of(x: Any, *, sizes: bool) -> Any:
    """What two inputs of one network have in common: `shape_of`, or without `sizes` the dimensions and kind of numbers.

    Without sizes it is a text for each part, such as ``float [*, *]``. Batches of sequences have lengths of their own.
    """
    return shape_of(x) if sizes else mapped(x, _dimensions)


def _dimensions(part: Tensor) -> str:
    return f"{'float' if part.is_floating_point() else 'int'} [{', '.join('*' * (part.dim() - 1))}]"


def split(x: I, size: int) -> list[I]:
    """The examples in order, in parts of `size` examples, the last one shorter."""
    if isinstance(x, Tensor):
        return list(x.split(size))
    return [rows(x, slice(first, first + size)) for first in range(0, len(lead(x)), size)]


def call(net: nn.Module, x: Any) -> Any:
    """``net(x)``, for inputs of any kind.

    A dict is passed as keywords where the forward pass has parameters of all its names, else as one argument. A tuple
    is passed as positional arguments where the forward pass takes that many, else as one argument.
    """
    if isinstance(x, Tensor):
        return net(x)
    args, keywords = arguments(net, x)
    return net(*args, **keywords)


def arguments(net: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which `call` calls a network."""
    if isinstance(x, Mapping) and x.keys() <= _signature(net).parameters.keys():
        return (), dict(x)
    if isinstance(x, tuple):
        try:
            _signature(net).bind(*x)
        except TypeError:
            return (x,), {}
        return x, {}
    return (x,), {}


def positional(net: nn.Module, x: Any) -> list[Any]:
    """The same arguments in the order of the forward pass's parameters, defaults filled in."""
    args, keywords = arguments(net, x)
    bound = _signature(net).bind(*args, **keywords)
    bound.apply_defaults()
    return list(bound.arguments.values())


def names_given(net: nn.Module, x: Any) -> set[str]:
    """The names of the forward pass's parameters that such inputs fill; of None, the first one's."""
    args, keywords = ((None,), {}) if x is None else arguments(net, x)
    try:
        return set(_signature(net).bind_partial(*args, **keywords).arguments)
    except TypeError:
        return set()


def _signature(net: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(net.forward)
    except (TypeError, ValueError):
        return inspect.Signature()
