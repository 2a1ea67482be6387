"""A step that does not fit into memory: what it needs, what there is, and the largest batch that fits."""

import gc
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inputs import Inputs
from ppl_bnn.inputs import rows as rows_of
from ppl_bnn.models.evaluating import forked_random, unchanged
from ppl_bnn.native.memory import return_freed_memory

Loss = Callable[[Inputs, Tensor], Tensor]
# Examples of the two forward passes that are measured: each of an estimator's groups has one or more.
_FEW, _MORE = 4, 8
# Of torch's allocators for the CPU and for accelerators, and of cuBLAS and cuDNN.
_TEXTS = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class StepMemory:
    """What a training step needs.

    Attributes:
        fixed: bytes whatever the batch: parameters, gradients, the optimizer's state, draws.
        example: bytes of an example: what the forward pass keeps for back-propagation, and the largest gradients.
    """

    fixed: int
    example: float

    def of(self, batch: int) -> int:
        """Bytes of a step of `batch` examples."""
        return self.fixed + int(batch * self.example)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated: a MemoryError, or a RuntimeError of torch that says so."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
    return told or isinstance(error, MemoryError)


def refuse_if_too_large(
    error: BaseException,
    loss: Loss,
    model: nn.Module,
    guide: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Inputs,
    y: Tensor,
    *,
    held: int = 0,
) -> None:
    """Refuse the batch of a step that raised `error` for want of memory; return if it was another error.

    Args:
        loss: of inputs and labels, a tensor; see `step_memory`.
        x, y: the batch, [B, ...] and [B, ...].
        held: bytes that a step has already, beside parameters and the optimizer's state.

    Raises:
        UserError: says what the step needs, what is free and the largest batch that fits, as far as can be found out.
    """
    if not is_out_of_memory(error):
        return
    optimizer.zero_grad()
    # The error's traceback keeps the forward pass that it ended.
    traceback.clear_frames(error.__traceback__)
    batch, there = len(y), free_memory(y.device)
    try:
        needs = step_memory(loss, model, guide, optimizer, x, y)
    except (RuntimeError, ValueError, IndexError, MemoryError):
        # Not even a few examples fit, or the model takes batches of one size alone.
        needs = None
    found = "" if needs is None else f": it needs about {_gibibytes(needs.of(batch))}"
    if needs is not None and there is not None:
        room = there + held_now(optimizer) + held
        most = min(int((room - needs.fixed) / max(needs.example, 1.0)), batch - 1)
        fits = f"the largest batch that fits is about {most}" if most > 0 else "not even one example fits"
        found += f" and can have {_gibibytes(room)}; {fits}"
    raise UserError(
        f"a step with train.batch_size {batch} does not fit into the memory of {y.device}{found}. The last checkpoint "
        "is good: it resumes where there is more memory. Or train anew with a smaller train.batch_size"
    ) from None


def step_memory(
    loss: Loss, model: nn.Module, guide: nn.Module, optimizer: torch.optim.Optimizer, x: Inputs, y: Tensor
) -> StepMemory:
    """Estimate the memory of a training step; model, guide and random state stay as they are.

    A random weight has loc and unconstrained scale, their gradients, the optimizer's state of both, the draw, its
    gradient and the noise: with Adam 11 numbers (44 bytes in float32), with IVON 8 (32 bytes). A point estimate has 4
    (16 bytes) with Adam. What an example needs is measured: the tensors that the forward pass of a few examples keeps
    for back-propagation, as far as they grow with the number of examples. Twice the largest of them comes on top, for
    the gradients of one layer's output and input. What an operation needs while it runs is not counted.

    Args:
        loss: of inputs and labels, a tensor. It is called with 4 and with 8 examples.
        x, y: at least one example, [B, ...] and [B, ...].
    """
    learnt = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = {value.untyped_storage().data_ptr() for part in (model, guide) for value in part.parameters()}
    with unchanged(model, guide), forked_random(x):
        few, more = (_saved(loss, x, y, count, own) for count in (_FEW, _MORE))
    grown = [(large - small) / (_MORE - _FEW) for small, large in zip(few, more, strict=True)]
    example = sum(grown)
    weights = sum(
        value.nbytes
        for name, value in guide.named_parameters()
        if name.startswith("unconstrained_scale.") and id(value) in learnt
    )
    # Of an estimator with several draws, the measured ones and the gradient of one.
    draws = max(3 * weights, int(sum(few) - _FEW * example) + weights)
    values = sum(parameter.nbytes for parameter in learnt.values())
    return StepMemory(2 * values + _state_bytes(optimizer) + draws, example + 2 * max(grown, default=0.0))


def held_now(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters and the optimizer's state so far."""
    values = sum(parameter.nbytes for group in optimizer.param_groups for parameter in group["params"])
    return values + sum(_tensors_of(optimizer))


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device, None where this cannot be found out."""
    gc.collect()
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        module.empty_cache()
        return int(module.mem_get_info(device)[0])
    if device.type == "mps":
        torch.mps.empty_cache()
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu" or sys.platform != "linux":
        return None
    return_freed_memory()
    return max(0, min(_limits_on_linux()))


def _saved(loss: Loss, x: Inputs, y: Tensor, count: int, own: set[int]) -> list[int]:
    """Bytes of each storage that the loss of `count` examples keeps for back-propagation, but for those in `own`."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(saved: Tensor) -> None:
        # Alive until all are counted, so that no two have one address.
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()

    rows = torch.arange(count, device=y.device) % len(y)
    # Nothing is propagated back, so nothing is unpacked.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda _: y):
        loss(rows_of(x, rows), y[rows])
    return [storage.nbytes() for address, storage in storages.items() if address not in own]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state: what there is, or before the first step what there will be."""
    if found := sum(_tensors_of(optimizer)):
        return found
    sizes = [sum(parameter.nbytes for parameter in group["params"]) for group in optimizer.param_groups]
    if isinstance(optimizer, IVON):
        # A momentum for everything but the scales.
        return sum(sizes) - sizes[1]
    return sum(sizes) * (1 if isinstance(optimizer, torch.optim.RMSprop) else 2)


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """The bytes of each tensor of the optimizer's state."""
    for state in optimizer.state.values():
        yield from (value.nbytes for value in state.values() if isinstance(value, Tensor))


def _limits_on_linux() -> Iterator[int]:
    """What the machine, this process's limits and its control groups leave to it, in bytes."""
    import resource

    yield _kibibytes("/proc/meminfo", "MemAvailable")
    if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        yield most - _kibibytes("/proc/self/status", "VmSize")
    # A limit of any group around this one counts, too.
    with suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].removeprefix("0::/")
        root = Path("/sys/fs/cgroup")
        for group in (root / own, *(root / own).parents):
            with suppress(OSError, ValueError):
                # Without a limit it holds the word max.
                yield int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())


def _kibibytes(file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)
    assert found is not None, (file, name)
    return int(found[1]) * 1024


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
