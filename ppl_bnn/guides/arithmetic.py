"""Arithmetic over all the weights of a site: in blocks that stay in the processor's cache, or compiled on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Numbers in a block, for each thread: what an operation writes is still in the cache when the next one reads it, and
# its start costs nothing beside it.
_BLOCK = 1 << 18
_compiled: dict[Callable, Callable] | None = None


def arithmetic(function: Callable) -> Callable:
    """`function`, run block by block, or compiled inside `compiled_arithmetic`.

    `function` works element by element on tensors of one shape, and on scalars: it writes into some of its arguments
    and returns None, or a vector of sums over the elements. It is called with tensors of a site's shape, or of a shape
    that broadcasts to it; the first and all that are written into must be dense and have one memory layout, as
    ``torch.empty_like`` gives it.
    """

    def call(*tensors: Tensor) -> Tensor | None:
        like, size = tensors[0], _BLOCK * torch.get_num_threads()
        if _compiled is None and (like.is_cuda or like.numel() <= size):
            return function(*tensors)  # type: ignore[no-any-return]
        vectors = [tensor if tensor.dim() == 0 < like.dim() else _as_vector(tensor, like) for tensor in tensors]
        if _compiled is not None:
            if function not in _compiled:
                _compiled[function] = torch.compile(function, dynamic=True)
            return _compiled[function](*map(_alone, vectors))  # type: ignore[no-any-return]
        blocks = zip(*([v] * -(-like.numel() // size) if v.dim() == 0 else v.split(size) for v in vectors), strict=True)
        sums = [function(*block) for block in blocks]
        return None if sums[0] is None else torch.stack(sums).sum(0)

    return call


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


def _as_vector(tensor: Tensor, like: Tensor) -> Tensor:
    """All of a tensor in the order of `like`'s memory: a view where it lies there in that order, else a copy."""
    if tensor.shape != like.shape:
        tensor = tensor.expand(like.shape)
    if tensor.stride() != like.stride():
        strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
        if any(own != other for size, own, other in strides if size > 1):
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((like.numel(),), (1,))


def _alone(vector: Tensor) -> Tensor:
    # Not a view: the compiler would look at the shape behind it, and compile anew for each.
    empty = torch.empty(0, dtype=vector.dtype, device=vector.device)
    return empty.set_(vector.untyped_storage(), vector.storage_offset(), vector.shape, vector.stride())  # type: ignore[call-overload,no-any-return]
