"""Each layer of a compact network in its fastest form, dense or sparse, as measured on this machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from ppl_bnn.prediction.compact.network import CompactNetwork
from ppl_bnn.prediction.compact.runs import Run, convolution_runs, dense_runs
from ppl_bnn.prediction.compact.sparse_layers import SparseConv2d, SparseLinear, sparse_layer

_ROUNDS = 5


@torch.no_grad()
def choose_layers(network: CompactNetwork, x: Tensor) -> dict[str, str]:
    """Replace every layer that is faster sparse by its sparse form; {path: "dense" or "sparse"}.

    Both forms are timed in turn on what the layer gets in a pass over `x`, a batch as it will be used (what
    `CompactNetwork.select` gives). Linear layers with nothing but ReLU and dropout between them are timed as one, and a
    convolution with the ReLU and the max pooling behind it, for their sparse forms compute all that in one pass.
    Outputs change by no more than rounding.
    """
    chooser = _Chooser(network)
    chooser.run(x)
    for run, forms in chooser.replaced:
        for layer, form in zip(run.layers, forms, strict=True):
            network.net.set_submodule(layer.path, form)
            chooser.chosen[layer.path] = "sparse"
        run.nodes[-1].replace_all_uses_with(run.nodes[0])
        for node in reversed(run.nodes[1:]):
            network.net.graph.erase_node(node)
    network.net.recompile()
    return chooser.chosen


class _Chooser(fx.Interpreter):
    def __init__(self, network: CompactNetwork) -> None:
        super().__init__(network.net)
        self.network = network
        self.runs = {run.nodes[0]: run for run in (*dense_runs(network), *convolution_runs(network))}
        self.chosen = {layer.path: "dense" for layer in network.layers}
        self.replaced: list[tuple[Run, list[SparseLinear | SparseConv2d]]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Choose before the first node of a run is computed."""
        if n in self.runs:
            self.choose(self.runs[n], *self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def choose(self, run: Run, x: Tensor) -> None:
        steps: list[nn.Module] = []
        forms: list[SparseLinear | SparseConv2d] = []
        for layer, relu in zip(run.layers, run.relu, strict=True):
            dense = self.network.net.get_submodule(layer.path)
            steps += [dense, nn.ReLU()][: 1 + relu]
            values = self.network.weights[layer.matrix]
            form = sparse_layer(dense, layer.entries.position, values, dense.bias)  # type: ignore[arg-type]
            if form is None:
                return
            form.relu = relu
            forms.append(form)
        if run.pool > 1:
            steps.append(nn.MaxPool2d(run.pool))
        first = forms[0]
        if isinstance(first, SparseConv2d):
            first.pool = run.pool
        else:
            first.then = [form for form in forms[1:] if isinstance(form, SparseLinear)]
        if faster(lambda: first(x), lambda: nn.Sequential(*steps)(x)):
            self.replaced.append((run, forms))


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
