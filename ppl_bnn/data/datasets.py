"""Examples of a map-style data set, item by item, read ahead by worker processes."""

import logging
import re
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ppl_bnn.data.examples import Batch, each_key
from ppl_bnn.data.fingerprints import of_samples
from ppl_bnn.data.labelled import labelled, tensors
from ppl_bnn.data.own_random import OwnRandom, seed_of
from ppl_bnn.errors import UserError, WorkerLost
from ppl_bnn.inputs import Inputs

log = logging.getLogger(__name__)


@runtime_checkable
class OfFiles(Protocol):
    """A data set of files, which are known without being read."""

    def files_fingerprint(self) -> str:
        """A text that differs where the files do, their times last (`fingerprints.of_labelled_files`)."""
        ...


@dataclass
class DatasetExamples:
    """The items of a data set with ``__len__`` and ``__getitem__``.

    Around each item torch's, numpy's and Python's random generators are seeded by (key, its number), where the key is
    the epoch's. So random transforms depend neither on the number of workers or ranks, nor on where a training was
    resumed.

    Attributes:
        dataset: its items are tuples (the last element is the label), dicts (``"y"`` is) or inputs without a label.
        collate_fn: makes a batch of a list of items; None stacks their parts.
        target: the label's name or position, where it is another.
        num_workers: processes that read items; 0 reads in this process, while the device waits.
        batch_transform: see `ppl_bnn.data.examples.Transformed`.
        batch_size: that of the DataLoader which the data set came in; `fit` uses it.
        loading: further arguments of torch's DataLoader for the workers: ``prefetch_factor``, ``worker_init_fn``.

    Raises:
        UserError: an empty data set.
    """

    dataset: Any
    collate_fn: Callable[[list], Any] | None = None
    target: str | int | None = None
    num_workers: int = 0
    batch_transform: Callable[[Inputs], Inputs] | None = None
    batch_size: int | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._count = len(self.dataset)
        if self._count == 0:
            raise UserError(f"{self._name} is empty: len() is 0, and at least 1 example is needed")

    def __len__(self) -> int:
        return self._count

    def take(self, rows: Tensor) -> Batch:
        """The examples with the numbers `rows`, with the random transforms of key 0."""
        # Not read in this process, if workers read: a file that an item opens would be shared with all of them.
        stream = self._stream([rows], 0, workers=min(self.num_workers, 1))
        try:
            return next(stream)
        finally:
            stream.close()

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """See `ppl_bnn.data.examples.Streamed`; the workers run until the iterator ends or is closed.

        Raises:
            UserError: an item that raises (with its number), items that do not stack, a length that changed.
            WorkerLost: a worker process is gone.
        """
        return self._stream(rows, key, workers=self.num_workers, pin_memory=pin_memory)

    def fingerprint(self) -> str:
        """The class, the length, the CRC-32 of a few items, and what `OfFiles` tell of themselves."""
        files = self.dataset.files_fingerprint() if isinstance(self.dataset, OfFiles) else ""
        return f"{len(self)} items of {self._name}, {of_samples(self)}{files}"

    @property
    def _name(self) -> str:
        return f"the data set {type(self.dataset).__name__}"

    def _stream(
        self, rows: Iterable[Tensor], key: int | Iterable[int], *, workers: int, pin_memory: bool = False
    ) -> Generator[Batch]:
        items = Items(self.dataset, self.collate_fn or default_collate)
        requests = self._requests(rows, key)
        found = _read(items, requests, workers, pin_memory, self.loading)
        try:
            for batch in found:
                if isinstance(batch, Failed):
                    log.debug("%s", batch.where)
                    raise UserError(f"{self._name} {batch.what}")
                yield labelled(tensors(batch), self.target)
        finally:
            found.close()

    def _requests(self, rows: Iterable[Tensor], key: int | Iterable[int]) -> Iterator[tuple[int, list[int]]]:
        for one, own in zip(rows, each_key(key), strict=False):
            if (now := len(self.dataset)) != self._count:
                raise UserError(
                    f"{self._name} had {self._count} items and now has {now}: its length must not change in a training"
                )
            yield own, one.tolist()


