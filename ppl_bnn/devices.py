"""Which devices torch can use here, and in which precision; what cannot be used is refused in one line."""

import logging
import platform
import re
from functools import cache

import torch

from ppl_bnn.errors import UserError

log = logging.getLogger(__name__)


def usable_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The torch device of a name, after a first number was read from it.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` and so on.
        local_rank: this rank's number among those of its host, if several train together: a name without a number
            then means the device of that number, which becomes the current one.

    Raises:
        UserError: torch knows no such device, or this machine has none. The message says which it has.
    """
    try:
        device = torch.device(name)
        if device.type != "cpu" and device.index is None and local_rank is not None:
            module = torch.get_device_module(device)
            # Some launchers show each rank one device only.
            device = torch.device(device.type, local_rank % max(1, module.device_count()))
            module.set_device(device)
        # Of the device meta nothing can be read.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        here = ", ".join(devices_here())
        raise UserError(f"device {name!r} cannot be used: {reason}; choose another: this machine has {here}") from None
    return device


def devices_here() -> list[str]:
    """The names of this machine's devices that torch can use, ``cpu`` first."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]


def check_precision(device: torch.device, precision: str) -> None:
    """Check that a device computes in a precision; log one warning where it computes in bfloat16 by software.

    Args:
        precision: ``float32``, which every device has, or ``bfloat16``.

    Raises:
        UserError: the device cannot compute in bfloat16.
    """
    if precision != "bfloat16":
        return
    try:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
        (one @ one).item()
    except (RuntimeError, TypeError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise UserError(f"the device {device} cannot compute in bfloat16 ({reason}): use precision float32") from None
    if not _has_bfloat16(device):
        _warn_of_emulation(str(device))


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Elsewhere torch converts to float32 and back."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _warn_of_emulation(device: str) -> None:
    # Once a process: `fit` may run many times.
    log.warning(
        "the hardware of device %s has no bfloat16, which torch then emulates: precision float32 is likely faster",
        device,
    )
