"""Layers with a sparse matrix: a fixed pattern, new values for each draw. Written in C, compiled at first use."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name("sparse.c")
# Of sparse.c: rows of a batch that are worked on together.
_PANEL = 64


class SparseLinear(nn.Module):
    """y = x W^T + bias with the weights that are left alone: [N, in] -> [N, out], float32 on a CPU.

    Args:
        position: of each weight in the flattened matrix [out, in], ascending.
        values: the weights there, in a vector that the caller may write into.
        bias: [out], likewise.
    """

    def __init__(self, shape: tuple[int, int], position: Tensor, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.rows, self.columns = shape
        self.values, self.bias = values, bias
        self.start = _row_starts(position // self.columns, self.rows)
        self.offset = (position % self.columns * _PANEL).int()

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(len(x), self.rows)
        rows, columns = self.rows, self.columns
        fixed = [part.data_ptr() for part in (self.start, self.offset, self.values, self.bias)]

        def part(first: int, last: int) -> int:
            ends = x.data_ptr() + 4 * first * columns, y.data_ptr() + 4 * first * rows
            return int(_library().sparse_linear(last - first, columns, rows, *fixed, *ends))  # type: ignore[union-attr]

        _shared(part, len(x), _PANEL)
        return y


class SparseConv2d(nn.Module):
    """A convolution of stride 1 with the weights that are left alone: [N, in, H, W] -> [N, out, H', W'].

    An output's row is computed together with the rows below it: in an image's memory, a weight of the kernel meets its
    inputs at one distance from all outputs. Between two rows this makes some numbers that are nobody's output.

    Args:
        layer: gives padding and dilation.
        position, values, bias: as in `SparseLinear`, of the flattened weight [out, in, kh, kw].
    """

    def __init__(self, layer: nn.Conv2d, position: Tensor, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.kernel, self.dilation = layer.kernel_size, layer.dilation
        across, down = layer._reversed_padding_repeated_twice[:2], layer._reversed_padding_repeated_twice[2:]
        self.padding = [*across, *down]
        self.values, self.bias, self.rows = values, bias, layer.out_channels
        shape = layer.weight.shape
        self.start = _row_starts(position // shape[1:].numel(), self.rows)
        rest = position % shape[1:].numel()
        self.channel, self.down, self.across = rest // shape[2:].numel(), rest // shape[3] % shape[2], rest % shape[3]
        self.offsets: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding).contiguous()
        height, width = x.shape[2:]
        reach = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
        if (height, width) not in self.offsets:
            moved = self.down * self.dilation[0] * width + self.across * self.dilation[1]
            self.offsets[height, width] = (self.channel * height * width + moved).int()
        rows, stride = self.rows, (height - reach[0]) * width
        y = x.new_empty(len(x), rows, height - reach[0], width)
        sizes = x[0].numel(), rows, stride - reach[1], stride
        fixed = [part.data_ptr() for part in (self.start, self.offsets[height, width], self.values, self.bias)]

        def part(first: int, last: int) -> int:
            ends = x.data_ptr() + 4 * first * sizes[0], y.data_ptr() + 4 * first * rows * stride
            return int(_library().sparse_windows(last - first, *sizes, *fixed, *ends))  # type: ignore[union-attr]

        _shared(part, len(x), 1)
        return y[..., : width - reach[1]]


def sparse_layer(layer: nn.Module, position: Tensor, values: Tensor, bias: Tensor) -> nn.Module | None:
    """The sparse counterpart of a compact layer, or None: another kind, device, stride or dtype, or no C compiler."""
    weight = layer.weight
    if weight.is_cuda or weight.dtype != torch.float32 or _library() is None:
        return None
    if isinstance(layer, nn.Linear):
        return SparseLinear((layer.out_features, layer.in_features), position, values, bias)
    assert isinstance(layer, nn.Conv2d)
    if layer.stride != (1, 1) or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    return SparseConv2d(layer, position, values, bias)


def _row_starts(row: Tensor, rows: int) -> Tensor:
    return F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0)).int()


def _shared(part: Callable[[int, int], int], count: int, least: int) -> None:
    # ctypes lets go of Python's lock, so the parts run side by side.
    threads = min(torch.get_num_threads(), -(-count // least))
    each = -(-count // (threads * least)) * least if threads else 0
    bounds = [(first, min(first + each, count)) for first in range(0, count, each)] if each else []
    failed = [part(*bounds[0])] if len(bounds) == 1 else list(_pool(threads).map(part, *zip(*bounds, strict=True)))
    if any(failed):
        raise MemoryError("no memory for a sparse layer's work space")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ppl_bnn-sparse")


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(_SOURCE), "-o", str(path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        library = ctypes.CDLL(str(path))
    number, pointer = ctypes.c_long, ctypes.c_void_p
    library.sparse_linear.argtypes = [number] * 3 + [pointer] * 6
    library.sparse_windows.argtypes = [number] * 5 + [pointer] * 6
    return library