@dataclass(frozen=True)
class Failed:
    """What a worker found wrong, in words, and the traceback."""

    what: str
    where: str


class Items(Dataset):
    """Reads requests (key, example numbers) in a worker process, or in this one."""

    def __init__(self, dataset: Any, collate: Callable[[list], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def read(self, request: tuple[int, list[int]]) -> Any:
        """A batch, or `Failed`."""
        key, rows = request
        items = []
        with OwnRandom() as own:
            for row in rows:
                own.seed(seed_of(key, row))
                try:
                    items.append(self.dataset[row])
                except Exception as error:  # noqa: BLE001 -- the data set is the user's
                    return Failed(f"raised at index {row}: {one_line(error)}", traceback.format_exc())
            own.seed(seed_of(key, -1))
            try:
                return self.collate(items)
            except Exception as error:  # noqa: BLE001 -- so is the function
                return Failed(_why_not_one_batch(items, rows, error), traceback.format_exc())

    # torch asks for all items of a batch by this name.
    __getitems__ = read


def one_line(error: BaseException) -> str:
    """An exception's kind and the first line of what it says; of one in a worker process, the exception's own."""
    lines = str(error).strip().splitlines()
    if any(line.startswith("Original Traceback") for line in lines):
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _why_not_one_batch(items: list, rows: list[int], error: Exception) -> str:
    shapes = [_shapes(item) for item in items]
    for row, shape in zip(rows, shapes, strict=True):
        if shape != shapes[0]:
            return (
                f"has items of different shapes, {shapes[0]} at index {rows[0]} and {shape} at index {row}: give a "
                "collate_fn that makes one batch of them (by padding, say)"
            )
    return f"has items that make no batch ({one_line(error)}): give a collate_fn"


def _shapes(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {name: _shapes(value) for name, value in item.items()}
    if isinstance(item, tuple | list):
        return [_shapes(value) for value in item]
    return list(item.shape) if hasattr(item, "shape") else type(item).__name__


def _read(
    items: Items, requests: Iterator, workers: int, pin_memory: bool, loading: Mapping[str, Any]
) -> Generator[Any]:
    if not workers:
        yield from map(items.read, requests)
        return
    loader: Any = DataLoader(
        items, batch_sampler=requests, num_workers=workers, collate_fn=_as_it_is, pin_memory=pin_memory,  # type: ignore[arg-type]
        # Else it draws its seed from the training's generator.
        generator=torch.Generator(), **loading,
    )  # fmt: skip
    iterator = started(loader)
    try:
        while True:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise_if_lost(error)
                raise
    finally:
        shut_down(iterator)


def started(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, which may start worker processes."""
    with warnings.catch_warnings():
        # From Python 3.12 on, of every fork of a process with threads, which torch's always has.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        return iter(loader)


def shut_down(iterator: Any) -> None:
    """End the worker processes of an iterator, if it has any, and close it."""
    # By name: an exception's traceback would keep the iterator, and so the workers, alive.
    end = getattr(iterator, "_shutdown_workers", None) or getattr(iterator, "close", None)
    if end is not None:
        end()


def raise_if_lost(error: Exception) -> None:
    """Raise WorkerLost for an error of a worker process that is gone: torch's, or that of the connection to it."""
    found = re.search(r"DataLoader worker \(pid.*", str(error))
    # What a data set itself raises is not one of these here: it comes with the words of its worker.
    broken = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "Traceback" not in str(error)
    if (found is None and not broken) or isinstance(error, WorkerLost):
        return
    what = found[0].rstrip(". ") if found is not None else one_line(error)
    raise WorkerLost(
        f"a worker process that reads data is gone ({what}): it may have been killed for want of memory; try fewer "
        "workers"
    ) from None


def _as_it_is(batch: Any) -> Any:
    return batch
