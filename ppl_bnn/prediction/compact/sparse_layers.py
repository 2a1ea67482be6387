"""Layers with a sparse matrix: a fixed pattern, new values for each draw. Their products are C code."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.native.library import library
from ppl_bnn.native.normals import GROUP, normals

_SOURCE = Path(__file__).with_name("sparse.c")
# Of sparse.c: rows of a batch that are worked on together, and the most numbers in a row that are.
_PANEL, _SPAN = 32, 96
# Likewise: draws of layer outputs that are.
DRAWS = _PANEL // 2
# Bytes of the nearest cache that a block of columns may fill, and how many weights a row needs in it to be worth it.
_BLOCK, _LEAST = 24_576, 16


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "columns", "blocks", "relu")),
        *((name, ctypes.c_void_p) for name in ("start", "offset", "value", "bias", "variance", "bias_variance")),
    )


class SparseLinear(nn.Module):
    """y = x W^T + bias with the weights that are left alone: [..., in] -> [..., out], float32 on a CPU.

    Args:
        shape: (out, in).
        position: of each weight in the flattened matrix [out, in], ascending.
        values: the weights there, in a vector that the caller may write into.
        bias: [out], likewise.

    Attributes:
        relu: whether a ReLU is behind it.
        then: layers that it hands its outputs to, so that all are computed in one pass over the batch.
    """

    def __init__(self, shape: tuple[int, int], position: Tensor, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.rows, self.columns = shape
        self.values, self.bias = values, bias
        self.relu, self.then = False, list[SparseLinear]()
        row, column = position // self.columns, position % self.columns
        self.blocks, self.start = _blocks(row, column, shape, _PANEL)
        self.offset = (column * _PANEL).int()

    def forward(self, x: Tensor) -> Tensor:
        _check_inputs(x.shape[-1], self.columns)
        layers = [self, *self.then]
        y = x.new_empty(*x.shape[:-1], layers[-1].rows)
        structs = (_Layer * len(layers))(*(_struct([layer], layer.relu) for layer in layers))
        _call("sparse_chain", len(layers), structs, y.numel() // layers[-1].rows, x.contiguous(), y)
        return y


def draws_noise(units: int, num_samples: int, seed: int, like: Tensor) -> Tensor:
    """The normal numbers of `sparse_draws` with this seed: [panels, units of all layers, DRAWS]."""
    panels, numbers = -(-num_samples // DRAWS), units * DRAWS
    flat = normals(seed, panels * -(-numbers // GROUP) * GROUP, like)
    return flat.view(panels, -1)[:, :numbers].unflatten(1, (units, DRAWS))


def sparse_draws(layers: Sequence[Sequence[SparseLinear]], relu: Sequence[bool]) -> Callable[..., Tensor]:
    """Prepare (x [N, in], noise, S) -> draws of the outputs [S, N, out] by sampling each layer's outputs.

    Args:
        layers: each with the weights' locs, and with their variances.
        relu: whether a ReLU is behind each.

    The function's noise is that of `draws_noise`, or its seed: then the numbers are made where they are used.
    """
    structs = (_Layer * len(layers))(*(_struct(*pair) for pair in zip(layers, relu, strict=True)))
    out = layers[-1][0].rows

    def draws(x: Tensor, noise: Tensor | int, num_samples: int) -> Tensor:
        _check_inputs(x.shape[-1], layers[0][0].columns)
        y = x.new_empty(num_samples, len(x), out)
        kept, seed = (noise, 0) if isinstance(noise, Tensor) else (None, noise)
        arguments = len(x), num_samples, x.contiguous(), kept, ctypes.c_uint64(seed), y
        _call("sparse_draws", len(layers), structs, *arguments)
        return y

    return draws


def _check_inputs(got: int, expected: int) -> None:
    # The C code would read past the end of a smaller input.
    if got != expected:
        raise UserError(f"a layer takes {expected} inputs or channels an example, got {got}")


class SparseConv2d(nn.Module):
    """A convolution of stride 1 with the weights that are left alone: [N, in, H, W] -> [N, out, H' / pool, W' / pool].

    An output's row is computed together with the rows below it: in an image's memory, a weight of the kernel meets its
    inputs at one distance from all outputs. Between two rows this makes some numbers that are nobody's output.

    Args:
        layer: gives padding and dilation.
        position, values, bias: as in `SparseLinear`, of the flattened weight [out, in, kh, kw].

    Attributes:
        relu: whether a ReLU is behind it.
        pool: size of the windows of the max pooling behind it, which do not overlap.
    """

    def __init__(self, layer: nn.Conv2d, position: Tensor, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.kernel, self.dilation, self.shape = layer.kernel_size, layer.dilation, layer.weight.shape
        across, down = layer._reversed_padding_repeated_twice[:2], layer._reversed_padding_repeated_twice[2:]
        self.padding = [*across, *down]
        self.position, self.values, self.bias = position, values, bias
        self.relu, self.pool = False, 1
        self.layouts: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        _check_inputs(x.shape[1], self.shape[1])
        x = F.pad(x, self.padding).contiguous()
        height, width = x.shape[2:]
        reach = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
        if (height, width) not in self.layouts:
            self.layouts[height, width] = self._layout(height, width, reach[0] * width + reach[1])
        blocks, *places = self.layouts[height, width]
        out = height - reach[0], width - reach[1]
        y = x.new_empty(len(x), self.shape[0], *(size // self.pool for size in out))
        pointers = (part.data_ptr() for part in (*places, self.values, self.bias))
        struct = _Layer(self.shape[0], x[0].numel(), blocks, self.relu, *pointers)
        _call("sparse_windows", ctypes.byref(struct), len(x), *out, width, self.pool, x, y)
        return y

    def _layout(self, height: int, width: int, reach: int) -> tuple[int, Tensor, Tensor]:
        taps = self.shape[2:].numel()
        row, rest = self.position // self.shape[1:].numel(), self.position % self.shape[1:].numel()
        channel, down, across = rest // taps, rest % taps // self.shape[3], rest % self.shape[3]
        offset = (channel * height + down * self.dilation[0]) * width + across * self.dilation[1]
        return *_blocks(row, channel, self.shape, min(height * width, _SPAN + reach)), offset.int()


def sparse_layer(
    layer: nn.Module, position: Tensor, values: Tensor, bias: Tensor
) -> SparseLinear | SparseConv2d | None:
    """The sparse counterpart of a compact layer, or None: another kind, device, stride or dtype, or no C compiler."""
    weight = layer.weight
    if not weight.is_cpu or weight.dtype != torch.float32 or _native() is None:
        return None
    if isinstance(layer, nn.Linear):
        return SparseLinear((layer.out_features, layer.in_features), position, values, bias)
    assert isinstance(layer, nn.Conv2d)
    if layer.stride != (1, 1) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    return SparseConv2d(layer, position, values, bias)


def _native() -> ctypes.CDLL | None:
    return library(_SOURCE, _agrees)


def _agrees() -> bool:
    """Whether the products of a small layer of each kind, and draws of outputs, are those of dense ones."""
    weight, x = (
        torch.frac(torch.arange(1, 163, device="cpu").double() * step).float() - 0.5
        for step in (0.754877666, 0.569840291)
    )
    weight, bias = weight[:108], weight[:2]
    position = (weight.abs() > 0.1).nonzero().flatten()
    values, dense = weight[position], weight * (weight.abs() > 0.1)
    linear = SparseLinear((2, 54), position, values, bias)
    means = F.linear(x.view(3, 54), dense.view(2, 54), bias)
    convolution = nn.Conv2d(6, 2, 3, device="meta")
    sparse = SparseConv2d(convolution, position, values, bias)
    images = x.repeat(8).view(4, 6, 6, 9)
    deviations = F.linear(x.view(3, 54).square(), dense.view(2, 54).square(), bias.square()).sqrt()
    variances = SparseLinear((2, 54), position, values.square(), bias.square())
    noise = draws_noise(2, 5, 1, x)
    draws = sparse_draws([(linear, variances)], [False])
    by_draw = noise.transpose(1, 2).flatten(0, 1)[:5, None]
    pairs = (
        (linear(x.view(3, 54)), means),
        (sparse(images), F.conv2d(images, dense.view(2, 6, 3, 3), bias)),
        (draws(x.view(3, 54), noise, 5), means + deviations * by_draw),
        (draws(x.view(3, 54), 1, 5), means + deviations * by_draw),
    )
    return all(torch.allclose(found, expected, rtol=1e-4, atol=1e-5) for found, expected in pairs)


def _blocks(row: Tensor, column: Tensor, shape: Sequence[int], floats: int) -> tuple[int, Tensor]:
    # How many blocks of columns, of so many floats each, and where each row's weights start in each block.
    rows, columns = shape[:2]
    blocks = max(1, min(-(-4 * floats * columns // _BLOCK), len(row) // (_LEAST * rows)))
    part = row * blocks + column // -(-columns // blocks)
    return blocks, F.pad(torch.bincount(part, minlength=rows * blocks).cumsum(0), (1, 0)).int()


def _struct(layer: Sequence[SparseLinear], relu: bool) -> _Layer:
    first = layer[0]
    tensors = [first.start, first.offset, *(part for each in layer for part in (each.values, each.bias))]
    return _Layer(first.rows, first.columns, first.blocks, relu, *(part.data_ptr() for part in tensors))


def _call(name: str, *arguments: object) -> None:
    def given(argument: object) -> object:
        if isinstance(argument, Tensor):
            if argument.dtype != torch.float32 or not argument.is_cpu:
                raise UserError(f"sparse layers need float32 on a CPU, got {argument.dtype} on {argument.device}")
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_long(argument) if isinstance(argument, int) else argument

    if getattr(_native(), name)(ctypes.c_long(torch.get_num_threads()), *map(given, arguments)):
        raise MemoryError("no memory for a sparse layer's work space")
