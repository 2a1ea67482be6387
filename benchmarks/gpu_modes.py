"""The training steps that benchmarks/gpu.py compares, each eager, compiled or in a CUDA graph."""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from contenders import CONTENDERS, PACKAGES, Contender, deterministic, ivon_opt
from gpu_cells import NotHere, Plan, need_cuda
from gpu_networks import network
from train_step import build_contender

MODES = ("eager", "compiled", "graph")
NAMES = ("deterministic", "plain", "groups", "flipout", "ivon", "ivon-opt")
# Steps before a capture, in which libraries choose their kernels and the optimizer makes its state.
WARM_STEPS = 3


def contender(
    plan: Plan, name: str, mode: str, *, network_name: str, batch: int, precision: str = "float32"
) -> Contender:
    """Build a step of `NAMES` in one of `MODES`, on random images, channels_last.

    Raises:
        NotHere: there is no such step here.
    """
    if mode == "graph":
        need_cuda(plan)
    options = argparse.Namespace(
        network=network_name, batch=batch, device=torch.device(plan.device), precision=precision, channels_last=True
    )
    return build_contender(name, options, network(plan, network_name), make=_maker(name, mode))


def _maker(name: str, mode: str) -> Callable[..., Contender]:
    if name == "deterministic":
        return {"eager": deterministic, "compiled": partial(compiled, make=deterministic), "graph": in_a_graph}[mode]
    if name == "ivon-opt":
        if find_spec(PACKAGES[name][0]) is None:
            raise NotHere(f"not installed; pip install {PACKAGES[name][1]}")
        if mode == "graph":
            raise NotHere("its optimizer cannot be captured in a graph")
        return partial(compiled, make=ivon_opt) if mode == "compiled" else ivon_opt
    make = CONTENDERS[name]
    if "mode" in inspect.signature(make).parameters:
        return partial(make, mode=mode)
    if mode != "eager":
        raise NotHere(f"this version has no {mode} step of it")
    return make


def compiled(
    net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, make: Callable[..., Contender]
) -> Contender:
    """Build a step of the network compiled by ``torch.compile``; the optimizer is not compiled."""
    return make(torch.compile(net), x, y, layout)


def in_a_graph(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build the deterministic step, captured in a CUDA graph at its first call: forward, backward and fused Adam."""
    optimizer = Adam(net.parameters(), lr=1e-4, fused=True, capturable=True)
    graph = torch.cuda.CUDAGraph()
    captured = False

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def step() -> None:
        nonlocal captured
        if not captured:
            # At the first call, not before: under the precision of the steps.
            _capture(graph, work, optimizer)
            captured = True
        graph.replay()

    return Contender(step, lambda: _bytes_of(optimizer))


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], None], optimizer: Adam) -> None:
    """Capture `work`, after some runs on another stream, as PyTorch's notes on CUDA graphs have it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    # Without gradients, the capture makes them in the graph's own memory, and each replay writes them anew.
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        work()


def _bytes_of(optimizer: Adam) -> int:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in (*parameters, *states))
