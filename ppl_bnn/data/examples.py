"""Labelled examples by their numbers, and the order in which a training visits them."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.native.normals import draw_seed


class Examples(Protocol):
    """What a training reads: examples that are known by their number, from 0 to len - 1.

    An implementation says what the examples are. Their order, the ranks' shares and the place to resume from are
    `batches`' and `ppl_bnn.distributed.shard`'s, whatever the implementation.
    """

    def __len__(self) -> int:
        """The number of examples, which is the ELBO's num_data."""
        ...

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, ...] and labels [B, ...] of the examples with the numbers `rows` (int64 [B]), in that order.

        The tensors are on the model's device. The same numbers give the same examples at any time, on any rank.
        """
        ...

    def fingerprint(self) -> str:
        """A text that differs where the examples differ; ranks compare theirs before they train together."""
        ...


@dataclass(frozen=True)
class TensorExamples:
    """Examples in memory: inputs [N, ...] and labels [N, ...], on one device.

    Raises:
        UserError: no examples, or different numbers of inputs and labels.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 0:
            raise UserError(
                f"x and y need the same number of examples, at least 1; got {len(self.x)} and {len(self.y)}"
            )

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The examples with the numbers `rows`; images keep the memory format that all of them have."""
        rows = rows.to(self.x.device)
        x = self.x[rows]
        if self.x.dim() == 4 and self.x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return x, self.y[rows]

    def fingerprint(self) -> str:
        """Shapes, dtypes, and the CRC-32 of all values."""
        crc32 = 0
        for part in (self.x, self.y):
            values = part.detach().cpu().contiguous().view(torch.uint8).reshape(-1)
            crc32 = zlib.crc32(memoryview(values.numpy()), crc32)  # type: ignore[arg-type]
        return f"{list(self.x.shape)} {self.x.dtype} {list(self.y.shape)} {self.y.dtype} {crc32:08x}"


def batches(
    count: int, size: int, *, epoch: int, seed: int, skip: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield an epoch's batches as example numbers, int64 [size], the last one shorter.

    The order depends on (seed, epoch) alone: an epoch that is resumed visits exactly what was left of it, on any number
    of ranks (`ppl_bnn.distributed.shard` divides each batch).

    Args:
        count: number of examples.
        skip: number of examples of this epoch that are done.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(draw_seed(seed, epoch))).to(device)
    yield from order[skip:].split(size) if skip < count else ()
