"""Each layer of a compact network in its cheaper form, dense or sparse, and whether such a network pays at all.

Decided by counts of multiplications before the first draw, so that the same posterior and request give the same bits
on any machine, under any load. The constants are break-even points that were measured once (one thread, AMD EPYC with
AVX2; dense layers by batch size: sparse wins above 60% zeros at 100 rows, 78% at 8 rows, 95% at one row;
convolutions of 64 to 256 channels above 80%).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from ppl_bnn.prediction.compact.network import CompactNetwork
from ppl_bnn.prediction.compact.runs import Run, convolution_runs, dense_runs
from ppl_bnn.prediction.compact.sparse_layers import SparseConv2d, SparseLinear, sparse_layer

# A multiplication in sparse form by the time of one in dense form: of a dense layer this much and so much more for each
# row of a smaller batch, of a convolution.
_LINEAR, _FEW_ROWS, _CONVOLUTION = 2.5, 17.0, 5.0
# In the same unit: writing a weight that is left into the compact network, an output of a sparse convolution, and a
# layer's share of a draw; and how much less a draw must cost.
_WRITE, _OUTPUT, _LAYER, _GAIN = 50.0, 180.0, 1e6, 0.8


@torch.no_grad()
def choose_layers(network: CompactNetwork, rows: int) -> dict[str, str]:
    """Replace every layer that is cheaper sparse by its sparse form; {path: "dense" or "sparse"}.

    Linear layers with nothing but ReLU and dropout between them are chosen together, and a convolution with the ReLU
    and the max pooling behind it, for their sparse forms compute all that in one pass. Outputs change by no more than
    rounding. Without a C compiler, on a GPU, and for convolutions with a stride, layers stay dense.

    Args:
        rows: examples a forward pass.
    """
    chosen = {layer.path: "dense" for layer in network.layers}
    for run in (*dense_runs(network), *convolution_runs(network)):
        if not sparse_pays(network, run, rows) or (forms := _sparse_forms(network, run)) is None:
            continue
        for layer, form in zip(run.layers, forms, strict=True):
            network.net.set_submodule(layer.path, form)
            chosen[layer.path] = "sparse"
        if len(run.nodes) > 1:
            # torch 2.6 refuses to put a node in its own place.
            run.nodes[-1].replace_all_uses_with(run.nodes[0])
        for node in reversed(run.nodes[1:]):
            network.net.graph.erase_node(node)
    network.net.recompile()
    return chosen


def sparse_pays(network: CompactNetwork, run: Run, rows: int) -> bool:
    """Whether a run of layers is cheaper in its sparse form, for so many rows in a batch."""
    modules = [network.net.get_submodule(layer.path) for layer in run.layers]
    dense = sum(module.get_parameter("weight").numel() for module in modules)
    left = sum(len(layer.entries.position) for layer in run.layers)
    return left * sparse_cost(modules[0], rows) < dense


def sparse_cost(layer: nn.Module, rows: int) -> float:
    """Time of a sparse multiplication, for so many rows in a batch, by that of a dense one."""
    return _CONVOLUTION if isinstance(layer, nn.Conv2d | SparseConv2d) else _LINEAR + _FEW_ROWS / max(1, rows)


def compact_pays(
    network: CompactNetwork,
    chosen: Mapping[str, str],
    uses: Mapping[str, int],
    dense: Mapping[str, int],
    examples: int,
    rows: int,
) -> bool:
    """Whether a draw costs clearly less in the compact network than in the plain one.

    Args:
        chosen: what `choose_layers` returned.
        uses: multiplications of each weight for one example (`uses_of`).
        dense: number of weights of each layer in the plain network.
        examples, rows: examples of the request, and of a forward pass.
    """
    cost = _WRITE * len(network.loc) + _LAYER * len(network.layers)
    for layer in network.layers:
        module = network.net.get_submodule(layer.path)
        if chosen[layer.path] == "sparse":
            each = len(layer.entries.position) * sparse_cost(module, rows)
            each += _OUTPUT * len(layer.entries.rows) * isinstance(module, SparseConv2d)
        else:
            each = module.get_parameter("weight").numel()
        cost += examples * uses[layer.path] * each
    return cost < _GAIN * examples * sum(uses[path] * count for path, count in dense.items())


def uses_of(net: fx.GraphModule, layers: Iterable[str], x: Tensor) -> dict[str, int]:
    """How often one example x [1, ...] meets each weight of a layer: rows of a dense one, places of a convolution."""
    uses = dict.fromkeys(layers, 0)

    def count(path: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        uses[path] += output.numel() // len(layer.get_parameter("weight"))

    hooks = [net.get_submodule(path).register_forward_hook(partial(count, path)) for path in uses]
    with torch.inference_mode():
        net(x)
    for hook in hooks:
        hook.remove()
    return uses


def _sparse_forms(network: CompactNetwork, run: Run) -> list[SparseLinear | SparseConv2d] | None:
    forms: list[SparseLinear | SparseConv2d] = []
    for layer, relu in zip(run.layers, run.relu, strict=True):
        dense = network.net.get_submodule(layer.path)
        values = network.weights[layer.matrix]
        form = sparse_layer(dense, layer.entries.position, values, dense.bias)  # type: ignore[arg-type]
        if form is None:
            return None
        form.relu = relu
        forms.append(form)
    first = forms[0]
    if isinstance(first, SparseConv2d):
        first.pool = run.pool
    else:
        first.then = [form for form in forms[1:] if isinstance(form, SparseLinear)]
    return forms
