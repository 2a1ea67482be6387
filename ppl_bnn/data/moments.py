"""Standardization of a table that is too large for the memory, by one pass over the training rows."""

import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_bnn.errors import UserError, some

# Rows that are read at a time.
_ROWS = 65_536

log = logging.getLogger(__name__)


@dataclass
class Standardized:
    """A function of a batch of rows [B, D]: some of the columns, with mean 0 and standard deviation 1.

    Attributes:
        kept: int64 [K], the columns that are kept.
        loc: float64 [K], what is subtracted.
        scale: float64 [K], by what it is divided.
    """

    kept: Tensor
    loc: Tensor
    scale: Tensor

    def __call__(self, x: Any) -> Tensor:
        """Rows [B, D] -> float32 [B, K], on the device of x."""
        if self.kept.device != x.device:
            self.kept, self.loc, self.scale = (part.to(x.device) for part in (self.kept, self.loc, self.scale))
        return ((x[:, self.kept].double() - self.loc) / self.scale).float()


def standardized_columns(
    parts: Sequence[Any], known: NDArray[np.int64], *, name: str, where: Callable[[int], str]
) -> Standardized:
    """The function that standardizes rows by the rows `known`; columns that are constant there are left out.

    Mean and variance are merged chunk by chunk (Chan, Golub and LeVeque 1979).

    Args:
        parts: arrays [N, D], whose rows are counted over all of them.
        known: numbers of rows.
        name: of the array, for messages.
        where: what a message calls the row of a number.

    Raises:
        UserError: a value that is not finite, or no column that varies.
    """
    chosen = np.zeros(sum(len(part) for part in parts), bool)
    chosen[known] = True
    count, start = 0, 0
    loc = total = np.zeros(parts[0].shape[1])
    low, high = np.full(len(loc), np.inf), np.full(len(loc), -np.inf)
    for part in parts:
        for first in range(0, len(part), _ROWS):
            rows = np.asarray(part[first : first + _ROWS], np.float64)
            if not (finite := np.isfinite(rows).all(1)).all():
                at = start + first + int((~finite).argmax())
                raise UserError(f"the array {name!r} has NaN or infinity in {where(at)}: correct it")
            rows = rows[chosen[start + first : start + first + len(rows)]]
            if not len(rows):
                continue
            own = rows.mean(0)
            step, more = own - loc, len(rows)
            total = total + ((rows - own) ** 2).sum(0) + step**2 * (count * more / (count + more))
            loc, count = loc + step * (more / (count + more)), count + more
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
            if isinstance(part, np.memmap):
                # The pages that were read would stay in this process's memory.
                part._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        start += len(part)
    varies = high > low
    if not varies.any():
        raise UserError(f"no column of the array {name!r} varies in the training rows")
    if not varies.all():
        constant = [f"{name}{at}" for at in np.flatnonzero(~varies)]
        log.info("data: left out, the same in all training rows: %s", some(constant))
    kept = np.flatnonzero(varies)
    return Standardized(*(torch.from_numpy(part) for part in (kept, loc[kept], np.sqrt(total[kept] / count))))
