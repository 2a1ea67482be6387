"""What ranks say to each other: three primitives a backend has to offer, and everything else in terms of them."""

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
    """Another rank is gone: nothing that needs all ranks can be done any more."""


@dataclass
class Calls:
    """Calls of one kind: how many, the bytes a rank put into them, and the seconds it stood still for them.

    What travels while a rank computes costs it no second; waiting for a slower rank does.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Communicator(ABC):
    """The ranks of one training: every method is collective, to be called by all of them in the same order.

    A backend offers `start_sum`, `broadcast_` and `shutdown`; results are the same, to the last bit, on every rank, so
    that ranks which decide by them decide alike. A rank that is gone makes every call raise RankLost.

    Attributes:
        name: of the backend.
        rank, size: this process's number, from 0, and how many there are.
        local_rank, local_size: the same among those on this host.
        calls: counted since they were last cleared, by kind: ``gradients`` (a bucket's allreduce), ``step`` (a step's
            few numbers), ``batch norm`` (its statistics averaged), ``broadcast`` (a tensor) and ``other`` (small
            messages at the start and at checkpoints).
    """

    name: str

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.calls: defaultdict[str, Calls] = defaultdict(Calls)

    @abstractmethod
    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Start to add a contiguous tensor over the ranks, in place; the result waits for it."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor with rank 0's."""

    @abstractmethod
    def shutdown(self) -> None:
        """Leave. The other ranks must not expect an answer from this one afterwards."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, logs and shows progress."""
        return self.rank == 0

    def start_sum(self, tensor: Tensor, name: str, *, kind: str = "other") -> Callable[[], None]:
        """Start to add a contiguous tensor over the ranks, in place, and return what waits for the end of it.

        Sums that run at the same time need different names, the same on all ranks.
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
        """Numbers added over the ranks, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        self.start_sum(total, f"numbers-{len(values)}", kind=kind)()
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others begin with it."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, of any dtype and memory layout, with rank 0's of the same shapes."""
        if self.size > 1:
            for tensor in (tensor for tensor in tensors if tensor.numel()):
                # A copy in the order of the indices: the layout in memory may differ from rank to rank.
                flat = tensor.detach().reshape(-1).contiguous().clone()
                with self._counted("broadcast", flat):
                    self._broadcast(flat.view(torch.uint8))
                with torch.no_grad():
                    tensor.copy_(flat.view(tensor.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [...], of one shape and dtype: [size, ...]."""
        # Not every backend adds bytes.
        kind = tensor.dtype if tensor.is_floating_point() else torch.int64
        rows = torch.zeros(self.size, *tensor.shape, dtype=kind, device=tensor.device)
        rows[self.rank] = tensor
        if self.size > 1:
            self.start_sum(rows, f"rows-{kind}-{rows.numel()}")()
        return rows.to(tensor.dtype)

    def share(self, content: Any, *, root: int = 0) -> Any:
        """Rank `root`'s content, which JSON can hold."""
        if self.size == 1:
            return content
        text = json.dumps(content).encode() if self.rank == root else b""
        codes = torch.zeros(int(self.sum(len(text))[0]), dtype=torch.int32)
        if text:
            codes.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        # The others add nothing to it.
        self.start_sum(codes, f"text-{codes.numel()}")()
        return json.loads(bytes(codes.tolist()))

    def check_same(self, what: str, parts: Sequence[bytes | memoryview]) -> None:
        """Raise UserError, on every rank, where `parts` are not the same on all of them."""
        digest = 0
        for part in parts:
            digest = zlib.crc32(part, digest)
        digests = self.gather(torch.tensor([digest]))[:, 0].tolist()
        if others := [rank for rank, other in enumerate(digests) if other != digests[0]]:
            ranks = ", ".join(map(str, others))
            raise UserError(f"the ranks were not started alike: {what} of rank {ranks} differ from rank 0's")


class Alone(Communicator):
    """One process, which has nobody to wait for."""

    name = "one process"

    def __init__(self) -> None:
        super().__init__(0, 1, 0, 1)

    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        return lambda: None

    def _broadcast(self, tensor: Tensor) -> None:
        pass

    def shutdown(self) -> None:
        """Nothing to leave."""


def shard(rows: Tensor, rank: int, size: int) -> tuple[Tensor, float]:
    """Rank `rank`'s part of a global batch of example numbers [B], and what its mean counts in the global mean.

    Parts differ by one example at most and are disjoint; together they are the batch. With n examples here the mean
    over the batch is the mean over the ranks of (n * size / B) times the mean over each part. Where there are fewer
    examples than ranks a part is empty: its rank is given the batch's first example with a weight of 0, and so takes
    part in the step with what does not come from the data.
    """
    part = rows.tensor_split(size)[rank]
    return (part, len(part) * size / len(rows)) if len(part) else (rows[:1], 0.0)
