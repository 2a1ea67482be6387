"""A network without Pyro for prediction: torch's own layers only, batch norm folded into the layer before it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, names_given
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.random_network import random_networks, random_sites

# What torch.fx raises where a forward pass depends on values: control flow, len(), numbers and keys made of a proxy.
_TRACING_ERRORS = (fx.proxy.TraceError, TypeError, RuntimeError, KeyError, ValueError)


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


def plain(net: nn.Module, x: Inputs | None = None, *, fold: bool = True) -> PlainNetwork:
    """Return a copy of a network, Bayesian or not, as plain torch layers, batch norm folded in (running statistics).

    Weights of random sites are zero until they are set. `net` is not changed. Without `fold` batch norm is left.

    Args:
        x: inputs like those to come, for a forward pass with several. Optional parameters of the forward pass that
            inputs do not fill keep their defaults.

    Raises:
        NotTraceable: torch.fx cannot write its forward pass down as a graph, or a module has a forward hook. An error
            of another kind than torch.fx raises is the forward pass's own, and is raised as it is.
    """
    if hooked := [path for path, module in net.named_modules() if module._forward_hooks or module._forward_pre_hooks]:
        raise NotTraceable(f"{type(net).__name__} has a forward hook on {hooked[0]!r}, which its graph would leave out")
    random = _random_layers(net)
    try:
        # Of a copy of the modules, with the same tensors: a forward pass may keep what it computes as an attribute.
        traced = copy.deepcopy(net, {id(value): value for value in (*net.parameters(), *net.buffers())})
        # A graph has the mode it was traced in written into it where a forward pass asks for `self.training`.
        with evaluating(traced), own_parameters():
            graph = _LayersAsLeaves(names_given(net, x)).trace(traced)
    except _TRACING_ERRORS as error:
        raise NotTraceable(f"{type(net).__name__} has no fixed graph of layers: {error}") from error
    if not isinstance(next(reversed(graph.nodes)).args[0], fx.Node):
        raise NotTraceable(f"{type(net).__name__} returns no tensor")
    leaves: dict[str, nn.Module] = {}
    copies: dict[int, object] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            if "input" in node.kwargs:
                rest = {name: value for name, value in node.kwargs.items() if name != "input"}
                node.args, node.kwargs = (node.kwargs["input"], *node.args), rest
            leaves[node.target] = copy.deepcopy(net.get_submodule(node.target), copies)
        elif node.op == "get_attr":
            raise NotTraceable(f"{type(net).__name__} uses {node.target!r} outside of a layer")
    for path in random:
        owner, _, name = path.rpartition(".")
        if owner not in leaves:
            raise NotTraceable(f"{type(net).__name__} uses {path!r} in no layer of torch")
        nn.init.zeros_(leaves[owner].get_parameter(name).requires_grad_(False))
    _refuse_changes(graph, leaves, random)
    folded = _fold_batch_norm(graph, leaves, random) if fold else {}
    module = fx.GraphModule(leaves, graph, type(net).__name__)
    return PlainNetwork(module.eval().requires_grad_(False), folded)


def _random_layers(net: nn.Module) -> set[str]:
    """Paths of the random parameters, each of one layer of the network alone."""
    sites = random_sites(net)
    for site, (path, random) in sites.items():
        layer = random.places[0][0]
        if site != path or any(inner for inner, _ in random_networks(net)):
            raise NotTraceable(f"{type(net).__name__} has a network with random parameters of its own inside")
        if len(random.places) > 1:
            raise NotTraceable(f"{type(net).__name__} has the random parameter {site!r} in several layers")
        own = next((kind for kind in (nn.Linear, nn.Conv2d) if isinstance(layer, kind)), None)
        if own and (type(layer).forward is not own.forward or getattr(layer, "padding_mode", "zeros") != "zeros"):
            raise NotTraceable(f"{type(net).__name__} has a {own.__name__} of another kind, for {site!r}")
    return set(sites)


class _LayersAsLeaves(fx.Tracer):
    def __init__(self, given: set[str]) -> None:
        super().__init__()
        self._filled = given

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The arguments of the forward pass: its inputs, and the defaults of the others (``mask is not None``)."""
        function, found = super().create_args_for_root(*args, **kwargs)
        for at, value in enumerate(found):
            if isinstance(value, fx.Proxy) and value.node.args and value.node.target not in self._filled:
                found[at] = value.node.args[0]
                self.graph.erase_node(value.node)
        return function, found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        bases = [base for base in type(m).__mro__ if base not in (nn.Module, object)]
        return next(m.children(), None) is None and any(base.__module__.startswith("torch.nn") for base in bases)


def depending(graph: fx.Graph, layers: set[str]) -> set[fx.Node]:
    """The nodes of a graph whose values depend on some of its layers, those of the layers among them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in layers or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _refuse_changes(graph: fx.Graph, leaves: dict[str, nn.Module], random: set[str]) -> None:
    """Refuse a graph that writes into its input, or in each draw into a value that all draws share."""
    depends = depending(graph, {path.rpartition(".")[0] for path in random})
    inputs: set[fx.Node] = set()
    for node in graph.nodes:
        layer = leaves.get(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder" or (
            inputs.intersection(node.all_input_nodes)
            and (layer is None or isinstance(layer, nn.Flatten | nn.Unflatten | nn.Identity | nn.Dropout))
        ):
            # It may be a view of the input.
            inputs.add(node)
        written = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
        if _in_place(node, leaves):
            written += node.args[:1]
        for value in written:
            if value in inputs or (node in depends and value not in depends):
                raise NotTraceable(f"the network changes {value.name!r} in place")


def _in_place(node: fx.Node, leaves: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(leaves[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__")
    operators = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
    return bool(changes or name in operators or node.kwargs.get("inplace"))


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
        if {f"{node.target}.weight", f"{node.target}.bias"} & random:
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
