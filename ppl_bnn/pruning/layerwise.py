"""The predictive of a compact dense network by sampling each layer's outputs in place of its weights."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_bnn.guides.mean_field import draw_seed
from ppl_bnn.pruning.compact import CompactLayer, CompactNetwork
from ppl_bnn.pruning.fastest import faster
from ppl_bnn.pruning.sparse_layers import SparseLinear, sparse_layer


def layerwise(network: CompactNetwork, x: Tensor) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """Prepare a function (x [N, ...], noise) -> logits [S, N, C] whose draws have, for each example, q's distribution.

    A layer's outputs are loc h + sqrt(scale^2 h^2) * eps (Kingma, Salimans and Welling 2015, eq. 6), exact for the
    Linear layers, ReLU, dropout and flattening that the network must consist of. Examples with the same noise depend
    on each other as such draws do, not as draws of weights would.

    Args:
        network: with its layers dense, as `compact` gives it.
        x: a batch as it will be used, of what `CompactNetwork.select` gives; loc and scale^2 are then held as dense or
            sparse matrices, whichever is faster on it with 400 draws.

    Raises:
        ValueError: the network has other layers.
    """
    steps: list[tuple[Callable[[Tensor], tuple[Tensor, Tensor]] | None, int]] = []
    layers = {layer.path: layer for layer in network.layers}
    rows = x.flatten(1)
    for node in network.net.graph.nodes:
        module = network.net.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Linear) and node.target in layers:
            moments = _moments(network, layers[node.target], module, rows)
            steps.append((moments, module.out_features))
            rows = x.new_ones(400 * len(x), module.out_features)
        elif isinstance(module, nn.ReLU):
            steps.append((None, 0))
        elif not isinstance(module, nn.Flatten | nn.Dropout | nn.Identity) and node.op not in ("placeholder", "output"):
            raise ValueError(f"layerwise prediction needs Linear layers and ReLU alone, the network has {node.target}")

    @torch.no_grad()
    def logits(x: Tensor, noise: Sequence[Tensor]) -> Tensor:
        h, draws, remaining = x.flatten(1), 1, list(noise)
        for moments, units in steps:
            if moments is None:
                h = h.relu_() if h.dim() == 3 else h.relu()
                continue
            eps = remaining.pop(0)
            mean, variance = moments(h.reshape(draws * len(x), -1))
            mean, sd = (part.view(draws, len(x), units) for part in (mean, variance.sqrt_()))
            h, draws = torch.addcmul(mean, sd, eps.unsqueeze(1)), len(eps)
        return h

    return logits


def layer_noise(network: CompactNetwork, num_samples: int, *, seed: int = 0) -> list[Tensor]:
    """Normal numbers for `layerwise`, [S, units] of each layer: those of a seed are the same for every input.

    They may be kept from one input to the next, which saves drawing them: each example's draws are what they would be
    alone.
    """
    generator = torch.Generator(network.loc.device).manual_seed(draw_seed(seed, 0))
    like = {"dtype": network.loc.dtype, "device": network.loc.device}
    return [
        torch.randn(num_samples, len(layer.entries.rows), generator=generator, **like)  # type: ignore[call-overload]
        for layer in network.layers
    ]


def _moments(
    network: CompactNetwork, layer: CompactLayer, module: nn.Linear, rows: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    shape, position = (module.out_features, module.in_features), layer.entries.position
    loc, variance = network.loc[layer.matrix].clone(), network.scale[layer.matrix].square()
    bias = layer.drawn_bias(network.loc)
    shifts = network.scale[layer.shifts].square() * layer.entries.shift_factor.square()
    bias_variance = torch.zeros_like(bias).index_add(0, layer.entries.shift_row, shifts)
    dense = [loc.new_zeros(shape) for _ in range(2)]
    for matrix, values in zip(dense, (loc, variance), strict=True):
        matrix.view(-1)[position] = values

    def by_dense(h: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(h, dense[0], bias), F.linear(h.square(), dense[1], bias_variance)

    sparse = [sparse_layer(module, position, *pair) for pair in ((loc, bias), (variance, bias_variance))]
    if not all(isinstance(part, SparseLinear) for part in sparse):
        return by_dense

    def by_sparse(h: Tensor) -> tuple[Tensor, Tensor]:
        return sparse[0](h), sparse[1](h.square())  # type: ignore[misc]

    return by_sparse if faster(lambda: by_sparse(rows), lambda: by_dense(rows)) else by_dense
