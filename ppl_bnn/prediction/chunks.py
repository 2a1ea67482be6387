"""Examples of any kind in chunks: each example is read once, and all draws of a chunk are made together."""

import math
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppl_bnn.data.as_examples import as_examples
from ppl_bnn.data.examples import Batch, Examples, read_batch, read_batches
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.inputs import Inputs, count, joined, mapped, parts, rows, shape_of
from ppl_bnn.models.model import Model
from ppl_bnn.prediction.door import check_inputs
from ppl_bnn.prediction.running import required

# Of a chunk's inputs, and of the parts in which they are read.
CHUNK_ROWS, CHUNK_BYTES = 64_000, 2**27
PART_ROWS, PART_BYTES = 2000, 2**23


class Chunk(NamedTuple):
    """Examples first .. end - 1 of N: inputs [n, ...] and what was observed [n, ...], or None."""

    first: int
    x: Inputs
    y: Any

    @property
    def end(self) -> int:
        """One more than the number of the last example."""
        return self.first + count(self.x)


def whole_or_examples(model: Any, x: Any, y: Any, like: Tensor) -> Chunk | Examples:
    """Tensors in memory as one chunk of all examples, and everything else as `Examples`.

    A tuple or dict of tensors without `y` has its label inside, as `as_examples` has it; but a tuple of as many tensors
    as the network cannot be called without has none.

    Args:
        like: a parameter of the network, whose device and dtype inputs get that are not tensors alone.

    Raises:
        UserError: data that hold no examples.
    """
    net = model.net if isinstance(model, Model) else model
    alone = isinstance(x, tuple) and isinstance(net, nn.Module) and len(required(net)) == len(x)
    if isinstance(x, Tensor) or ((y is not None or alone) and isinstance(x, tuple | dict) and _are_tensors(x)):
        check_inputs(x)
        return Chunk(0, x, y)
    found = as_examples(x, y)
    if is_plain(found):
        x = mapped(found.x, lambda part: part.to(like if part.is_floating_point() else like.device))
        return Chunk(0, x, found.y)
    return found


def chunks_of(
    data: Chunk | Examples, like: Tensor, *, start: int = 0, batch_size: int | None = None
) -> AbstractContextManager[Iterator[Chunk]]:
    """What `in_chunks` gives; of tensors in memory the one chunk."""
    if isinstance(data, Chunk):
        return nullcontext(iter([data]))
    return in_chunks(data, like, start=start, batch_size=batch_size)


@contextmanager
def in_chunks(
    examples: Examples, like: Tensor, *, start: int = 0, batch_size: int | None = None
) -> Iterator[Iterator[Chunk]]:
    """The examples from number `start` on in chunks; the next chunk is read while one is used.

    A chunk has at most 64,000 examples and 128 MiB of inputs, but at least one forward pass. Its size is a multiple of
    `batch_size` (of 2000 unless given), so forward passes are of the same examples as without chunks. The size depends
    on the first examples and on `batch_size` alone. Where the inputs' shape changes from one part that is read to the
    next, as that of sequences padded to a batch's longest may, a chunk ends there.
    """
    stopped = threading.Event()
    reading = _chunks(examples, like, start, batch_size, stopped)
    with ThreadPoolExecutor(1) as thread:

        def ahead(chunk: Chunk | None) -> Iterator[Chunk]:
            while chunk is not None:
                following = thread.submit(next, reading, None)
                yield chunk
                # Not a third one in memory.
                del chunk
                chunk = following.result()

        try:
            # Worker processes start with the first one, in this thread.
            yield ahead(next(reading, None))
        finally:
            # Before the end of what is being read, of which nobody waits for more.
            stopped.set()
            thread.shutdown()
            reading.close()


def _chunks(
    examples: Examples, like: Tensor, start: int, batch_size: int | None, stopped: threading.Event
) -> Generator[Chunk]:
    head = torch.arange(start, min(start + 2, len(examples)))
    x, y = read_batch(examples, head, like.device, dtype=like.dtype)
    first, size, held = start, _chunk_size(x, batch_size), [(x, y)]
    numbers = _parts(examples, x, start + count(x))
    with closing(read_batches(examples, numbers, like.device, dtype=like.dtype)) as reading:
        for part in reading:
            if stopped.is_set():
                return
            if shape_of(part[0]) != shape_of(held[0][0]):
                chunk, held = _joined(first, held), []
                first = chunk.end
                yield chunk
            held.append(part)
            while _rows(held) > size:
                x, y = held.pop()
                here = size - _rows(held)
                chunk = _joined(first, [*held, (rows(x, slice(here)), None if y is None else y[:here])])
                first, held = chunk.end, [(rows(x, slice(here, None)), None if y is None else y[here:])]
                yield chunk
    yield _joined(first, held)


def _parts(examples: Examples, x: Inputs, start: int) -> Iterator[Tensor]:
    """The numbers of examples that are read together: a DataLoader's batches, else as many as are 8 MiB of inputs."""
    size = getattr(examples, "batch_size", None) or _at_most(PART_BYTES, PART_ROWS, x)
    for first in range(start, len(examples), size):
        yield torch.arange(first, min(first + size, len(examples)))


def _chunk_size(x: Inputs, batch_size: int | None) -> int:
    size = _at_most(CHUNK_BYTES, CHUNK_ROWS, x)
    # A network with convolutions takes 200 examples a forward pass on a CPU, others 2000 (`draws.default_batch`).
    multiple = batch_size or (2000 if size >= 2000 else 200)
    return max(1, size // multiple) * multiple


def _at_most(limit: int, most: int, x: Inputs) -> int:
    each = sum(part.element_size() * math.prod(part.shape[1:]) for part in parts(x))
    return max(1, min(most, limit // max(1, each)))


def _rows(held: list[Batch]) -> int:
    return sum(count(x) for x, _ in held)


def _joined(first: int, held: list[Batch]) -> Chunk:
    y = [y for _, y in held if y is not None]
    return Chunk(first, joined([x for x, _ in held]), torch.cat(y) if y else None)


def _are_tensors(x: Any) -> bool:
    return all(isinstance(part, Tensor) for part in parts(x))
