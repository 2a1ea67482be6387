"""Arithmetic over all the weights of a site: one pass over memory in C, or what torch makes of it."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ppl_bnn.native.library import library

_SOURCE = Path(__file__).with_name("weights.c")
# Of weights.c: weights of one task.
_CHUNK = 4096

# Numbers in a block, for each thread: what an operation writes is still in the cache when the next one reads it, and
# its start costs nothing beside it.
_BLOCK = 1 << 18
_compiled: dict[Callable, Callable] | None = None


def arithmetic(function: Callable) -> Callable:
    """`function`, by the C function of its name; where that cannot be, block by block, or by torch.compile if asked.

    `function` works element by element on tensors of one shape, and on scalars: it writes into some of its arguments
    and returns None, or a vector of two sums over the elements. It is called with tensors of a site's shape, or of a
    shape that broadcasts to it; the first and all that are written into must be dense and have one memory layout, as
    ``torch.empty_like`` gives it. The C code, compiled at first use, is for float32 on a CPU.
    """

    def call(*tensors: Tensor) -> Tensor | None:
        like, size = tensors[0], _BLOCK * torch.get_num_threads()
        native = None
        if like.dim() and like.is_cpu and all(tensor.dtype == torch.float32 for tensor in tensors):
            native = getattr(library(_SOURCE), function.__name__.lstrip("_"), None)
        if native is None and _compiled is None and (not like.is_cpu or like.numel() <= size):
            return function(*tensors)  # type: ignore[no-any-return]
        vectors = [tensor if tensor.dim() == 0 < like.dim() else _as_vector(tensor, like) for tensor in tensors]
        if native is not None:
            return _run(native, vectors)
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
    """Run arithmetic that is not done in C, as on a GPU, through ``torch.compile`` in this context."""
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield
    finally:
        _compiled = before


def _run(function: Callable, tensors: Sequence[Tensor]) -> Tensor:
    vectors = [tensor for tensor in tensors if tensor.dim()]
    numbers = [float(tensor) for tensor in tensors if not tensor.dim()]
    count = vectors[0].numel()
    sums = vectors[0].new_zeros(-(-count // _CHUNK), 2)
    library(_SOURCE).run(  # type: ignore[union-attr]
        function, ctypes.c_long(torch.get_num_threads()), ctypes.c_long(len(vectors)),
        (ctypes.c_void_p * len(vectors))(*(vector.data_ptr() for vector in vectors)),
        (ctypes.c_float * len(numbers))(*numbers), ctypes.c_long(count), ctypes.c_void_p(sums.data_ptr()),
    )  # fmt: skip
    return sums.sum(0)


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
