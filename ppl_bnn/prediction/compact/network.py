"""A pruned network made smaller: units, filters and pixels that do not matter are gone, its outputs are the same."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ppl_bnn.guides.posterior import Factorized
from ppl_bnn.native.normals import draw_seed, normals
from ppl_bnn.prediction.compact.units import Entries, remaining
from ppl_bnn.prediction.plain import PlainNetwork


@dataclass(frozen=True)
class CompactLayer:
    """A layer of random weights in a compact network, and where its n weights lie in the flat vector of a draw.

    Attributes:
        path: its module's path, as in the plain network.
        entries: which weights are left, where they come from and where they go.
        start: of its weights in the flat vector: matrix entries, then those that only move the bias.
        bias: [out], what the bias is without the random entries.
    """

    path: str
    entries: Entries
    start: int
    bias: Tensor

    @property
    def matrix(self) -> slice:
        """The matrix entries in the flat vector."""
        return slice(self.start, self.start + len(self.entries.position))

    @property
    def shifts(self) -> slice:
        """The entries that only move the bias, in the flat vector."""
        return slice(self.matrix.stop, self.matrix.stop + len(self.entries.shift_row))

    def drawn_bias(self, weights: Tensor) -> Tensor:
        """The bias [out] of the draw in the flat vector [total]."""
        if not len(self.entries.shift_row):
            return self.bias
        return self.bias.index_add(0, self.entries.shift_row, weights[self.shifts] * self.entries.shift_factor)


@dataclass(frozen=True)
class CompactNetwork:
    """What `compact` returns.

    Attributes:
        net: the smaller network of plain torch layers; `set_weights` gives it a draw.
        layers: its layers of random weights, in order.
        pixels: positions of the input's features [P] that are left, for `net` takes these alone; None takes all.
        loc, scale: of the weights that are left, flat [total]: layer after layer, in each row after row.
        weights: the draw that the network has now [total].
    """

    net: fx.GraphModule
    layers: list[CompactLayer]
    pixels: Tensor | None
    loc: Tensor
    scale: Tensor
    weights: Tensor

    def select(self, x: Tensor) -> Tensor:
        """The part of the inputs [N, ...] that `net` takes."""
        return x if self.pixels is None else x.flatten(1).index_select(1, self.pixels)

    def draw(self, index: int, *, seed: int = 0) -> None:
        """Set the weights to draw number `index`: one normal number for each weight that is left.

        The same (seed, index) gives the same weights in any order of the draws, however the layers are computed. They
        are not those of ``guide.draw(index, seed=seed)``, which draws for pruned weights too.
        """
        noise = normals(draw_seed(seed, index), len(self.loc), self.loc)
        torch.addcmul(self.loc, self.scale, noise, out=self.weights)
        self.refresh()

    def set_weights(self, plain: PlainNetwork) -> None:
        """Set the weights to those that the plain network, of which this is the smaller form, has now."""
        for layer in self.layers:
            entries, parts = layer.entries, []
            for name, index in (("weight", entries.source), ("bias", entries.bias_source)):
                if len(index):
                    parts.append(plain.parameter(f"{layer.path}.{name}").flatten()[index])
            if parts:
                torch.cat(parts, out=self.weights[layer.start : layer.shifts.stop])
        self.refresh()

    def refresh(self) -> None:
        """Hand the flat vector's weights to the layers."""
        for layer in self.layers:
            module = self.net.get_submodule(layer.path)
            if isinstance(module, nn.Linear | nn.Conv2d) and not _is_full(layer, module):
                module.weight.view(-1)[layer.entries.position] = self.weights[layer.matrix]
            module.bias.copy_(layer.drawn_bias(self.weights))  # type: ignore[operator,union-attr]


def can_be_compact(plain: PlainNetwork, guide: Factorized) -> bool:
    """Whether all random parameters are those of Linear and Conv2d layers with random weights, as `compact` needs."""
    layers = {site.rpartition(".")[0] for site in guide.sites}
    known = (isinstance(plain.net.get_submodule(path), nn.Linear | nn.Conv2d) for path in layers)
    return all(known) and all(f"{path}.weight" in guide.sites for path in layers)


@torch.no_grad()
def compact(plain: PlainNetwork, guide: Factorized) -> CompactNetwork:
    """Remove what a pruned posterior does not need, so that shapes shrink and every draw's outputs stay the same.

    A unit or filter whose incoming weights are all pruned is the constant relu(bias), which goes into the next layer's
    bias, together with the noise of the weights that it passed through; at the borders of a padded convolution that
    would be wrong, so there only constants of 0 go. A unit without an outgoing weight is dropped, and so is a pixel
    before a dense layer. This is done between two layers of random weights with nothing but ReLU, pooling, flattening
    and dropout between them, a residual network's branches included; everything else is left as it is. A network that
    has other random layers (`can_be_compact`) has no compact form.
    """
    assert can_be_compact(plain, guide)
    net = copy.deepcopy(plain.net)
    left, pixels = remaining(plain, guide)
    layers, locs, scales, start = [], [], [], 0
    for path, entries in left.items():
        module = net.get_submodule(path)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach().clone()
        for name, index in (("weight", entries.source), ("bias", entries.bias_source)):
            site = f"{path}.{name}"
            if site in guide.sites:
                loc, scale = (part.flatten() for part in plain.place(site, *guide.loc_scale(site)))
                if name == "bias":
                    bias = torch.where(scale > 0, torch.zeros_like(loc), loc)
                locs.append(loc[index])
                scales.append(scale[index])
        shift = bias.to(module.weight)[entries.rows]
        layers.append(CompactLayer(path, entries, start, shift))
        start = layers[-1].shifts.stop
        _shrink(module, entries)
    loc, scale = torch.cat(locs), torch.cat(scales)
    found = CompactNetwork(net, layers, pixels, loc, scale, loc.clone())
    for layer in layers:
        module = net.get_submodule(layer.path)
        if _is_full(layer, module):  # its weights are those of the flat vector, not a copy
            module.weight.data = found.weights[layer.matrix].view_as(module.weight)  # type: ignore[union-attr,arg-type]
    found.refresh()
    return found


def _shrink(module: nn.Linear | nn.Conv2d, entries: Entries) -> None:
    shape = (len(entries.rows), len(entries.columns), *module.weight.shape[2:])
    module.weight = nn.Parameter(module.weight.new_zeros(shape), requires_grad=False)
    module.bias = nn.Parameter(module.weight.new_zeros(shape[0]), requires_grad=False)
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = shape[:2]
    else:
        module.out_features, module.in_features = shape[:2]


def _is_full(layer: CompactLayer, module: nn.Module) -> bool:
    return len(layer.entries.position) == module.weight.numel()  # type: ignore[operator,union-attr]
