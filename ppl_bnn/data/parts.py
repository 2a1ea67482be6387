"""Some rows of examples, and which rows are for training and which for testing."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_bnn.data.examples import Batch, Examples, Streamed, Transformed, is_in_order
from ppl_bnn.data.fingerprints import crc32_of
from ppl_bnn.data.settings import TEST_FRACTION
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the examples of others.

    Attributes:
        whole: the examples.
        at: int64 [N], the numbers of those that belong to it.
    """

    whole: Examples
    at: Tensor

    def __len__(self) -> int:
        return len(self.at)

    @property
    def batch_transform(self) -> Callable[[Inputs], Inputs] | None:
        """That of the whole."""
        return self.whole.batch_transform if isinstance(self.whole, Transformed) else None

    @property
    def in_order(self) -> bool:
        """Whether the whole can only be read from the first to the last."""
        return is_in_order(self.whole)

    def take(self, rows: Tensor) -> Batch:
        """The examples with the numbers `rows` of this part."""
        return self.whole.take(self.at[rows.cpu()])

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """See `ppl_bnn.data.examples.Streamed`; read ahead as the whole is."""
        own = (self.at[one.cpu()] for one in rows)
        if not isinstance(self.whole, Streamed):
            return map(self.whole.take, own)
        return self.whole.stream(own, key=key, pin_memory=pin_memory)

    def fingerprint(self) -> str:
        """The fingerprint of the whole, and the CRC-32 of the numbers of this part."""
        return f"{self.whole.fingerprint()}; {len(self.at)} of them, {crc32_of([self.at])}"


def split_rows(count: int, fraction: float | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the training rows and of the test rows, by a permutation that depends on `count` alone.

    Raises:
        UserError: too few rows for both.
    """
    fraction = TEST_FRACTION if fraction is None else fraction
    num_test = max(1, round(fraction * count))
    if num_test >= count:
        raise UserError(
            f"data.test_fraction {fraction:g} of {count} rows leaves none to train on: give more rows, or a smaller one"
        )
    order = np.random.default_rng(0).permutation(count)
    return order[num_test:], order[:num_test]
