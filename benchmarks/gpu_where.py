"""Which card, driver and libraries the GPU check ran on."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial

import torch

from gpu_cells import Cell, Clock, Plan, Row
from ppl_bnn import __version__
from report import cpu_name


def cells(plan: Plan) -> Iterator[Cell]:
    """Describe the machine, and the card."""
    yield Cell("machine", 1, partial(machine, plan))
    yield Cell("card", 1, partial(card, plan))


def machine(plan: Plan, clock: Clock) -> Iterator[Row]:
    """Describe processor and libraries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield from _rows(
        {
            "processor": f"{cpu_name()}, {cores} cores, {torch.get_num_threads()} threads of torch",
            "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
            "ppl_bnn": __version__,
            "torch": torch.__version__,
            "sizes": "toy" if plan.toy else "full",
        }
    )


def card(plan: Plan, clock: Clock) -> Iterator[Row]:
    """Describe the device, after one operation on it."""
    device = torch.device(plan.device)
    torch.ones(1, device=device).add_(1).item()
    if device.type != "cuda":
        yield from _rows({"device": str(device)})
        return
    found = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield from _rows(
        {
            "device": f"{found.name}, {found.multi_processor_count} multiprocessors, compute capability "
            f"{found.major}.{found.minor}",
            "memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free",
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "driver": _driver(),
            "TF32 in float32": "convolutions {}, matrix products {}".format(*("on" if on else "off" for on in tf32)),
        }
    )


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown: there is no nvidia-smi"
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return found.stdout.split("\n")[0].strip()


def _rows(found: dict[str, object]) -> Iterator[Row]:
    for name, value in found.items():
        yield {"what": name, "found": value}
