"""Examples of an iterable data set, which can only be read from the first to the last."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ppl_bnn.data.datasets import one_line, raise_if_lost, shut_down, started
from ppl_bnn.data.examples import Batch, each_key
from ppl_bnn.data.labelled import labelled, tensors
from ppl_bnn.data.own_random import OwnRandom
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, count, joined
from ppl_bnn.inputs import rows as rows_of

# Examples that are read together. Worker processes take turns, so the order of a pass depends on it.
_TOGETHER = 32


@dataclass
class IterableExamples:
    """Examples of an iterable, or of a DataLoader in its own order.

    Each pass must give `length` examples. Example k is the k-th of a pass: the same one each time only if the iterable
    repeats itself. torch's, numpy's and Python's random generators are seeded for each pass.

    Attributes:
        source: an iterable of examples, or a DataLoader, whose batches are cut and joined to those asked for.
        length: number of examples of a pass.
        collate_fn, num_workers: for an iterable of examples, as in `ppl_bnn.data.datasets.DatasetExamples`.
        target: the label's name or position, where it is no tuple's last element and no dict's ``"y"``.
        batch_transform: see `ppl_bnn.data.examples.Transformed`.
    """

    source: Iterable[Any]
    length: int
    collate_fn: Callable[[list], Any] | None = None
    target: str | int | None = None
    num_workers: int = 0
    batch_transform: Callable[[Inputs], Inputs] | None = None

    in_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length must be at least 1, the number of examples of a pass; got {self.length}")

    def __len__(self) -> int:
        return self.length

    @property
    def batch_size(self) -> int | None:
        """That of the DataLoader, which `fit` uses."""
        return self.source.batch_size if isinstance(self.source, DataLoader) else None

    def take(self, rows: Tensor) -> Batch:
        """The examples with the numbers `rows`, found by reading from the start of a pass."""
        order = rows.cpu().unique()
        one = _Pass(self, 0)
        try:
            x, y = one.read(order)
        finally:
            one.close()
        where = torch.searchsorted(order, rows.cpu().contiguous())
        return rows_of(x, where), None if y is None else y[where]

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """See `ppl_bnn.data.examples.Streamed`. Rows ascend; where they do not, another pass begins.

        Raises:
            UserError: the iterable raises, or a pass has fewer or more examples than `length`.
            WorkerLost: a worker process is gone.
        """
        current: _Pass | None = None
        try:
            for one, own in zip(rows, each_key(key), strict=False):
                if current is None or int(one[0]) < current.next_row:
                    if current is not None:
                        current.close()
                    current = _Pass(self, own)
                yield current.read(one.cpu())
        finally:
            if current is not None:
                current.close()

    def fingerprint(self) -> str:
        """The class and the length: examples may differ from pass to pass."""
        return f"{self.length} examples of {self.name}"

    @property
    def name(self) -> str:
        """What is iterated over, for messages."""
        return f"the iterable {type(getattr(self.source, 'dataset', self.source)).__name__}"


class _Items(IterableDataset):
    """An iterable that is no IterableDataset, as torch's DataLoader takes it."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)


class _Pass:
    """One pass, from the first example on."""

    def __init__(self, examples: IterableExamples, seed: int) -> None:
        self.examples, self._seen, self.next_row = examples, 0, 0
        self._held: tuple[int, Any, Any] | None = None
        self._own = OwnRandom(seed)
        loader: Any = examples.source
        if not isinstance(loader, DataLoader):
            items: Any = loader if isinstance(loader, IterableDataset) else _Items(loader)
            loader = DataLoader(items, _TOGETHER, num_workers=examples.num_workers, collate_fn=examples.collate_fn)
        self._by_workers = loader.num_workers > 0
        with self._own:
            self._batches = started(loader)

    def read(self, rows: Tensor) -> Batch:
        """The examples with ascending numbers, on the CPU; those before and between are skipped."""
        last, found = int(rows[-1]), []
        while True:
            if self._held is not None:
                start, x, y = self._held
                mine = rows[(rows >= start) & (rows < self._seen)] - start
                if len(mine):
                    found.append((rows_of(x, mine), None if y is None else y[mine]))
            if self._seen > last:
                break
            self._held = self._read_next()
        self.next_row = last + 1
        if self.next_row == len(self.examples) and self._ask() is not None:
            self._too_many()
        if len(found) == 1:
            return found[0]
        return _joined([x for x, _ in found]), None if found[0][1] is None else _joined([y for _, y in found])

    def close(self) -> None:
        """End the worker processes of this pass."""
        shut_down(self._batches)

    def _read_next(self) -> tuple[int, Any, Any]:
        start, length = self._seen, len(self.examples)
        batch = self._ask()
        if batch is None:
            raise UserError(f"{self.examples.name} ended after {start} examples; length= says that it has {length}")
        x, y = labelled(tensors(batch), self.examples.target)
        self._seen += count(x)
        if self._seen > length:
            self._too_many()
        return start, x, y

    def _too_many(self) -> None:
        raise UserError(
            f"{self.examples.name} has more than the {len(self.examples)} examples that length= says: give their "
            "number, cut an endless one (itertools.islice), or divide it between the worker processes "
            "(torch.utils.data.get_worker_info)"
        )

    def _ask(self) -> Any:
        with self._own:
            try:
                return next(self._batches, None)
            except Exception as error:
                if self._by_workers:
                    raise_if_lost(error)
                raise UserError(
                    f"{self.examples.name} raised after {self._seen} examples: {one_line(error)}"
                ) from error


def _joined(found: list[Any]) -> Any:
    try:
        return joined(found)
    except RuntimeError as error:
        raise UserError(
            f"batches of the iterable cannot be joined to the one that a step needs ({one_line(error)}): give a "
            "DataLoader of it with fit's batch_size"
        ) from None
