"""Which units, filters, pixels and weights of a pruned network its outputs depend on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ppl_bnn.guides.posterior import Factorized, Posterior
from ppl_bnn.prediction.plain import PlainNetwork

# What a constant passes through as it is.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_RELUS = ("relu", "relu_", F.relu, torch.relu)
_FLATTENS = ("flatten", torch.flatten)


@dataclass(frozen=True)
class Entries:
    """What is left of a layer, in and out counted without what is gone.

    Attributes:
        rows, columns: positions of the units that are left among the layer's outputs [out] and inputs [in].
        position: of each weight that is left, in the smaller layer's flattened weight [m].
        source: in the site's flattened weight [m + k]: the same m weights, then k weights out of constant units.
        bias_source: positions of the random biases [b].
        shift_row, shift_factor: which output the last k weights and the b biases are added to, times what [k + b].
    """

    rows: Tensor
    columns: Tensor
    position: Tensor
    source: Tensor
    bias_source: Tensor
    shift_row: Tensor
    shift_factor: Tensor


@dataclass(frozen=True)
class _Link:
    before: str
    relu: bool


def remaining(plain: PlainNetwork, guide: Factorized) -> tuple[dict[str, Entries], Tensor | None]:
    """The entries left in each layer of random weights, {path: Entries}, and the pixels left, if some can go."""
    layers = _random_layers(plain, guide)
    links, pixels_into = _links(plain.net, layers)
    matrix: dict[str, Tensor] = {}  # [out, units, weights between the two]: weights that multiply an input
    shift: dict[str, Tensor] = {}  # the same: weights that multiply a constant
    factor: dict[str, Tensor] = {}  # [units]: that constant
    constant: dict[str, tuple[Tensor, Tensor]] = {}  # [out] each: is it constant, and what
    for path, module in layers.items():
        loc, scale = guide.loc_scale(f"{path}.weight")
        kept = ((scale > 0) | (loc != 0)).flatten(2 if module.weight.dim() > 2 else 1)
        units = layers[links[path].before].weight.shape[0] if path in links else module.weight.shape[1]
        matrix[path] = kept.reshape(len(kept), units, -1)
        shift[path] = torch.zeros_like(matrix[path])
        factor[path] = torch.zeros(units, dtype=module.weight.dtype, device=kept.device)
        if path in links:
            known, value = constant[links[path].before]
            value = value.relu() if links[path].relu else value
            if isinstance(module, nn.Conv2d) and module.padding not in (0, (0, 0), "valid"):
                known = known & (value == 0)
            shift[path] = matrix[path] & (known & (value != 0))[:, None]
            matrix[path] = matrix[path] & ~known[:, None]
            factor[path] = value
        random_bias, bias = _bias(plain, guide, path, module)
        constant[path] = ~((matrix[path] | shift[path]).flatten(1).any(1) | random_bias), bias
    rows = {path: torch.ones(len(kept), dtype=torch.bool, device=kept.device) for path, kept in matrix.items()}
    columns = {path: torch.ones(kept.shape[1], dtype=torch.bool, device=kept.device) for path, kept in matrix.items()}
    for path in reversed(layers):
        matrix[path] &= rows[path][:, None, None]
        if path in links or path == pixels_into:
            columns[path] = _at_least_one(matrix[path].any(2).any(0))
            if path in links:
                rows[links[path].before] = columns[path]
    found = {}
    for path, module in layers.items():
        random_bias = _bias(plain, guide, path, module)[0] & rows[path]
        found[path] = _entries(
            matrix[path], shift[path] & rows[path][:, None, None], factor[path], random_bias, rows[path], columns[path],
            module.weight.shape[1],
        )  # fmt: skip
    return found, columns[pixels_into].nonzero().flatten() if pixels_into else None


def _entries(
    matrix: Tensor, shift: Tensor, factor: Tensor, random_bias: Tensor, rows: Tensor, columns: Tensor, inputs: int
) -> Entries:
    weights = torch.arange(matrix.numel(), device=matrix.device).view_as(matrix)
    shift_row, shift_unit = shift.nonzero()[:, :2].T
    new_row = rows.cumsum(0) - 1
    bias_source = random_bias.nonzero().flatten()
    return Entries(
        rows=rows.nonzero().flatten(),
        columns=columns.repeat_interleave(inputs // len(columns)).nonzero().flatten(),
        position=matrix[rows][:, columns].flatten().nonzero().flatten(),
        source=torch.cat([weights[matrix], weights[shift]]),
        bias_source=bias_source,
        shift_row=new_row[torch.cat([shift_row, bias_source])],
        shift_factor=torch.cat([factor[shift_unit], factor.new_ones(len(bias_source))]),
    )


def _bias(plain: PlainNetwork, guide: Factorized, path: str, module: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    # Which biases are random, and the value of the others.
    if f"{path}.bias" in guide.sites:
        loc, scale = plain.place(f"{path}.bias", *guide.loc_scale(f"{path}.bias"))
        return scale > 0, loc
    bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
    return torch.zeros_like(bias, dtype=torch.bool), bias


def _at_least_one(alive: Tensor) -> Tensor:
    # A layer that lost every weight keeps one input, times 0: torch has no convolution of no channels.
    if not alive.any():
        alive[0] = True
    return alive


def _random_layers(plain: PlainNetwork, guide: Posterior) -> dict[str, nn.Linear | nn.Conv2d]:
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for node in plain.net.graph.nodes:
        if node.op == "call_module" and f"{node.target}.weight" in guide.sites:
            layers[node.target] = plain.net.get_submodule(node.target)  # type: ignore[assignment]
    return layers


def _links(net: fx.GraphModule, layers: dict[str, nn.Linear | nn.Conv2d]) -> tuple[dict[str, _Link], str | None]:
    links: dict[str, _Link] = {}
    pixels_into = None
    targets = [node.target for node in net.graph.nodes if node.op == "call_module"]
    for node in net.graph.nodes:
        if not (node.op == "placeholder" or node.target in layers) or targets.count(node.target) > 1:
            continue
        relu, flat, after = False, False, node
        while len(after.users) == 1:
            after = next(iter(after.users))
            kind = kind_of(net, after)
            relu, flat = relu or kind == "relu", flat or kind == "flatten"
            if after.op == "call_module" and after.target in layers:
                layer = layers[after.target]
                if targets.count(after.target) > 1:
                    break
                if node.op == "call_module" and _fit(layers[node.target], layer, flat):
                    links[after.target] = _Link(node.target, relu)
                elif node.op == "placeholder" and flat and not relu and isinstance(layer, nn.Linear):
                    pixels_into = after.target
                break
            if kind is None or (node.op == "placeholder" and kind == "pool"):
                break
    return links, pixels_into


def _fit(before: nn.Linear | nn.Conv2d, after: nn.Linear | nn.Conv2d, flat: bool) -> bool:
    # Whether each unit of one layer is a known block of the other's inputs.
    if isinstance(before, nn.Conv2d) and (before.groups > 1 or flat != isinstance(after, nn.Linear)):
        return False
    if isinstance(after, nn.Conv2d):
        return isinstance(before, nn.Conv2d) and after.groups == 1 and after.padding_mode == "zeros"
    return isinstance(before, nn.Conv2d) or before.out_features == after.in_features


def kind_of(net: fx.GraphModule, node: fx.Node) -> str | None:
    """What a node that is no random layer does: "relu", "flatten", "pool", "same" (nothing), or None, anything else."""
    if node.op == "call_module":
        module = net.get_submodule(node.target)  # type: ignore[arg-type]
        if isinstance(module, nn.ReLU):
            return "relu"
        if isinstance(module, nn.Flatten):
            return "flatten" if module.start_dim == 1 and module.end_dim == -1 else None
        if isinstance(module, nn.Dropout | nn.Identity):
            return "same"
        if isinstance(module, nn.AvgPool2d) and (module.padding not in (0, (0, 0)) or module.divisor_override):
            return None  # a constant's average is another
        return "pool" if isinstance(module, _POOLS) else None
    if node.target in _RELUS:
        return "relu"
    return "flatten" if node.target in _FLATTENS and node.args[1:] == (1,) and not node.kwargs else None
