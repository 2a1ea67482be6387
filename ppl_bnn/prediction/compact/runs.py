"""What a sparse layer computes in one pass: dense layers behind each other, a convolution and the pooling behind it."""

from dataclasses import dataclass

from torch import fx, nn

from ppl_bnn.prediction.compact.network import CompactLayer, CompactNetwork
from ppl_bnn.prediction.compact.units import kind_of


@dataclass
class Run:
    """Layers of random weights with nothing between and behind them but what belongs to the run.

    Attributes:
        layers: in order.
        relu: for each of them, whether a ReLU is behind it.
        nodes: of the network's graph, from the first layer to what is behind the last.
        pool: size of the windows of the max pooling behind it, which do not overlap; 1 is none.
    """

    layers: list[CompactLayer]
    relu: list[bool]
    nodes: list[fx.Node]
    pool: int = 1


def dense_runs(network: CompactNetwork) -> list[Run]:
    """Linear layers one behind the other with ReLU and dropout, as long as they are.

    Every Linear layer of random weights that is used once is in one.
    """
    runs: list[Run] = []
    for node, layer in _layers_used_once(network, nn.Linear).items():
        if runs and node is _follower(runs[-1].nodes[-1]):
            runs[-1].layers.append(layer)
            runs[-1].relu.append(False)
            runs[-1].nodes.append(node)
        else:
            runs.append(Run([layer], [False], [node]))
        _take_in(network.net, runs[-1])
    return runs


def convolution_runs(network: CompactNetwork) -> list[Run]:
    """Every convolution of random weights that is used once, with the ReLU, dropout and max pooling behind it."""
    runs = [Run([layer], [False], [node]) for node, layer in _layers_used_once(network, nn.Conv2d).items()]
    for run in runs:
        _take_in(network.net, run)
        follower = _follower(run.nodes[-1])
        if follower and (size := _pool_size(network.net, follower)):
            run.pool = size
            run.nodes.append(follower)
            _take_in(network.net, run)
    return runs


def _layers_used_once(network: CompactNetwork, kind: type[nn.Module]) -> dict[fx.Node, CompactLayer]:
    layers = {layer.path: layer for layer in network.layers}
    targets = [node.target for node in network.net.graph.nodes]
    return {
        node: layers[node.target]
        for node in network.net.graph.nodes
        if node.op == "call_module" and node.target in layers and targets.count(node.target) == 1
        and isinstance(network.net.get_submodule(node.target), kind)
    }  # fmt: skip


def _take_in(net: fx.GraphModule, run: Run) -> None:
    # ReLU and the like; a ReLU behind max pooling is the same before it.
    while (node := _follower(run.nodes[-1])) and (kind := kind_of(net, node)) in ("relu", "same"):
        run.relu[-1] |= kind == "relu"
        run.nodes.append(node)


def _follower(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one's value, and no other's."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes == [node] else None


def _pool_size(net: fx.GraphModule, node: fx.Node) -> int:
    module = net.get_submodule(node.target) if node.op == "call_module" else None  # type: ignore[arg-type]
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return 0
    sizes = {*_pair(module.kernel_size), *_pair(module.stride)}
    plain = (*_pair(module.padding), *_pair(module.dilation)) == (0, 0, 1, 1)
    return sizes.pop() if len(sizes) == 1 and plain else 0


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else size
