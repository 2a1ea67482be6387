"""Runs of dense layers: one behind the other, with nothing but ReLU and dropout between them."""

from dataclasses import dataclass

from torch import fx, nn

from ppl_bnn.pruning.compact import CompactLayer, CompactNetwork
from ppl_bnn.pruning.units import kind_of


@dataclass
class Run:
    """One of `dense_runs`.

    Attributes:
        layers: of random weights, in order.
        relu: for each of them, whether a ReLU is behind it.
        nodes: of the network's graph, from the first layer to what is behind the last.
    """

    layers: list[CompactLayer]
    relu: list[bool]
    nodes: list[fx.Node]


def dense_runs(network: CompactNetwork) -> list[Run]:
    """The network's runs, as long as they are; every Linear layer of random weights that is used once is in one."""
    runs: list[Run] = []
    layers = {layer.path: layer for layer in network.layers}
    targets = [node.target for node in network.net.graph.nodes]
    for node in network.net.graph.nodes:
        last = runs[-1].nodes[-1] if runs else None
        follows = last is not None and node.all_input_nodes == [last] and len(last.users) == 1
        linear = node.op == "call_module" and isinstance(network.net.get_submodule(node.target), nn.Linear)
        if linear and node.target in layers and targets.count(node.target) == 1:
            if not follows:
                runs.append(Run([], [], []))
            runs[-1].layers.append(layers[node.target])
            runs[-1].relu.append(False)
            runs[-1].nodes.append(node)
        elif follows and kind_of(network.net, node) in ("relu", "same"):
            runs[-1].relu[-1] |= kind_of(network.net, node) == "relu"
            runs[-1].nodes.append(node)
    return runs
