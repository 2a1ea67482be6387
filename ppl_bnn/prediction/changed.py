"""Examples with their inputs changed, or some of them in another order, while they are read."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.data.examples import Batch, Examples, Streamed, Transformed, is_in_order
from ppl_bnn.inputs import Inputs
from ppl_bnn.prediction.shifts import Shift, applied

IN_MEMORY = (Tensor, tuple, dict)


def changed(x: Inputs | Examples, shift: Shift, severity: float) -> Any:
    """Shifted inputs; of examples, such that are shifted while they are read."""
    if isinstance(x, IN_MEMORY):
        return applied(shift, x, severity)
    return Changed(x, lambda inputs, rows: applied(shift, inputs, severity, rows))


class Changed:
    """Examples for `predict`, made of others without a copy.

    Args:
        examples: what is read. Its own transform of a batch, if it has one, comes before the change.
        change: from inputs [B, ...] and the examples' numbers [B] to inputs.
        positions: the examples' numbers in their new order, [M] (default: all as they are).
        labelled: False leaves the labels out.
    """

    def __init__(
        self,
        examples: Examples,
        change: Callable[[Inputs, Tensor], Inputs] = lambda x, rows: x,
        *,
        positions: Tensor | None = None,
        labelled: bool = True,
    ) -> None:
        self.examples, self.change, self.labelled = examples, change, labelled
        self.positions = torch.arange(len(examples)) if positions is None else positions
        self.in_order = is_in_order(examples)
        # A DataLoader's: what is read together.
        self.batch_size = getattr(examples, "batch_size", None)

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: Tensor) -> Batch:
        """Changed inputs and labels of the examples at these positions [B]."""
        numbers = self.positions[rows.cpu()]
        return self._changed(self.examples.take(numbers), numbers)

    def stream(
        self, rows: Iterable[Tensor], *, key: int | Iterable[int] = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """The same batch after batch, read ahead where the examples can do that."""
        if not isinstance(self.examples, Streamed):
            yield from map(self.take, rows)
            return
        asked: list[Tensor] = []

        def noted() -> Iterator[Tensor]:
            for one in rows:
                asked.append(self.positions[one.cpu()])
                yield asked[-1]

        found = self.examples.stream(noted(), key=key, pin_memory=pin_memory)
        try:
            for batch in found:
                yield self._changed(batch, asked.pop(0))
        finally:
            if hasattr(found, "close"):
                found.close()

    def fingerprint(self) -> str:
        """That of the examples it is made of."""
        return self.examples.fingerprint()

    def _changed(self, batch: Batch, numbers: Tensor) -> Batch:
        x, y = batch
        if isinstance(self.examples, Transformed) and self.examples.batch_transform is not None:
            x = self.examples.batch_transform(x)
        return self.change(x, numbers), y if self.labelled else None
