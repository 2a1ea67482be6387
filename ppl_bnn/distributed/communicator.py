"""How ranks communicate: three primitives that a backend implements, and everything else in terms of them."""

import json
import time
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError


class RankLost(RuntimeError):
    """Another rank is gone, so no collective call can complete any more."""


@dataclass
class Calls:
    """Calls of one kind: their number, the bytes that this rank sent, and the seconds that it waited for them.

    A message that travels while a rank computes costs the rank no time. Waiting for a slower rank does.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Communicator(ABC):
    """The ranks of one training. Every method is collective: all ranks call it, in the same order.

    A backend implements `_start_sum`, `_broadcast` and `shutdown`. Results are bitwise the same on every rank, so ranks
    that decide by them decide alike. If a rank is gone, every call raises RankLost.

    Attributes:
        name: name of the backend.
        rank, size: this process's number, from 0, and the number of ranks.
        local_rank, local_size: the same among the ranks on this host.
        calls: calls since the last ``calls.clear()``, by kind: ``gradients`` (the allreduce of a bucket), ``step`` (the
            small message of a step), ``batch norm`` (the averaging of its statistics), ``broadcast`` (a tensor) and
            ``other`` (small messages at the start and at checkpoints).
    """

    name: str

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.calls: defaultdict[str, Calls] = defaultdict(Calls)

    @abstractmethod
    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Start to add a contiguous tensor over the ranks, in place. Return a function that waits for the sum."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with that of rank 0."""

    @abstractmethod
    def shutdown(self) -> None:
        """Leave the ranks. This rank takes part in no call afterwards."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes, logs and shows progress."""
        return self.rank == 0

    def start_sum(self, tensor: Tensor, name: str, *, kind: str = "other") -> Callable[[], None]:
        """Start to add a contiguous tensor over the ranks, in place. Return a function that waits for the sum.

        Sums that run at the same time need different names. The names are the same on all ranks.
        """
        with self._counted(kind, tensor):
            wait = self._start_sum(tensor, name)

        def counted_wait() -> None:
            started = time.perf_counter()
            wait()
            self.calls[kind].seconds += time.perf_counter() - started

        return counted_wait

    @contextmanager
    def _counted(self, kind: str, tensor: Tensor) -> Iterator[None]:
        calls = self.calls[kind]
        calls.count += 1
        calls.bytes += tensor.numel() * tensor.element_size()
        started = time.perf_counter()
        yield
        calls.seconds += time.perf_counter() - started

    def sum(self, *values: float, kind: str = "other") -> list[float]:
        """Add numbers over the ranks, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        self.start_sum(total, f"numbers-{len(values)}", kind=kind)()
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.sum(0.0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Context manager: rank 0 finishes the block before the other ranks start it."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of any dtype and memory layout with those of rank 0, which have the same shapes."""
        if self.size > 1:
            for tensor in (tensor for tensor in tensors if tensor.numel()):
                # A copy in the order of the indices, because the memory layout may differ from rank to rank.
                flat = tensor.detach().reshape(-1).contiguous().clone()
                with self._counted("broadcast", flat):
                    self._broadcast(flat.view(torch.uint8))
                with torch.no_grad():
                    tensor.copy_(flat.view(tensor.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors [...] of all ranks, of one shape and dtype, to [size, ...]."""
        # Some backends cannot add bytes.
        kind = tensor.dtype if tensor.is_floating_point() else torch.int64
        rows = torch.zeros(self.size, *tensor.shape, dtype=kind, device=tensor.device)
        rows[self.rank] = tensor
        if self.size > 1:
            self.start_sum(rows, f"rows-{kind}-{rows.numel()}")()
        return rows.to(tensor.dtype)

    def share(self, content: Any, *, root: int = 0) -> Any:
        """Return the content of rank `root` on every rank. It must be serializable as JSON."""
        if self.size == 1:
            return content
        text = json.dumps(content).encode() if self.rank == root else b""
        codes = torch.zeros(int(self.sum(len(text))[0]), dtype=torch.int32)
        if text:
            codes.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        # The other ranks add zeros.
        self.start_sum(codes, f"text-{codes.numel()}")()
        return json.loads(bytes(codes.tolist()))

    def check_same(self, what: str, parts: Sequence[bytes | memoryview]) -> None:
        """Raise UserError on every rank if `parts` differ between ranks."""
        digest = 0
        for part in parts:
            digest = zlib.crc32(part, digest)
        digests = self.gather(torch.tensor([digest]))[:, 0].tolist()
        if others := [rank for rank, other in enumerate(digests) if other != digests[0]]:
            ranks = ", ".join(map(str, others))
            raise UserError(f"the ranks were not started alike: {what} of rank {ranks} differ from rank 0's")


class Alone(Communicator):
    """A single process: it waits for no other rank."""

    name = "one process"

    def __init__(self) -> None:
        super().__init__(0, 1, 0, 1)

    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        return lambda: None

    def _broadcast(self, tensor: Tensor) -> None:
        pass

    def shutdown(self) -> None:
        """Do nothing."""


def shard(rows: Tensor, rank: int, size: int) -> tuple[Tensor, float]:
    """Return rank `rank`'s part of a global batch of row numbers [B], and the weight of its mean in the global mean.

    Parts are disjoint, differ by at most one example, and together make the batch. The weight of a part with n examples
    is n * size / B. The mean over the batch is the mean over the ranks of weight times the mean over the part.

    With fewer examples than ranks, some parts would be empty. Such a rank gets the batch's first example with weight 0.
    So it still contributes the part of the step that does not come from the data.
    """
    part = rows.tensor_split(size)[rank]
    return (part, len(part) * size / len(rows)) if len(part) else (rows[:1], 0.0)
