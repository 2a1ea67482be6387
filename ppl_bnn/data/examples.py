"""Labelled examples by their numbers: the contract, the order in which a training visits them, how they are read."""

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import repeat
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, count, mapped
from ppl_bnn.native.normals import draw_seed

Batch = tuple[Inputs, Tensor | None]
# Checks labels [B, ...] and converts them to what a likelihood takes, or raises UserError.
Labels = Callable[[Tensor], Tensor]


class Examples(Protocol):
    """What a training reads: examples that are known by their number, from 0 to len - 1.

    An implementation says what the examples are. Their order, the ranks' shares and the place to resume from are
    `batches`' and `ppl_bnn.distributed.shard`'s, whatever the implementation.
    """

    def __len__(self) -> int:
        """The number of examples, which is the ELBO's num_data."""
        ...

    def take(self, rows: Tensor) -> Batch:
        """Inputs [B, ...] and labels [B, ...] of the examples with the numbers `rows` (int64 [B]), in that order.

        The tensors are on the CPU or on the model's device; labels are None where there are none. The same numbers give
        the same examples at any time, on any rank.
        """
        ...

    def fingerprint(self) -> str:
        """A text that differs where the examples differ, as far as can be told without reading all of them."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """Examples that are read ahead while the device computes."""

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """Yield what `take` gives for each of `rows`, in that order. Closing the iterator ends worker processes.

        Args:
            rows: batches of example numbers, int64 [B] each; they are asked for ahead of time.
            key: of all batches, or of each. An example's random transforms are drawn by (key, its number) alone.
            pin_memory: the tensors go to an accelerator.
        """
        ...


@runtime_checkable
class Transformed(Protocol):
    """Examples whose inputs are transformed batch by batch on the model's device, in training and in prediction."""

    batch_transform: Callable[[Inputs], Inputs] | None


@runtime_checkable
class InOrder(Protocol):
    """Examples that can be read in one order only: a training visits them in that order."""

    in_order: bool


def is_in_order(examples: Examples) -> bool:
    """Whether examples can only be read from the first to the last."""
    return isinstance(examples, InOrder) and examples.in_order


def batches(
    count: int, size: int, *, epoch: int, seed: int, skip: int = 0, device: torch.device | str = "cpu",
    shuffle: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield an epoch's batches as example numbers, int64 [size], the last one shorter.

    The order depends on (seed, epoch) alone: an epoch that is resumed visits exactly what was left of it, on any number
    of ranks (`ppl_bnn.distributed.shard` divides each batch).

    Args:
        count: number of examples.
        skip: number of examples of this epoch that are done.
        shuffle: False is the order 0, 1, 2, ...
    """
    if shuffle:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(draw_seed(seed, epoch))).to(device)
    else:
        order = torch.arange(count, device=device)
    yield from order[skip:].split(size) if skip < count else ()


def read_batch(
    examples: Examples, rows: Tensor, device: torch.device | str, *, dtype: torch.dtype | None = None,
    labels: Labels | None = None,
) -> Batch:  # fmt: skip
    """The examples with the numbers `rows` (int64 [B]) on `device`, transformed; arguments as in `read_batches`."""
    return _prepared(examples, rows, examples.take(rows), device, dtype, labels)


def read_batches(
    examples: Examples, rows: Iterable[Tensor], device: torch.device | str, *, dtype: torch.dtype | None = None,
    labels: Labels | None = None,
    key: int | Iterable[int] = 0,
) -> Generator[Batch]:  # fmt: skip
    """Yield inputs and labels on `device`, batch after batch, read ahead where the examples are `Streamed`.

    Integer inputs, such as pixels in uint8, move as they are. Then the examples' own transform runs on the device.

    Args:
        rows: example numbers, int64 [B] each.
        dtype: floating-point inputs are converted to it, after the transform; None leaves them.
        labels: checks and converts each batch's labels; None leaves them.
        key: see `Streamed.stream`.

    Raises:
        UserError: a batch that is not as long as its rows, before or after its transform; labels that are missing or
            wrong, with the example's number.
    """
    if not isinstance(examples, Streamed):
        yield from (read_batch(examples, one, device, dtype=dtype, labels=labels) for one in rows)
        return
    asked: list[Tensor] = []

    def noted() -> Iterator[Tensor]:
        for one in rows:
            asked.append(one)
            yield one

    stream = examples.stream(noted(), key=key, pin_memory=torch.device(device).type != "cpu")
    try:
        for found in stream:
            yield _prepared(examples, asked.pop(0), found, device, dtype, labels)
    finally:
        if hasattr(stream, "close"):
            stream.close()


def each_key(key: int | Iterable[int]) -> Iterator[int]:
    """The key of each batch of a stream."""
    return repeat(key) if isinstance(key, int) else iter(key)


def _prepared(
    examples: Examples, rows: Tensor, found: Batch, device: torch.device | str, dtype: torch.dtype | None,
    labels: Labels | None,
) -> Batch:  # fmt: skip
    x, y = found
    numbers = count(x), len(rows) if y is None else len(y) if y.dim() else 0, len(rows)
    if len(set(numbers)) > 1:
        raise UserError(
            f"{type(examples).__name__} gave {numbers[0]} inputs and {numbers[1]} labels for {numbers[2]} examples: "
            "a batch must have a row for each example asked for"
        )
    if labels is not None:
        y = _checked(labels, y, rows)
    x = mapped(x, lambda part: part.to(device, non_blocking=True))
    if isinstance(examples, Transformed) and examples.batch_transform is not None:
        x = examples.batch_transform(x)
        if count(x) != len(rows):
            raise UserError(f"the transform of a batch gave {count(x)} inputs for {len(rows)} examples: one for each")
    if dtype is not None:
        x = mapped(x, lambda part: part.to(dtype) if part.is_floating_point() else part)
    return x, None if y is None else y.to(device, non_blocking=True)


def _checked(labels: Labels, y: Tensor | None, rows: Tensor) -> Tensor:
    if y is None:
        raise UserError(
            "the examples have no labels: give each as a tuple (x, y) or a dict with a 'y', or say which part is the "
            "label: as_examples(data, target=...)"
        )
    try:
        return labels(y)
    except UserError:
        for place, row in enumerate(rows.tolist()):
            try:
                labels(y[place : place + 1])
            except UserError as error:
                raise UserError(f"example {row}: {error}") from None
        raise
