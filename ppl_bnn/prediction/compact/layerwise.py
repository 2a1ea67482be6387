"""The predictive of a compact dense network by sampling each layer's outputs in place of its weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.compact.fastest import faster
from ppl_bnn.prediction.compact.network import CompactLayer, CompactNetwork
from ppl_bnn.prediction.compact.runs import Run, dense_runs
from ppl_bnn.prediction.compact.sparse_layers import SparseLinear, draws_noise, sparse_draws, sparse_layer
from ppl_bnn.prediction.compact.units import kind_of

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


class NotDense(UserError):
    """A network with other layers than layerwise draws of a compact network know."""


class LayerwiseDraws(NamedTuple):
    """What `layerwise` prepares.

    Attributes:
        noise: (S, seed) -> normal numbers for S draws. Those of a seed are the same for every input, and may be kept
            from one input to the next, which saves drawing them: each example's draws are what they would be alone.
        logits: (x [N, ...], noise, S) -> draws [S, N, C].
        once: (S, seed) -> noise for `logits` that is not kept.
    """

    noise: Callable[[int, int], Any]
    logits: Callable[[Tensor, Any, int], Tensor]
    once: Callable[[int, int], Any]

    def __call__(self, x: Tensor, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws [S, N, C] of logits, the same for the same seed."""
        return self.logits(x, self.once(num_samples, seed), num_samples)


@torch.no_grad()
def layerwise(network: CompactNetwork, x: Tensor, num_samples: int = 400) -> LayerwiseDraws:
    """Prepare draws of logits [S, N, C] that have, for each example, q's distribution.

    A layer's outputs are loc h + sqrt(scale^2 h^2) * eps (Kingma, Salimans and Welling 2015, eq. 6), exact for the
    Linear layers, ReLU, dropout and flattening that the network must consist of. Examples with the same noise depend
    on each other as such draws do, not as draws of weights would.

    Args:
        network: with its layers dense, as `compact` gives it. The draws hold its posterior as it is now.
        x, num_samples: a request like those to come, of what `CompactNetwork.select` gives. The layers are held as
            dense or as sparse matrices, whichever answers it faster.

    Raises:
        NotDense: the network has other layers.
    """
    run = _only_run(network)
    units = [len(layer.entries.rows) for layer in network.layers]

    def numbers(num_samples: int, seed: int) -> Tensor:
        return draws_noise(sum(units), num_samples, draw_seed(seed, 0), network.loc)

    def by_layer(num_samples: int, seed: int) -> list[Tensor]:
        # The same numbers, [S, units] of each layer.
        parts = numbers(num_samples, seed).split(units, 1)
        return [part.transpose(1, 2).flatten(0, 1)[:num_samples] for part in parts]

    dense, sparse = zip(*(_forms(network, layer) for layer in run.layers), strict=True)
    found = LayerwiseDraws(by_layer, _dense_draws(dense, run.relu), by_layer)
    if isinstance(sparse[0][0], SparseLinear):
        draws = sparse_draws(sparse, run.relu)
        other = LayerwiseDraws(
            numbers,
            lambda x, noise, count: draws(x.flatten(1), noise, count),
            lambda count, seed: draw_seed(seed, 0),
        )
        if faster(lambda: other(x, num_samples), lambda: found(x, num_samples)):
            return other
    return found


def _only_run(network: CompactNetwork) -> Run:
    runs = dense_runs(network)
    for node in network.net.graph.nodes:
        known = node.op in ("placeholder", "output") or kind_of(network.net, node) in ("flatten", "same")
        if not (known or any(node in run.nodes for run in runs)):
            raise NotDense(f"layerwise prediction needs Linear layers and ReLU alone, the network has {node.target}")
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
    matrices = [(matrix, bias) for matrix, (_, bias) in zip(dense, pairs, strict=True)]
    return matrices, [sparse_layer(module, position, *pair) for pair in pairs]


def _dense_moments(layer: Sequence[tuple[Tensor, Tensor]]) -> Moments:
    (loc, bias), (variance, bias_variance) = layer
    random_bias = bool(bias_variance.any())

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, loc, bias), F.linear(x.square(), variance, bias_variance if random_bias else None)

    return moments


def _dense_draws(layers: Sequence[Sequence[tuple[Tensor, Tensor]]], relu: Sequence[bool]) -> Callable[..., Tensor]:
    first, *others = (_dense_moments(layer) for layer in layers)

    @torch.no_grad()
    def draws(x: Tensor, noise: Sequence[Tensor], num_samples: int) -> Tensor:
        # [1, N, units] before the first random numbers, then [S, N, units].
        moments = [part[None] for part in first(x.flatten(1))]
        for at, eps in enumerate(noise):
            h = torch.addcmul(moments[0], moments[1].sqrt_(), eps[:, None])
            h = h.relu_() if relu[at] else h
            if at < len(others):
                moments = [part.view(*h.shape[:2], -1) for part in others[at](h.flatten(0, 1))]
        return h

    return draws
