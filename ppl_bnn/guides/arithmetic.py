"""Arithmetic over all the weights of a site, compiled on request: one pass over memory where torch takes ten."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_compiled: dict[Callable, Callable] | None = None


def arithmetic(function: Callable) -> Callable:
    """`function` as it stands, or compiled inside `compiled_arithmetic`.

    `function` takes tensors (the first of the site's shape, the others of a shape that broadcasts to it, scalars, or
    None), works on them element by element, and returns such tensors or their sums. One that it changes in place must
    have the first one's memory layout.
    """
    if _compiled is None:
        return function
    if function not in _compiled:
        _compiled[function] = _compile(function)
    return _compiled[function]


@contextmanager
def compiled_arithmetic() -> Iterator[None]:
    """Run the weights' arithmetic through ``torch.compile`` in this context.

    It needs a C++ compiler, and half a minute at the first step.
    """
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield
    finally:
        _compiled = before


def _compile(function: Callable) -> Callable:
    compiled = torch.compile(function, dynamic=True)

    def call(*tensors: Tensor | None) -> Any:
        # As vectors all sites share one compiled function; a shape of its own would make the compiler start again.
        like = tensors[0]
        assert like is not None
        found = compiled(*(_as_vector(tensor, like) for tensor in tensors))
        if isinstance(found, tuple):
            return tuple(_as(part, like) for part in found)
        return None if found is None else _as(found, like)

    return call


def _as(found: Tensor, like: Tensor) -> Tensor:
    return found.as_strided(like.shape, like.stride()) if found.dim() else found


def _as_vector(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    if tensor is None or tensor.dim() == 0:
        return None if tensor is None else tensor.detach()
    tensor = tensor.expand(like.shape)
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if any(own != other for size, own, other in strides if size > 1):
        own_layout = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = own_layout.copy_(tensor)
    # Not a view: the compiler would look at the shape behind it, and compile anew for each.
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,))  # type: ignore[call-overload]
