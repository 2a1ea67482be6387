"""A model that runs without being changed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ppl_bnn.inputs import parts


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Context manager without gradients and, if `model` is a module, in evaluation mode.

    Batch norm's statistics stay as they are. Each module's mode is restored on exit.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def forked_random(*args: object) -> AbstractContextManager[None]:
    """Context manager that restores the random state on exit.

    It restores the CPU's state, and that of the device on which the tensors among `args` are.
    """
    devices = {value.device for value in parts(args) if isinstance(value, Tensor) and not value.is_cpu}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(devices, device_type=kind)


def seed_random(seed: int, *args: object) -> None:
    """Seed the generator of the CPU, and that of the device on which the tensors among `args` are.

    ``torch.manual_seed`` sets these to the same state. It also looks at every kind of device there might be, which
    takes longer than a small draw.
    """
    torch.default_generator.manual_seed(seed)
    for kind in {value.device.type for value in args if isinstance(value, Tensor) and not value.is_cpu}:
        torch.get_device_module(kind).manual_seed_all(seed)


@contextmanager
def unchanged(*parts: nn.Module) -> Iterator[None]:
    """Restore the modes and the buffers of modules on exit, whatever ran in between."""
    modules = [module for part in parts for module in part.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, value, None if value is None else value.clone())
        for module in modules
        for name, value in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, value, before in buffers:
            module._buffers[name] = value
            # One that a layer only reads may be a view that cannot be written to.
            if value is not None and before is not None and not torch.equal(value, before):
                value.data.copy_(before)
