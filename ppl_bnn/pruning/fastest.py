"""Each layer of a compact network in its fastest form, dense or sparse, as measured on this machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from ppl_bnn.pruning.compact import CompactNetwork
from ppl_bnn.pruning.sparse_layers import sparse_layer

_ROUNDS = 5


@torch.no_grad()
def choose_layers(network: CompactNetwork, x: Tensor) -> dict[str, str]:
    """Replace every layer that is faster sparse by its sparse form; {path: "dense" or "sparse"}.

    Both forms are timed in turn on what the layer gets in a pass over `x`, a batch as it will be used (what
    `CompactNetwork.select` gives). Outputs change by no more than rounding.
    """
    return _Chooser(network).chosen_for(x)


class _Chooser(fx.Interpreter):
    def __init__(self, network: CompactNetwork) -> None:
        super().__init__(network.net)
        self.network = network
        self.layers = {layer.path: layer for layer in network.layers}
        self.chosen: dict[str, str] = {}

    def chosen_for(self, x: Tensor) -> dict[str, str]:
        self.run(x)
        return self.chosen

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in self.layers and target not in self.chosen:
            self.chosen[target] = "dense"
            layer, dense = self.layers[target], self.network.net.get_submodule(target)
            values = self.network.weights[layer.matrix]
            sparse = sparse_layer(dense, layer.entries.position, values, dense.bias)  # type: ignore[arg-type]
            if sparse is not None and faster(lambda: sparse(*args), lambda: dense(*args)):
                self.network.net.set_submodule(target, sparse)
                self.chosen[target] = "sparse"
        return super().call_module(target, args, kwargs)


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
