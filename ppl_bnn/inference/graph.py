"""A training step that a GPU replays as one graph, instead of being sent its operations one by one."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.inputs import Inputs, mapped, parts

log = logging.getLogger(__name__)

# Steps before the capture: libraries choose their algorithms, and optimizers make their state.
_WARM_UP = 3

# Of a function without arguments: runs it under capture, and returns its result and what repeats it.
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


class Replayed:
    """A function of a batch that is captured once, and replayed for batches of that shape.

    Batches of another shape, and everything where a capture fails, run as before.

    Args:
        run: of (x, y); its tensors must be in the same memory at each call.
        capture: see `cuda_capture`; None captures nothing.
        scope: what calls that are not replayed run in.
        recover: called where a capture failed: gradients that it left are of no step.
    """

    def __init__(
        self, run: Callable[[Inputs, Tensor], Tensor], capture: Capture | None,
        scope: Callable[[], AbstractContextManager] = nullcontext, recover: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._run, self._capture, self._scope, self._recover = run, capture, scope, recover
        self._calls = 0
        self._last: list[Tensor] = []
        self._graph: _Graph | None = None

    def __call__(self, x: Inputs, y: Tensor) -> Tensor:
        """What `run` gives, as a tensor of its own."""
        self._calls += 1
        batch = parts((x, y))
        # Two batches of one shape in a row are of the usual shape; the last batch of an epoch may have another.
        usual = bool(self._last) and not any(map(_differ, self._last, batch))
        self._last = batch
        if self._graph is None and self._capture is not None and self._calls > _WARM_UP and usual:
            self._graph = self._captured(x, y)
        if self._graph is None or any(map(_differ, self._graph.inputs, batch)):
            with self._scope():
                return self._run(x, y)
        for one, other in zip(self._graph.inputs, batch, strict=True):
            one.copy_(other)
        self._graph.replay()
        return self._graph.result.clone()

    def _captured(self, x: Inputs, y: Tensor) -> "_Graph | None":
        inputs, capture = mapped((x, y), torch.clone), self._capture
        self._capture = None
        assert capture is not None
        try:
            return _Graph(parts(inputs), *capture(lambda: self._run(*inputs)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._recover()
            log.warning("a step cannot be replayed as a CUDA graph, and runs as it is: %s", reason[0])
            return None


def cuda_capture(device: torch.device) -> tuple[Capture, Callable[[], AbstractContextManager]]:
    """Capture on a CUDA device, and the side stream that calls before it must run on, as CUDA wants."""
    stream = torch.cuda.Stream(device)

    def capture(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run()
        return result, graph.replay

    @contextmanager
    def beside() -> Any:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    return capture, beside


@dataclass(frozen=True)
class _Graph:
    inputs: list[Tensor]
    result: Tensor
    replay: Callable[[], None]


def _differ(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype)
