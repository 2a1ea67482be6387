"""Normal numbers of a seed, made by all of torch's threads many times as fast as `torch.randn` makes them."""

import ctypes
from pathlib import Path

import torch
from numpy.random import SeedSequence
from torch import Tensor

from ppl_bnn.native.library import library

_SOURCE = Path(__file__).with_name("normals.c")
# Of normals.h: numbers of one generator.
NUMBERS = 4096


def normals(seed: int, count: int, like: Tensor) -> Tensor:
    """Independent Normal(0, 1) numbers [count] of `like`'s dtype and device.

    They depend on the seed and their position alone: not on `count`, nor on how many threads there are. float32 on a
    CPU is made by C code that is compiled at first use; without a C compiler, and for the rest, torch makes other
    numbers from the seed, which depend on `count` too.

    Args:
        seed: in [0, 2^64).
    """
    native = library(_SOURCE, _agrees) if like.dtype == torch.float32 and like.is_cpu else None
    if native is None:
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(count, generator=generator, dtype=like.dtype, device=like.device)
    found = like.new_empty(count)
    native.normals(
        ctypes.c_long(torch.get_num_threads()), ctypes.c_uint64(seed), ctypes.c_long(count),
        ctypes.c_void_p(found.data_ptr()),
    )  # fmt: skip
    return found


def _agrees() -> bool:
    # Numbers 0, 1 and 32 of a seed, as they have always been.
    found = normals(11, 33, torch.empty(0))[[0, 1, 32]]
    return torch.allclose(found, torch.tensor([0.268839836, 1.18670404, -1.36187041]), rtol=1e-5)


def draw_seed(seed: int, index: int) -> int:
    """The generator seed of draw `index`: well mixed, so that neighbouring seeds and indices are unrelated."""
    return int(SeedSequence([seed, index]).generate_state(1, "uint64")[0]) >> 1
