"""Operations over all the weights of a site: one pass over memory in C, or what torch makes of them."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.native import expectations, weights
from ppl_bnn.native.library import library

_SOURCE = Path(__file__).with_name("weights.c")
# Of weights.c: weights of one task, and the arguments of `run`.
_CHUNK = 4096
_RUN = (ctypes.c_void_p, *[ctypes.c_long] * 4, *[ctypes.c_void_p] * 2, ctypes.c_long, ctypes.c_void_p)

# Numbers in a block, for each thread: what an operation writes is still in the cache when the next one reads it, and
# its start costs nothing beside it.
_BLOCK = 1 << 18
_compiled: dict[Callable, Callable] | None = None


@dataclass(frozen=True)
class Operation:
    """An operation and its forms: the torch function that defines it, and the C function of weights.c that is faster.

    Its arguments are tensors, then lists of tensors (all lists of one length), then scalars (tensors without a
    dimension, on any device). Tensors have a site's shape, or one that broadcasts to it. The first one and all that
    are written into must be dense and have one memory layout, as ``torch.empty_like`` gives it.

    A call takes the C function for float32 on a CPU; else the reference, block by block, or by torch.compile within
    `compiled_arithmetic`.

    Attributes:
        reference: works element by element, writes into some arguments, and returns None, or sums [2] over elements.
        symbol: name of the C function; None where there is none.
        tensors, lists, scalars: the number of arguments of each kind.
    """

    reference: Callable[..., Any]
    symbol: str | None
    tensors: int
    lists: int = 0
    scalars: int = 0

    def __call__(self, *arguments: Any) -> Any:
        tensors, scalars, length = self._parts(arguments)
        like, size = tensors[0], _BLOCK * torch.get_num_threads()
        native = None
        if self.symbol and like.dim() and like.is_cpu and all(one.dtype == torch.float32 for one in tensors + scalars):
            native = library(_SOURCE, _agrees)
        if native is None and _compiled is None and (not like.is_cpu or like.numel() <= size):
            return self.reference(*arguments)
        vectors = [_as_vector(one, like) for one in tensors]
        if native is not None:
            return self._run(native, vectors, length, scalars)
        if _compiled is not None:
            if self.reference not in _compiled:
                _compiled[self.reference] = torch.compile(self.reference, dynamic=True)
            return _compiled[self.reference](*self._grouped([*map(_alone, vectors)], length), *map(_alone, scalars))
        blocks = zip(*(vector.split(size) for vector in vectors), strict=True)
        sums = [self.reference(*self._grouped(block, length), *scalars) for block in blocks]
        return None if sums[0] is None else torch.stack(sums).sum(0)

    def _parts(self, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
        """The tensors, lists laid end to end behind the others; the scalars; and the length of the lists.

        Raises:
            TypeError: arguments that are not those of the table.
        """
        end = self.tensors + self.lists
        lists, scalars = arguments[self.tensors : end], arguments[end:]
        length = len(lists[0]) if lists else 0
        if len(arguments) != end + self.scalars or any(isinstance(one, Tensor) or len(one) != length for one in lists):
            given = [type(one).__name__ if isinstance(one, Tensor) else f"list of {len(one)}" for one in arguments]
            raise TypeError(
                f"{self.reference.__name__} takes {self.tensors} tensors, {self.lists} lists of one length and "
                f"{self.scalars} scalars, in this order; got {', '.join(given)}"
            )
        return arguments[: self.tensors] + tuple(chain(*lists)), scalars, length

    def _grouped(self, parts: Sequence[Tensor], length: int) -> list[Any]:
        rest = parts[self.tensors :]
        return [*parts[: self.tensors], *(rest[length * i : length * (i + 1)] for i in range(self.lists))]

    def _run(self, native: ctypes.CDLL, vectors: list[Tensor], length: int, scalars: Sequence[Any]) -> Tensor:
        count = vectors[0].numel()
        sums = vectors[0].new_zeros(-(-count // _CHUNK), 2)
        if native.run.argtypes is None:
            native.run.argtypes = _RUN
        native.run(
            getattr(native, self.symbol), torch.get_num_threads(), self.tensors, self.lists, length,  # type: ignore[arg-type]
            (ctypes.c_void_p * len(vectors))(*[vector.data_ptr() for vector in vectors]),
            (ctypes.c_float * len(scalars))(*map(float, scalars)), count, sums.data_ptr(),
        )  # fmt: skip
        return sums.sum(0)


@cache
def scale_mixture(points: int) -> Operation:
    """The operation whose reference has `points` on its grid; `expectations.grid` gives the least for a prior."""
    return Operation(expectations.scale_mixture(points), "scale_mixture", tensors=4, scalars=6)


# All operations by name.
OPERATIONS = {
    "scale": Operation(weights.scale, "scale", tensors=3),
    "scale_gradients": Operation(weights.scale_gradients, "scale_gradients", tensors=5, scalars=2),
    "draw": Operation(weights.draw, "draw", tensors=4),
    "draw_gradients": Operation(weights.draw_gradients, "draw_gradients", tensors=6, scalars=2),
    "flipped": Operation(weights.flipped, "flipped", tensors=3, lists=3),
    "flipped_gradients": Operation(weights.flipped_gradients, "flipped_gradients", tensors=3, lists=3),
    "ivon_step": Operation(weights.ivon_step, "ivon_step", tensors=5, scalars=3),
    "student_t": Operation(expectations.student_t, "student_t", tensors=4, scalars=5),
    "scale_mixture": scale_mixture(44),
}


@contextmanager
def compiled_arithmetic() -> Iterator[None]:
    """Run arithmetic that is not done in C, as on a GPU, through ``torch.compile`` in this context."""
    global _compiled
    before, _compiled = _compiled, {}
    try:
        yield
    finally:
        _compiled = before


def difference(operation: Operation, count: int) -> float:
    """The largest difference of an operation on `count` numbers from its reference, relative to 1 + the number."""
    parts = operation.tensors + 2 * operation.lists
    # Numbers in [-3, 3] without a pattern, that no generator is asked for.
    numbers = torch.frac(torch.arange(1.0, count * parts + 1, dtype=torch.float64, device="cpu") * 0.754877666) * 6 - 3
    drawn = numbers.float().view(count, parts).T.contiguous().unbind()
    scalars = [
        torch.tensor(value, dtype=torch.float32) for value in (0.3, 0.2, 0.9, 0.7, 0.4, 0.4)[: operation.scalars]
    ]
    found, expected = ([*(part.clone() for part in drawn)] for _ in range(2))
    exact = [part.double() for part in expected]
    sums = operation(*operation._grouped(found, 2), *scalars)
    exact_sums = operation.reference(*operation._grouped(exact, 2), *(scalar.double() for scalar in scalars))
    pairs = [*zip(found, exact, strict=True)]
    if exact_sums is not None:
        pairs.append((sums, exact_sums))
    return max(float(((one - other) / (1 + other.abs())).abs().amax()) for one, other in pairs)


def _agrees() -> bool:
    return all(difference(operation, 37) < 1e-5 for operation in OPERATIONS.values())


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
