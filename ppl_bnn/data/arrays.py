"""Examples in arrays that stay in their files, read row by row: memory-mapped ones, and those of h5py."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.data.examples import Batch
from ppl_bnn.data.fingerprints import of_files, of_samples
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, mapped, parts
from ppl_bnn.native.rows import MappedRows

# Batches that are read before they are asked for.
_AHEAD = 2


@dataclass
class ArrayExamples:
    """Rows of arrays [N, ...] that need not be in memory.

    Attributes:
        x: an array, or a tuple or dict of arrays: ``np.memmap``, an h5py data set, or whatever has ``shape``, ``dtype``
            and gives row i as ``array[i]``. Arrays and tensors in memory may be among them.
        y: labels, likewise; None where there are none.
        batch_transform: see `ppl_bnn.data.examples.Transformed`.

    Raises:
        UserError: no examples, or arrays of different lengths.
    """

    x: Any
    y: Any = None
    batch_transform: Callable[[Inputs], Inputs] | None = None

    def __post_init__(self) -> None:
        lengths = {len(part) if len(part.shape) else 0 for part in self._arrays}
        if len(lengths) > 1 or 0 in lengths:
            found = " and ".join(map(str, sorted(lengths)))
            raise UserError(f"x and y need the same number of examples, at least 1; got {found}")
        self._mapped = {id(part): MappedRows(part) for part in self._arrays if _is_mapped(part)}

    def __len__(self) -> int:
        return len(self._arrays[0])

    def take(self, rows: Tensor) -> Batch:
        """The rows with the numbers `rows`, copied into memory."""
        places = rows.cpu().numpy()
        return mapped(self.x, lambda part: self._read(part, places)), (
            None if self.y is None else self._read(self.y, places)
        )

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """See `ppl_bnn.data.examples.Streamed`; a thread reads."""
        with ThreadPoolExecutor(1) as thread:
            waiting: deque[Future[Batch]] = deque()
            for one in rows:
                waiting.append(thread.submit(self.take, one))
                if len(waiting) > _AHEAD:
                    yield _pinned(waiting.popleft().result(), pin_memory)
            while waiting:
                yield _pinned(waiting.popleft().result(), pin_memory)

    def fingerprint(self) -> str:
        """Length, shapes and dtypes, the CRC-32 of a few rows, and sizes and times of the files."""
        return f"{len(self)} rows of {of_samples(self)}{of_files(_files(self._arrays))}"

    @property
    def _arrays(self) -> list[Any]:
        return parts((self.x, *([] if self.y is None else [self.y])))

    def _read(self, part: Any, rows: np.ndarray) -> Tensor:
        if isinstance(part, Tensor):
            return part[torch.from_numpy(rows).to(part.device)]
        if id(part) in self._mapped:
            found = self._mapped[id(part)].take(rows)
        elif isinstance(part, np.ndarray):
            found = part[rows]
        else:
            # In the order in which they lie in the file, each once.
            own, where = np.unique(rows, return_inverse=True)
            found = np.stack([np.asarray(part[int(row)]) for row in own])[where]
        return tensor_of(found)


def is_array(value: Any) -> bool:
    """Whether a value is an array that `ArrayExamples` reads."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__")) and not hasattr(value, "to_numpy")


def tensor_of(found: np.ndarray) -> Tensor:
    """An array as a tensor, in the same memory where torch knows its byte order and strides.

    Raises:
        UserError: an array of something else than numbers.
    """
    try:
        return torch.from_numpy(np.ascontiguousarray(found, found.dtype.newbyteorder("=")))
    except TypeError:
        raise UserError(f"an array of the examples has dtype {found.dtype}; torch needs numbers: convert it") from None


def _is_mapped(part: Any) -> bool:
    return isinstance(part, np.memmap) and getattr(part, "_mmap", None) is not None


def _pinned(found: Batch, pin_memory: bool) -> Batch:
    if not pin_memory:
        return found
    x, y = found
    return mapped(x, lambda part: part.pin_memory()), None if y is None else y.pin_memory()


def _files(arrays: list[Any]) -> list[Any]:
    found: dict[str, None] = {}
    for part in arrays:
        name = part.filename if _is_mapped(part) else getattr(getattr(part, "file", None), "filename", None)
        if name is not None:
            found[str(name)] = None
    return list(found)
