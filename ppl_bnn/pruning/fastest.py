"""Each layer of a compact network in its fastest form, dense or sparse, as measured on this machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from ppl_bnn.pruning.compact import CompactNetwork
from ppl_bnn.pruning.runs import Run, dense_runs
from ppl_bnn.pruning.sparse_layers import SparseLinear, sparse_layer

_ROUNDS = 5


@torch.no_grad()
def choose_layers(network: CompactNetwork, x: Tensor) -> dict[str, str]:
    """Replace every layer that is faster sparse by its sparse form; {path: "dense" or "sparse"}.

    Both forms are timed in turn on what the layer gets in a pass over `x`, a batch as it will be used (what
    `CompactNetwork.select` gives); Linear layers with nothing but ReLU and dropout between them as one, for their
    sparse forms are computed in one pass over the batch. Outputs change by no more than rounding.
    """
    chooser = _Chooser(network)
    chooser.run(x)
    for run in chooser.replaced:
        run.nodes[-1].replace_all_uses_with(run.nodes[0])
        for node in reversed(run.nodes[1:]):
            network.net.graph.erase_node(node)
    network.net.recompile()
    return chooser.chosen


class _Chooser(fx.Interpreter):
    def __init__(self, network: CompactNetwork) -> None:
        super().__init__(network.net)
        self.network = network
        self.layers = {layer.path: layer for layer in network.layers}
        self.runs = {run.nodes[0]: run for run in dense_runs(network)}
        self.chosen: dict[str, str] = {}
        self.replaced: list[Run] = []

    def run_node(self, n: fx.Node) -> Any:
        """Choose before the first node of a run is computed, and at every convolution."""
        if n in self.runs:
            self.choose_run(self.runs[n], *self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def choose_run(self, run: Run, x: Tensor) -> None:
        dense = [self.network.net.get_submodule(layer.path) for layer in run.layers]
        forms = [self.sparse(layer.path) for layer in run.layers]
        sparse = [form for form in forms if isinstance(form, SparseLinear)]
        self.chosen.update({layer.path: "dense" for layer in run.layers})
        if len(sparse) < len(forms):
            return
        for form, relu in zip(sparse, run.relu, strict=True):
            form.relu = relu
        sparse[0].then = sparse[1:]
        steps = [step for layer, relu in zip(dense, run.relu, strict=True) for step in [layer, nn.ReLU()][: 1 + relu]]
        if faster(lambda: sparse[0](x), lambda: nn.Sequential(*steps)(x)):
            for layer, form in zip(run.layers, sparse, strict=True):
                self.network.net.set_submodule(layer.path, form)
                self.chosen[layer.path] = "sparse"
            self.replaced.append(run)

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in self.layers and target not in self.chosen:
            sparse, dense = self.sparse(target), self.network.net.get_submodule(target)
            self.chosen[target] = "dense"
            if sparse is not None and faster(lambda: sparse(*args), lambda: dense(*args)):
                self.network.net.set_submodule(target, sparse)
                self.chosen[target] = "sparse"
        return super().call_module(target, args, kwargs)

    def sparse(self, path: str) -> nn.Module | None:
        layer, dense = self.layers[path], self.network.net.get_submodule(path)
        values = self.network.weights[layer.matrix]
        return sparse_layer(dense, layer.entries.position, values, dense.bias)  # type: ignore[arg-type]


def faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `one` takes less time than `other`: medians of five rounds in turn, after one to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for at in range(_ROUNDS + 1):
        for run, times in zip((one, other), seconds, strict=True):
            started = time.perf_counter()
            run()
            if at:
                times.append(time.perf_counter() - started)
    return median(seconds[0]) < median(seconds[1])
