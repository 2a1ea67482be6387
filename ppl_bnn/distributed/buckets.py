"""Averages gradients over the ranks in a few large messages, which travel while back-propagation runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator
from ppl_bnn.errors import UserError

# Half precision keeps 11 bits only above 6e-5: small gradients are lifted above it, and 256 is the largest that fits.
_LIFT = 256.0


@dataclass(frozen=True)
class Computed:
    """Gradients in memory of their own, which are computed from what back-propagation gives some leaves.

    Attributes:
        leaves: tensors whose ``.grad`` they are computed from.
        awaited: those of them that a message waits for in every step.
        compute: fills them, and sets the leaves' ``.grad`` to None.
        gradients: contiguous; they travel as they are.
    """

    leaves: Sequence[Tensor]
    awaited: Sequence[Tensor]
    compute: Callable[[], object]
    gradients: Sequence[Tensor]


class GradientBuckets:
    """Context manager that gathers the gradients of each back-propagation in buckets and averages them over the ranks.

    Buckets are filled from the last parameter to the first, about the order in which gradients arrive. A bucket is sent
    once its last gradient has arrived and the bucket before it was sent. So all ranks send in the same order, whatever
    the order of their gradients, and cannot deadlock.

    Call `average` once after each back-propagation, but for those under `waiting`, before anything reads ``.grad``. It
    waits for the buckets; then ``.grad`` is the mean over the ranks. A parameter without a gradient counts as zero. The
    gradients live in the buckets until they are set to None.

    Args:
        parameters: trained parameters, the same on every rank, in the order of the forward pass.
        computed: gradients that travel without being copied, before those of `parameters`, in the order of the forward
            pass. From the second step on a message leaves once the awaited of its leaves have gradients, and those that
            had some in an earlier step.
        bucket_mb: size of a bucket, about, in MiB; a larger parameter has a bucket of its own.
        compression: ``fp16`` sends half the bytes, with 11 bits of each number.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        communicator: Communicator,
        *,
        computed: Sequence[Computed] = (),
        bucket_mb: float = 25.0,
        compression: str = "none",
    ) -> None:
        assert bucket_mb > 0
        assert compression in ("none", "fp16")
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._buckets: list[_Sent] = [
            _ComputedBucket(one, communicator, f"computed-{number}", compression)
            for number, one in enumerate(reversed(computed))
        ]
        self._buckets += [
            _Bucket(group, communicator, f"bucket-{number}", compression)
            for number, group in enumerate(_fill(reversed(parameters), bucket_mb * 2**20))
        ]
        self._home = {leaf: bucket for bucket in self._buckets for leaf in bucket.leaves}
        self._started = 0
        self._waits = False

    def __enter__(self) -> "GradientBuckets":
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self._home]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def __len__(self) -> int:
        return len(self._buckets)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for a back-propagation whose gradients the next one adds to: nothing is sent yet."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def average(self) -> None:
        """Wait until every parameter's ``.grad`` is the mean over the ranks."""
        for bucket in self._buckets[self._started :]:
            bucket.fill_up()
            bucket.start()
        for bucket in self._buckets:
            bucket.finish()
        self._started = 0

    def _take(self, parameter: Tensor) -> None:
        if self._waits:
            return
        self._home[parameter].take(parameter)
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._buckets[self._started].start()
            self._started += 1


class _Sent(Protocol):
    """A part of the gradients that is sent when nothing is missing, or when back-propagation is over."""

    missing: dict[Tensor, None]

    @property
    def leaves(self) -> Sequence[Tensor]: ...

    def take(self, leaf: Tensor) -> None:
        """A leaf has its gradient."""

    def fill_up(self) -> None:
        """Back-propagation is over: what is missing has no gradient."""

    def start(self) -> None:
        """Start to send."""

    def finish(self) -> None:
        """Wait until the gradients are means over the ranks."""


class _Bucket:
    """The gradients of some parameters, one after the other in one flat tensor."""

    def __init__(self, parameters: list[Tensor], communicator: Communicator, name: str, compression: str) -> None:
        self._size = communicator.size
        self.leaves: Sequence[Tensor] = parameters
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype).to(parameters[0].device)
        parts = self._flat.split([parameter.numel() for parameter in parameters])
        self._views = {p: _shaped_as(p, part) for p, part in zip(parameters, parts, strict=True)}
        self._message = _Message(self._flat, communicator, name, compression)
        self.missing = dict.fromkeys(parameters)

    def take(self, leaf: Tensor) -> None:
        view, gradient = self._views[leaf], leaf.grad
        assert leaf in self.missing, "a second back-propagation before the first one's gradients were averaged"
        assert gradient is not None
        torch.mul(gradient, 1 / self._size, out=view)
        leaf.grad = view
        del self.missing[leaf]

    def fill_up(self) -> None:
        for parameter in list(self.missing):
            if parameter.grad is not None:
                # Of an earlier back-propagation of the same step.
                self.take(parameter)
                continue
            self._views[parameter].zero_()
            parameter.grad = self._views[parameter]
        self.missing.clear()

    def start(self) -> None:
        self._message.start()

    def finish(self) -> None:
        self._message.finish()
        self.missing.update(dict.fromkeys(self._views))


class _ComputedBucket:
    """Gradients that are computed in place (`Computed`)."""

    def __init__(self, computed: Computed, communicator: Communicator, name: str, compression: str) -> None:
        self._computed, self._size, self.leaves = computed, communicator.size, computed.leaves
        self._messages = [
            _Message(part, communicator, f"{name}-{number}", compression)
            for number, part in enumerate(computed.gradients)
        ]
        # In the first step, which of them have gradients is not known.
        self._known: dict[Tensor, None] = {}
        self._first = torch.empty(0)
        self._started = False
        self.missing = {self._first: None}

    def take(self, leaf: Tensor) -> None:
        if self._started:
            raise UserError(
                "the network uses a random parameter in another way than in the steps before, when its gradient had "
                "been sent to the other ranks already: train it on one rank. The last checkpoint is good"
            )
        self._known[leaf] = None
        self.missing.pop(leaf, None)

    def fill_up(self) -> None:
        self.missing.clear()

    def start(self) -> None:
        self._started = True
        self._computed.compute()
        for part, message in zip(self._computed.gradients, self._messages, strict=True):
            part.mul_(1 / self._size)
            message.start()

    def finish(self) -> None:
        for message in self._messages:
            message.finish()
        self._started = False
        self.missing = self._known | dict.fromkeys(self._computed.awaited)


class _Message:
    """A tensor on its way."""

    def __init__(self, tensor: Tensor, communicator: Communicator, name: str, compression: str) -> None:
        self._tensor, self._communicator, self._name = tensor, communicator, name
        self._half = compression == "fp16"

    def start(self) -> None:
        self._sent = (self._tensor * _LIFT).half() if self._half else self._tensor
        self._wait: Callable[[], None] = self._communicator.start_sum(self._sent, self._name, kind="gradients")

    def finish(self) -> None:
        self._wait()
        if self._half:
            self._tensor.copy_(self._sent).div_(_LIFT)


def _fill(parameters: Iterable[Tensor], limit: float) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        other_kind = group and (parameter.dtype, parameter.device) != (group[0].dtype, group[0].device)
        if group and (size + bytes_ > limit or other_kind):
            yield group
            group, size = [], 0
        group.append(parameter)
        size += bytes_
    if group:
        yield group


def _shaped_as(parameter: Tensor, part: Tensor) -> Tensor:
    # The parameter's own memory layout (channels_last), so that optimizers walk both tensors by address.
    dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
    return (
        part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
        if dense
        else part.view_as(parameter)
    )
