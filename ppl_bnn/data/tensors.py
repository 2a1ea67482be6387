"""Examples that are tensors in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from ppl_bnn.data.examples import Batch
from ppl_bnn.data.fingerprints import crc32_of
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, count, mapped, parts


@dataclass(frozen=True)
class TensorExamples:
    """Examples in memory, on one device.

    Attributes:
        x: inputs [N, ...]: a tensor, or a tuple or dict of tensors.
        y: labels [N, ...]; None where there are none.
        batch_transform: see `ppl_bnn.data.examples.Transformed`.
        batch_size: that of the DataLoader which the tensors came in; `fit` uses it.

    Raises:
        UserError: no examples, or different numbers of inputs and labels.
    """

    x: Inputs
    y: Tensor | None = None
    batch_transform: Callable[[Inputs], Inputs] | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        inputs = count(self.x)
        labels = inputs if self.y is None else len(self.y) if self.y.dim() else 0
        if inputs != labels or inputs == 0:
            raise UserError(f"x and y need the same number of examples, at least 1; got {inputs} and {labels}")

    def __len__(self) -> int:
        return count(self.x)

    def take(self, rows: Tensor) -> Batch:
        """The examples with the numbers `rows`; images keep the memory format that all of them have."""
        x = _rows(self.x, rows) if isinstance(self.x, Tensor) else mapped(self.x, lambda part: _rows(part, rows))
        return x, None if self.y is None else _rows(self.y, rows)

    def fingerprint(self) -> str:
        """Shapes, dtypes, and the CRC-32 of all values."""
        every = parts((self.x, *([] if self.y is None else [self.y])))
        return f"{' '.join(f'{list(part.shape)} {part.dtype}' for part in every)} {crc32_of(every)}"


def is_plain(examples: object) -> TypeGuard[TensorExamples]:
    """Whether examples are tensors in memory that nothing is done to when they are read."""
    return isinstance(examples, TensorExamples) and examples.batch_transform is None


def _rows(part: Tensor, rows: Tensor) -> Tensor:
    found = part[rows.to(part.device)]
    if part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last):
        found = found.contiguous(memory_format=torch.channels_last)
    return found
