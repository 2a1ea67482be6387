"""Where the batches of a training come from: each rank reads its own share, in the order of (seed, epoch)."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_bnn import inputs
from ppl_bnn.data.datasets import raise_if_lost
from ppl_bnn.data.examples import Examples, Labels, Streamed, batches, is_in_order, read_batches
from ppl_bnn.data.parts import Part
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.distributed import Communicator, shard
from ppl_bnn.errors import WorkerLost
from ppl_bnn.inputs import Inputs
from ppl_bnn.native.normals import draw_seed

# Epochs have the indices below it; see `ppl_bnn.inference.data_parallel.rank_seed`.
_TRANSFORMS = 2**48
# Above every example's number.
NO_ROW = 2**62


class _Part(NamedTuple):
    total: int
    rows: Tensor
    share: float
    key: int


class Batch(NamedTuple):
    """A rank's share of a global batch, on the device, not augmented yet.

    Attributes:
        total: number of examples of the global batch.
        rows: numbers of this rank's examples, int64 [B].
        share: weight of their mean in the global batch's (`ppl_bnn.distributed.shard`).
        key: of the examples' random transforms.
        x, y: inputs [B, ...] and labels [B, ...].
    """

    total: int
    rows: Tensor
    share: float
    key: int
    x: Inputs
    y: Tensor

    def forgotten(self) -> "Batch":
        """The batch without its tensors, for `Reader.again`."""
        return self._replace(x=(), y=self.rows)


@dataclass(frozen=True)
class Reader:
    """Reads the batches of a training.

    Attributes:
        batch_size: examples an update, on each rank.
        labels: checks and converts each batch's labels; None where all of them were checked before.
        dtype: see `ppl_bnn.data.examples.read_batches`.
    """

    examples: Examples
    batch_size: int
    seed: int
    ranks: Communicator
    device: torch.device
    labels: Labels | None = None
    dtype: torch.dtype | None = None

    def batches(self, epochs: range, *, skip: int = 0) -> Generator[Batch]:
        """Yield the batches of all these epochs: worker processes start once.

        Args:
            skip: number of examples of the first epoch that are done.
        """
        yield from self._read(self._parts(epochs, skip))

    def again(self, batch: Batch) -> tuple[Inputs, Tensor]:
        """The inputs and labels of a batch, read again if they were forgotten."""
        if not isinstance(batch.x, tuple) or batch.x:
            return batch.x, batch.y
        read = self._read(iter([_Part(*batch[:4])]))
        try:
            return next(read)[4:]
        finally:
            read.close()

    def number_in_whole(self, row: int) -> int:
        """The number by which a user knows example `row`: of a part of some data, its number in all of them."""
        examples = self.examples
        while isinstance(examples, Part):
            row, examples = int(examples.at[row]), examples.whole
        return row

    def _parts(self, epochs: range, skip: int) -> Iterator[_Part]:
        # Where data are read in other processes, row numbers are needed here.
        device = "cpu" if isinstance(self.examples, Streamed) else self.device
        for epoch in epochs:
            key = draw_seed(self.seed, _TRANSFORMS + epoch)
            for rows in batches(
                len(self.examples), self.batch_size * self.ranks.size, epoch=epoch, seed=self.seed, skip=skip,
                device=device, shuffle=not is_in_order(self.examples),
            ):  # fmt: skip
                yield _Part(len(rows), *shard(rows, self.ranks.rank, self.ranks.size), key)
            skip = 0

    def _read(self, parts: Iterator[_Part]) -> Generator[Batch]:
        if is_plain(self.examples) and self.labels is None:
            # All checks are done, and the tensors are where they are needed.
            for part in parts:
                yield Batch(*part, *self.examples.take(part.rows))  # type: ignore[arg-type]
            return
        parts, for_rows, for_keys = tee(parts, 3)
        rows, keys = (part.rows for part in for_rows), (part.key for part in for_keys)
        read = read_batches(self.examples, rows, self.device, dtype=self.dtype, labels=self.labels, key=keys)
        try:
            for (x, y), part in zip(read, parts, strict=False):
                yield Batch(*part, x, y)  # type: ignore[arg-type]
        finally:
            read.close()


def first_not_finite(rows: Tensor, x: Inputs) -> int:
    """The lowest of the example numbers `rows` [B] whose inputs in `x` [B, ...] are NaN or infinite, else `NO_ROW`."""
    bad = [~inputs.finite(part) for part in inputs.parts(x)]
    found = rows.cpu()[torch.stack(bad).any(0).cpu()]
    return int(found.min()) if len(found) else NO_ROW


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Raise WorkerLost where torch finds a worker process gone, which it looks for at any time."""
    try:
        try:
            yield
        except RuntimeError as error:
            raise_if_lost(error)
            raise
    except WorkerLost as error:
        raise WorkerLost(f"{error}. The last checkpoint is good") from None
