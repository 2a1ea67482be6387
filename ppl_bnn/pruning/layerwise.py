"""The predictive of a compact dense network by sampling each layer's outputs in place of its weights."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ppl_bnn.guides.mean_field import draw_seed
from ppl_bnn.normals import normals
from ppl_bnn.pruning.compact import CompactLayer, CompactNetwork
from ppl_bnn.pruning.fastest import faster
from ppl_bnn.pruning.runs import Run, dense_runs
from ppl_bnn.pruning.sparse_layers import SparseLinear, sparse_draws, sparse_layer
from ppl_bnn.pruning.units import kind_of

Draws = Callable[[Tensor, Sequence[Tensor]], Tensor]
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def layerwise(network: CompactNetwork, x: Tensor) -> Draws:
    """Prepare a function (x [N, ...], noise) -> logits [S, N, C] whose draws have, for each example, q's distribution.

    A layer's outputs are loc h + sqrt(scale^2 h^2) * eps (Kingma, Salimans and Welling 2015, eq. 6), exact for the
    Linear layers, ReLU, dropout and flattening that the network must consist of. Examples with the same noise depend
    on each other as such draws do, not as draws of weights would.

    Args:
        network: with its layers dense, as `compact` gives it.
        x: a batch as it will be used, of what `CompactNetwork.select` gives. The first layer, and then the others
            together, are held as dense or sparse matrices, whichever is faster on it with 400 draws.

    Raises:
        ValueError: the network has other layers.
    """
    run = _only_run(network)
    dense, sparse = zip(*(_forms(network, layer) for layer in run.layers), strict=True)
    first, draws = _dense_moments(dense[0]), _dense_draws(dense, run.relu)
    if isinstance(sparse[0][0], SparseLinear):
        x, moments = x.flatten(1), first(x.flatten(1))
        first = _faster(_sparse_moments(sparse[0]), first, x)
        draws = _faster(partial(sparse_draws, sparse, run.relu), draws, *moments, layer_noise(network, 400))
    return torch.no_grad()(lambda x, noise: draws(*first(x.flatten(1)), noise))


def layer_noise(network: CompactNetwork, num_samples: int, *, seed: int = 0) -> list[Tensor]:
    """Normal numbers for `layerwise`, [S, units] of each layer: those of a seed are the same for every input.

    They may be kept from one input to the next, which saves drawing them: each example's draws are what they would be
    alone.
    """
    units = [len(layer.entries.rows) for layer in network.layers]
    noise = normals(draw_seed(seed, 0), num_samples * sum(units), network.loc)
    # In memory each unit's draws are side by side, as the matrices' products take them.
    return [part.view(-1, num_samples).T for part in noise.split([num_samples * count for count in units])]


def _only_run(network: CompactNetwork) -> Run:
    runs = dense_runs(network)
    for node in network.net.graph.nodes:
        known = node.op in ("placeholder", "output") or kind_of(network.net, node) in ("flatten", "same")
        if not (known or any(node in run.nodes for run in runs)):
            raise ValueError(f"layerwise prediction needs Linear layers and ReLU alone, the network has {node.target}")
    assert len(runs) == 1
    return runs[0]


def _forms(network: CompactNetwork, layer: CompactLayer) -> tuple[list[tuple[Tensor, Tensor]], list[nn.Module | None]]:
    # Matrix and bias of the mean and of the variance, and the sparse layers with them.
    module, position = network.net.get_submodule(layer.path), layer.entries.position
    assert isinstance(module, nn.Linear)
    bias = layer.drawn_bias(network.loc)
    shifts = network.scale[layer.shifts].square() * layer.entries.shift_factor.square()
    bias_variance = torch.zeros_like(bias).index_add(0, layer.entries.shift_row, shifts)
    values = network.loc[layer.matrix], network.scale[layer.matrix].square()
    pairs = list(zip(values, (bias, bias_variance), strict=True))
    dense = [torch.zeros_like(module.weight).put_(position, matrix) for matrix, _ in pairs]
    matrices = [(matrix, bias[:, None]) for matrix, (_, bias) in zip(dense, pairs, strict=True)]
    return matrices, [sparse_layer(module, position, *pair) for pair in pairs]


def _dense_moments(layer: Sequence[tuple[Tensor, Tensor]]) -> Moments:
    (loc, bias), (variance, bias_variance) = layer
    random_bias = bool(bias_variance.any())

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.T.square()
        spread = torch.addmm(bias_variance, variance, squares) if random_bias else torch.mm(variance, squares)
        return torch.addmm(bias, loc, x.T), spread

    return moments


def _sparse_moments(layer: Sequence[SparseLinear]) -> Moments:
    return lambda x: (layer[0](x).T, layer[1](x.square()).T)


def _dense_draws(layers: Sequence[Sequence[tuple[Tensor, Tensor]]], relu: Sequence[bool]) -> Callable[..., Tensor]:
    others = [_dense_moments(layer) for layer in layers[1:]]

    def draws(mean: Tensor, variance: Tensor, noise: Sequence[Tensor]) -> Tensor:
        # Units come first, then draws, then examples.
        moments = mean[:, None], variance[:, None]
        for at, eps in enumerate(noise):
            h = torch.addcmul(moments[0], moments[1].sqrt_(), eps.T[..., None])
            h = h.relu_() if relu[at] else h
            if at < len(others):
                found = others[at](h.flatten(1).T)
                moments = found[0].view(-1, *h.shape[1:]), found[1].view(-1, *h.shape[1:])
        return h.permute(1, 2, 0)

    return draws


def _faster(one: Callable, other: Callable, *arguments: object) -> Callable:
    return one if faster(lambda: one(*arguments), lambda: other(*arguments)) else other
