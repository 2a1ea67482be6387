"""Averages gradients over the ranks in a few large messages, which travel while back-propagation runs."""

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator

# Half precision keeps 11 bits only above 6e-5: small gradients are lifted above it, and 256 is the largest that fits.
_LIFT = 256.0


class GradientBuckets:
    """Context manager that gathers the gradients of each back-propagation in buckets and averages them over the ranks.

    Buckets are filled from the last parameter to the first, about the order in which gradients arrive. A bucket is sent
    once its last gradient has arrived and the bucket before it was sent. So all ranks send in the same order, whatever
    the order of their gradients, and cannot deadlock.

    Call `average` once after each back-propagation, before anything reads ``.grad``. It waits for the buckets; then
    ``.grad`` is the mean over the ranks. A parameter without a gradient counts as zero. The gradients live in the
    buckets until they are set to None.

    Args:
        parameters: all trained parameters, the same on every rank, in the order of the forward pass.
        bucket_mb: size of a bucket, about, in MiB; a larger parameter has a bucket of its own.
        compression: ``fp16`` sends half the bytes, with 11 bits of each number.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        communicator: Communicator,
        *,
        bucket_mb: float = 25.0,
        compression: str = "none",
    ) -> None:
        assert bucket_mb > 0
        assert compression in ("none", "fp16")
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._buckets = [
            _Bucket(group, communicator, f"bucket-{number}", compression)
            for number, group in enumerate(_fill(reversed(parameters), bucket_mb * 2**20))
        ]
        self._home = {parameter: bucket for bucket in self._buckets for parameter in bucket.missing}
        self._started = 0

    def __enter__(self) -> "GradientBuckets":
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self._home]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def __len__(self) -> int:
        return len(self._buckets)

    def average(self) -> None:
        """Wait until every parameter's ``.grad`` is the mean over the ranks."""
        for bucket in self._buckets[self._started :]:
            bucket.fill_up()
            bucket.start()
        for bucket in self._buckets:
            bucket.finish()
        self._started = 0

    def _take(self, parameter: Tensor) -> None:
        self._home[parameter].take(parameter)
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._buckets[self._started].start()
            self._started += 1


class _Bucket:
    """The gradients of some parameters, one after the other in one flat tensor."""

    def __init__(self, parameters: list[Tensor], communicator: Communicator, name: str, compression: str) -> None:
        self._communicator, self._name, self._half = communicator, name, compression == "fp16"
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype).to(parameters[0].device)
        parts = self._flat.split([parameter.numel() for parameter in parameters])
        self._views = {p: _shaped_as(p, part) for p, part in zip(parameters, parts, strict=True)}
        self.missing = dict.fromkeys(parameters)

    def take(self, parameter: Tensor) -> None:
        """Move a parameter's gradient into the bucket, divided by the number of ranks."""
        view, gradient = self._views[parameter], parameter.grad
        assert parameter in self.missing, "a second back-propagation before the first one's gradients were averaged"
        assert gradient is not None
        torch.mul(gradient, 1 / self._communicator.size, out=view)
        parameter.grad = view
        del self.missing[parameter]

    def fill_up(self) -> None:
        """Write zeros for the parameters that have no gradient in this step."""
        for parameter in self.missing:
            self._views[parameter].zero_()
            parameter.grad = self._views[parameter]
        self.missing.clear()

    def start(self) -> None:
        """Start to send the bucket."""
        self._message = (self._flat * _LIFT).half() if self._half else self._flat
        self._wait: Callable[[], None] = self._communicator.start_sum(self._message, self._name, kind="gradients")

    def finish(self) -> None:
        """Wait until the bucket holds the sum over the ranks."""
        self._wait()
        if self._half:
            self._flat.copy_(self._message).div_(_LIFT)
        self.missing.update(dict.fromkeys(self._views))


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
