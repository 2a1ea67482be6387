"""The predictive of a compact dense network by sampling each layer's outputs in place of its weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.compact.forms import sparse_cost
from ppl_bnn.prediction.compact.network import CompactLayer, CompactNetwork
from ppl_bnn.prediction.compact.runs import Run, dense_runs
from ppl_bnn.prediction.compact.sparse_layers import SparseLinear, draws_noise, sparse_draws, sparse_layer
from ppl_bnn.prediction.compact.units import kind_of

# Matrix and bias of the mean, and of the variance.
Matrices = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class NotDense(UserError):
    """A network with other layers than layerwise draws of a compact network know."""


@torch.no_grad()
def compact_draws(network: CompactNetwork, rows: int = 1, num_samples: int = 400) -> "DenseDraws | SparseDraws":
    """Prepare draws of logits [S, N, C] that have, for each example, q's distribution.

    A layer's outputs are loc h + sqrt(scale^2 h^2) * eps (Kingma, Salimans and Welling 2015, eq. 6), exact for the
    Linear layers, ReLU, dropout and flattening that the network must consist of. Examples with the same noise depend
    on each other as such draws do, not as draws of weights would.

    Args:
        network: with its layers dense, as `compact` gives it. The draws hold its posterior as it is now.
        rows, num_samples: examples and draws of a request like those to come. The layers are held as dense or as
            sparse matrices, whichever takes fewer operations for it.

    Raises:
        NotDense: the network has other layers.
    """
    run = _only_run(network)
    units = [len(layer.entries.rows) for layer in network.layers]
    dense, sparse = zip(*(_forms(network, layer) for layer in run.layers), strict=True)
    pairs = [pair for pair in sparse if isinstance(pair[0], SparseLinear)]
    if len(pairs) == len(sparse) and sparse_pays(network, run, rows, num_samples):
        return SparseDraws(pairs, run.relu, units, network.loc)
    return DenseDraws(dense, run.relu, units, network.loc)


def sparse_pays(network: CompactNetwork, run: Run, rows: int, num_samples: int) -> bool:
    """Whether draws cost fewer operations in sparse form: the first layer sees the examples, others every draw too."""
    cost, dense, seen = 0.0, 0, rows
    for layer in run.layers:
        module = network.net.get_submodule(layer.path)
        cost += seen * len(layer.entries.position) * sparse_cost(module, seen)
        dense += seen * module.get_parameter("weight").numel()
        seen = rows * num_samples
    return cost < dense


class DenseDraws:
    """Draws of logits by layers whose moments are held as dense matrices."""

    def __init__(self, layers: Sequence[Matrices], relu: Sequence[bool], units: list[int], like: Tensor) -> None:
        # A variance of the bias of 0 is none.
        self.layers = [
            (loc, bias, variance, bias_variance if bool(bias_variance.any()) else None)
            for (loc, bias), (variance, bias_variance) in layers
        ]
        self.relu, self.units, self.like = relu, units, like

    def noise(self, num_samples: int, seed: int) -> list[Tensor]:
        """Normal numbers [S, units] of each layer for S draws.

        Those of a seed are the same for every input, and may be kept from one input to the next, which saves drawing
        them: each example's draws are what they would be alone.
        """
        parts = draws_noise(sum(self.units), num_samples, draw_seed(seed, 0), self.like).split(self.units, 1)
        return [part.transpose(1, 2).flatten(0, 1)[:num_samples] for part in parts]

    @torch.no_grad()
    def logits(self, x: Tensor, noise: Sequence[Tensor], num_samples: int) -> Tensor:
        """Draws [S, N, C] of what `CompactNetwork.select` gives of inputs [N, ...]."""
        h, draws = x.flatten(1), 1
        for (loc, bias, variance, bias_variance), relu, eps in zip(self.layers, self.relu, noise, strict=True):
            # [1, N, units] before the first random numbers, then [S, N, units].
            mean = F.linear(h, loc, bias).view(draws, len(x), -1)
            std = F.linear(h.square(), variance, bias_variance).sqrt_().view(draws, len(x), -1)
            h, draws = torch.addcmul(mean, std, eps[:, None]).flatten(0, 1), num_samples
            h = h.relu_() if relu else h
        return h.view(draws, len(x), -1)

    def __call__(self, x: Tensor, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws [S, N, C] of logits, the same for the same seed."""
        return self.logits(x, self.noise(num_samples, seed), num_samples)


class SparseDraws:
    """The same draws, from the same numbers, by layers held as sparse matrices: one C call from input to logits."""

    def __init__(
        self, layers: Sequence[Sequence[SparseLinear]], relu: Sequence[bool], units: list[int], like: Tensor
    ) -> None:
        self.draws, self.units, self.like = sparse_draws(layers, relu), units, like

    def noise(self, num_samples: int, seed: int) -> Tensor:
        """Normal numbers for S draws, which may be kept as those of `DenseDraws.noise`."""
        return draws_noise(sum(self.units), num_samples, draw_seed(seed, 0), self.like)

    def logits(self, x: Tensor, noise: Tensor, num_samples: int) -> Tensor:
        """Draws [S, N, C] of what `CompactNetwork.select` gives of inputs [N, ...]."""
        return self.draws(x.flatten(1), noise, num_samples)

    def __call__(self, x: Tensor, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws [S, N, C] of logits, the same for the same seed; the numbers are made where they are used."""
        return self.draws(x.flatten(1), draw_seed(seed, 0), num_samples)


def _only_run(network: CompactNetwork) -> Run:
    runs = dense_runs(network)
    for node in network.net.graph.nodes:
        known = node.op in ("placeholder", "output") or kind_of(network.net, node) in ("flatten", "same")
        if not (known or any(node in run.nodes for run in runs)):
            raise NotDense(f"layerwise prediction needs Linear layers and ReLU alone, the network has {node.target}")
    assert len(runs) == 1
    return runs[0]


def _forms(network: CompactNetwork, layer: CompactLayer) -> tuple[Matrices, list[nn.Module | None]]:
    # Matrix and bias of the mean and of the variance, and the sparse layers with them.
    module, position = network.net.get_submodule(layer.path), layer.entries.position
    assert isinstance(module, nn.Linear)
    bias = layer.drawn_bias(network.loc)
    shifts = network.scale[layer.shifts].square() * layer.entries.shift_factor.square()
    bias_variance = torch.zeros_like(bias).index_add(0, layer.entries.shift_row, shifts)
    values = network.loc[layer.matrix], network.scale[layer.matrix].square()
    pairs = list(zip(values, (bias, bias_variance), strict=True))
    dense = [torch.zeros_like(module.weight).put_(position, matrix) for matrix, _ in pairs]
    matrices = (dense[0], pairs[0][1]), (dense[1], pairs[1][1])
    return matrices, [sparse_layer(module, position, *pair) for pair in pairs]
