"""Normal numbers of a seed, the same on every device and machine: their definition in torch, and C code for a CPU.

Words come from Philox 4x32-10, a function of a counter and a key (Salmon, Moraes, Dror and Shaw 2011, "Parallel random
numbers: as easy as 1, 2, 3", section 4.3 and its Random123 library), numbers from pairs of words by Box and Muller
(1958). The key is the seed. The counter is (number of the counter, stream), 64 bits each.
"""

import ctypes
import hashlib
import math
from pathlib import Path

import torch
from numpy.random import SeedSequence
from torch import Tensor

from ppl_bnn.native.library import library

# The definition's name, kept with results: draws of two generators are never added to each other.
GENERATOR = "philox4x32-10/1"

_SOURCE = Path(__file__).with_name("normals.c")
# Of normals.h: counters side by side, and the numbers of them.
_COUNTERS = 16
GROUP = 4 * _COUNTERS
# Counters in a block of the torch form: on a CPU the block stays in the cache, elsewhere it bounds the memory.
_BLOCK_ON_CPU, _BLOCK = 1 << 16, 1 << 22
_MASK = 0xFFFFFFFF


def normals(seed: int, count: int, like: Tensor, *, stream: int = 0) -> Tensor:
    """Independent Normal(0, 1) numbers [count] of `like`'s dtype and device.

    Each depends on seed, stream and its position alone: not on `count`, threads, compiler or device. All forms agree
    to 1e-6 of 1 + a number's size. Every dtype has the numbers of float32: they have no more digits in float64, and are
    rounded in half precision. The largest possible number is 6.66.

    Args:
        seed: in [0, 2^64).
        stream: in [0, 2^64): streams of one seed are independent.
    """
    native = library(_SOURCE, _agrees) if like.is_cpu else None
    if native is None:
        return reference(seed, count, like, stream=stream)
    found = torch.empty(count, dtype=torch.float32, device="cpu")
    native.normals(
        ctypes.c_long(torch.get_num_threads()), ctypes.c_uint64(seed), ctypes.c_uint64(stream), ctypes.c_long(count),
        ctypes.c_void_p(found.data_ptr()),
    )  # fmt: skip
    return found.to(like.dtype)


def reference(seed: int, count: int, like: Tensor, *, stream: int = 0) -> Tensor:
    """What `normals` is by definition, in torch operations; for float64 with the digits of a double.

    Each 16 consecutive counters make 64 numbers: number 16 w + i of these is of word w of counter i. Words 0 and 1 of a
    counter make its numbers 0 and 1, words 2 and 3 the other two: radius * cos(angle), radius * sin(angle) with

        radius = sqrt(-2 log u), u = float(a >> 1) / 2^31 + 1 / 2^32 in (0, 1]
        angle = (1 + t) pi / 4, t = float(the lower 30 bits of b, as a signed number) / 2^29

    where a, b are the two words and float rounds to 24 bits; the upper two bits of b are the signs.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    groups, block = -(-count // GROUP), (_BLOCK_ON_CPU if like.is_cpu else _BLOCK) // _COUNTERS
    # [groups, pair of words, one of the pair, counters]
    found = torch.empty(groups, 2, 2, _COUNTERS, dtype=dtype, device=like.device)
    for first in range(0, groups, block):
        part = found[first : first + block]
        counter = torch.arange(first * _COUNTERS, (first + len(part)) * _COUNTERS, device=like.device)
        low, high = (torch.full_like(counter, word) for word in _words(stream))
        a, b = philox(torch.stack((counter & _MASK, low)), torch.stack((counter >> 32, high)), _words(seed))
        for at, numbers in enumerate(_pair(a, b, dtype)):
            part[:, :, at].copy_(numbers.view(2, -1, _COUNTERS).transpose(0, 1))
    return found.view(-1)[:count].to(like.dtype)


def philox(even: Tensor, odd: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The four words that Philox 4x32-10 makes of a counter of four words and a key of two: of each of n counters.

    Words are int64 in [0, 2^32): words 0 and 2 are `even` [2, n], words 1 and 3 are `odd` [2, n].
    """
    k0, k1 = key
    for _ in range(10):
        # 64 bits of each product: int64 wraps, which leaves every bit what it is in an unsigned number.
        products = torch.empty_like(even)
        torch.mul(even[1], 0xCD9E8D57, out=products[0])
        torch.mul(even[0], 0xD2511F53, out=products[1])
        even = (products >> 32).bitwise_xor_(odd)
        even[0].bitwise_xor_(k0)
        even[1].bitwise_xor_(k1)
        even, odd = even.bitwise_and_(_MASK), products
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return even, odd & _MASK


def draw_seed(seed: int, index: int) -> int:
    """The generator seed of draw `index`: well mixed, so that neighbouring seeds and indices are unrelated."""
    return int(SeedSequence([seed, index]).generate_state(1, "uint64")[0]) >> 1


def stream_of(site: str) -> int:
    """The stream of a site's noise: a hash of its name, so that a draw of a site depends on no other site."""
    return int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "little")


def _pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Both are rounded to float32 first, so that all dtypes have the same.
    u = ((a >> 1).float() * 2**-31 + 2**-32).to(dtype)
    turned = (b << 2) & _MASK
    t = ((turned ^ 0x80000000) - 0x80000000).float().to(dtype) * (2**-31 * math.pi / 4)
    radius = u.log_().mul_(-2).sqrt_().mul_(math.sqrt(0.5))
    cosine, sine = t.cos(), t.sin_()
    one, other = (cosine - sine).mul_(radius), (cosine + sine).mul_(radius)
    return torch.where(b >> 31 == 1, -one, one), torch.where(b >> 30 & 1 == 1, -other, other)


def _words(number: int) -> tuple[int, int]:
    return number & _MASK, number >> 32


def _agrees() -> bool:
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    return all(
        torch.allclose(normals(seed, 300, like, stream=stream), reference(seed, 300, like, stream=stream), atol=1e-5)
        for seed, stream in ((0, 0), (2**63 + 11, 2**64 - 5))
    )
