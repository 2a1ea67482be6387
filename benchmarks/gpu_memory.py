"""Peak memory, kernels and host waits of a training step on a GPU."""

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pyro
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_cells import Cell, Clock, Plan, Row, need_cuda, why
from gpu_modes import NAMES, contender
from gpu_networks import network

NETWORKS = ("vgg16", "resnet18")
BATCH = 128


def cells(plan: Plan) -> Iterator[Cell]:
    """Measure the memory of the steps of each network, then count their kernels, which a profiler may not survive."""
    for name in NETWORKS:
        yield Cell(f"{name}: memory", 6, partial(memory, plan, name))
    for name in NETWORKS:
        yield Cell(f"{name}: kernels", 8, partial(kernels, plan, name))


def memory(plan: Plan, name: str, clock: Clock) -> Iterator[Row]:
    """Measure each step's peak memory above that before the network was built.

    Bytes a weight: (peak - (deterministic peak - its parameters and moments)) / random weights. That is what a random
    weight takes in all, beside the deterministic network's activations.
    """
    need_cuda(plan)
    weights = _random_weights(network(plan, name))
    beside = base = 0
    for step_name in NAMES:
        clock.say(step_name)
        row = {"network": name, "batch": BATCH, "step": step_name}
        try:
            peak, held = _peak_and_held(plan, step_name, name)
        except Exception as error:
            if step_name == "deterministic":
                raise
            yield row | {"note": why(error)}
            continue
        if step_name == "deterministic":
            base, beside = peak, peak - held
        # The parameters of ivon-opt are the network's own.
        yield row | {
            "peak MiB": peak / 2**20, "ratio": peak / base, "bytes a weight": (peak - beside) / weights,
            "parameters, state MiB": held / 2**20,
        }  # fmt: skip


def kernels(plan: Plan, name: str, clock: Clock) -> Iterator[Row]:
    """Count the kernels and the host waits of each step."""
    need_cuda(plan)
    for step_name in NAMES:
        clock.say(step_name)
        row: Row = {"network": name, "batch": BATCH, "step": step_name}
        try:
            step = contender(plan, step_name, "eager", network_name=name, batch=BATCH).step
            for _ in range(3):
                step()
            row["host waits"] = _waits(step)
            row["kernels"] = _kernels(step)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other steps are counted
            row["note"] = why(error)
        yield row


def _peak_and_held(plan: Plan, step_name: str, network_name: str) -> tuple[int, int]:
    pyro.enable_validation(False)
    # Twice: what libraries load at the first step of a kind is not part of a network's memory.
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(plan.device)
        torch.cuda.reset_peak_memory_stats(plan.device)
        made = contender(plan, step_name, "eager", network_name=network_name, batch=BATCH)
        for _ in range(3):
            made.step()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated(plan.device) - before, made.held()
        del made
    return found


def _random_weights(net: nn.Module) -> int:
    """Count the weights that are random in the network's Bayesian form: of parameters with two or more dimensions."""
    return sum(value.numel() for value in net.parameters() if value.dim() > 1)


def _kernels(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    on_device = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _waits(step: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
