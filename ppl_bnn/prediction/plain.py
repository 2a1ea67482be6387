"""A network without Pyro for prediction: torch's own layers only, batch norm folded into the layer before it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.nn import PyroModule
from torch import Tensor, fx, nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.layers import BayesianConv2d, BayesianLinear
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.priors import map_tensors

# What torch.fx raises where a forward pass depends on values: control flow, len(), numbers and keys made of a proxy.
_TRACING_ERRORS = (fx.proxy.TraceError, TypeError, RuntimeError, KeyError)


class NotTraceable(UserError):
    """The network's forward pass depends on its input's values, so it has no fixed graph of layers."""


@dataclass(frozen=True)
class PlainNetwork:
    """What `plain` returns.

    Attributes:
        net: [N, ...] -> logits [N, C], in evaluation mode, no parameter asks for a gradient. Layers have the paths they
            had (``get_submodule("conv1_1")``; in the graph's order under ``net.graph.nodes``).
        folded: for each random site with batch norm behind it, factor and shift [out, 1, ...]: the plain network's
            weight is weight * factor + shift. Other sites are taken as they are.
        normalize: a function of a draw's (seed, index, sign) that sets batch norm to the draw's own statistics, once
            its weights are in place (`ppl_bnn.prediction.norm_statistics`); None: batch norm is folded, or as it is.
    """

    net: fx.GraphModule
    folded: dict[str, tuple[Tensor, Tensor]]
    normalize: Callable[[int, int, float], None] | None = None

    def fold(self, site: str, weight: Tensor) -> Tensor:
        """What a weight [*shape] of a random site is in the plain network, batch norm folded in."""
        if site not in self.folded:
            return weight
        factor, shift = self.folded[site]
        return weight * factor + shift

    def place(self, site: str, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of a random site's weights in the plain network, of the site's shape."""
        scale = scale * self.folded[site][0].abs() if site in self.folded else scale
        return self.fold(site, loc), scale

    @torch.no_grad()
    def set(self, site: str, weight: Tensor) -> None:
        """Set a random site to a drawn weight [*shape]; batch norm is folded into it."""
        self.parameter(site).copy_(self.fold(site, weight))

    def parameter(self, site: str) -> Tensor:
        """The plain network's weight (or bias) of a random site."""
        return self.net.get_parameter(site)


def plain(net: nn.Module, *, fold: bool = True) -> PlainNetwork:
    """Return a copy of a network, Bayesian or not, as plain torch layers, batch norm folded in (running statistics).

    Weights of random sites are zero until they are set. `net` is not changed. Without `fold` batch norm is left.

    Raises:
        NotTraceable: torch.fx cannot write its forward pass down as a graph, or a module has a forward hook. An error
            of another kind than torch.fx raises is the forward pass's own, and is raised as it is.
    """
    if hooked := [path for path, module in net.named_modules() if module._forward_hooks or module._forward_pre_hooks]:
        raise NotTraceable(f"{type(net).__name__} has a forward hook on {hooked[0]!r}, which its graph would leave out")
    tracer = _LayersAsLeaves()
    try:
        # A graph has the mode it was traced in written into it where a forward pass asks for `self.training`.
        with evaluating(net), own_parameters():
            graph = tracer.trace(net)
    except _TRACING_ERRORS as error:
        raise NotTraceable(f"{type(net).__name__} has no fixed graph of layers: {error}") from error
    leaves: dict[str, nn.Module] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            if "input" in node.kwargs:
                rest = {name: value for name, value in node.kwargs.items() if name != "input"}
                node.args, node.kwargs = (node.kwargs["input"], *node.args), rest
            leaves[node.target] = _plain_layer(net.get_submodule(node.target))
        elif node.op == "get_attr":
            raise NotTraceable(f"{type(net).__name__} uses {node.target!r} outside of a layer")
    random = {
        f"{path}.{name}"
        for path, layer in net.named_modules()
        if path in leaves and isinstance(layer, BayesianConv2d | BayesianLinear)
        for name in layer._pyro_samples  # type: ignore[union-attr]
    }
    folded = _fold_batch_norm(graph, leaves, random) if fold else {}
    module = fx.GraphModule(leaves, graph, type(net).__name__)
    return PlainNetwork(module.eval().requires_grad_(False), folded)


class _LayersAsLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BayesianConv2d | BayesianLinear) or (
            next(m.children(), None) is None and any(base.__module__.startswith("torch.nn") for base in _bases(m))
        )


def _bases(module: nn.Module) -> list[type]:
    # Pyro mixes its own class into a module's; Module itself says nothing about which layer it is.
    return [base for base in type(module).__mro__ if base is not nn.Module and not issubclass(base, PyroModule)]


def _plain_layer(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, BayesianConv2d | BayesianLinear):
        # The torch layer with the state of what Pyro made of it.
        other: nn.Module = object.__new__(_bases(layer)[0])
        other.__dict__.update(copy.deepcopy(layer.__dict__))
        return other
    new: nn.Module
    bias = layer.bias is not None
    if isinstance(layer, BayesianConv2d):
        new = nn.utils.skip_init(
            nn.Conv2d, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
            layer.padding, layer.dilation, layer.groups, bias,
        )  # fmt: skip
    else:
        new = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias)
    new.to(_tensor_of(layer))
    nn.init.zeros_(new.weight)  # type: ignore[arg-type]
    if bias and "bias" not in layer._pyro_samples:  # type: ignore[operator]
        new.bias = nn.Parameter(layer.bias.detach().clone())  # type: ignore[union-attr]
    elif bias:
        nn.init.zeros_(new.bias)  # type: ignore[arg-type]
    return new


def _tensor_of(layer: BayesianConv2d | BayesianLinear) -> Tensor:
    """One of a layer's tensors, which tells its device and dtype; where nothing is a point estimate, its prior's."""
    found: list[Tensor] = list(layer.parameters())

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for prior in layer._pyro_samples.values():  # type: ignore[operator,union-attr]
        map_tensors(prior, note)
    return found[0]


def _fold_batch_norm(
    graph: fx.Graph, layers: dict[str, nn.Module], random: set[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    folded: dict[str, tuple[Tensor, Tensor]] = {}
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        norm, source = layers[node.target], node.args[0]
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
            continue
        if source.op != "call_module" or len(source.users) > 1 or uses[source.target] > 1:
            continue
        layer = layers[source.target]
        if not isinstance(layer, nn.Conv2d | nn.Linear) or len(layer.weight) != norm.num_features:
            continue
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(_only_vectors)
        _fold(layer, norm, source.target, random, folded)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return folded


def _only_vectors(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].dim() != 2:
        raise UserError(
            f"the batch norm behind {layer} was taken for one over its features, but the layer sees "
            f"{list(inputs[0].shape)}, of which BatchNorm1d has dimension 1 for features; "
            "give the layer one vector an example, or predict with norm_inputs"
        )


@torch.no_grad()
def _fold(
    layer: nn.Conv2d | nn.Linear,
    norm: nn.BatchNorm1d | nn.BatchNorm2d,
    path: str,
    random: set[str],
    folded: dict[str, tuple[Tensor, Tensor]],
) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor + (norm.bias if norm.affine else 0)
    by_row = factor.view(-1, *[1] * (layer.weight.dim() - 1))
    if f"{path}.weight" in random:
        folded[f"{path}.weight"] = (by_row, torch.zeros_like(by_row))
    else:
        layer.weight.mul_(by_row)
    if f"{path}.bias" in random:
        folded[f"{path}.bias"] = (factor, shift)
    else:
        bias = shift if layer.bias is None else layer.bias * factor + shift
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
