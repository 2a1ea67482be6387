"""Whether all ranks hold the same parameters, to the last bit."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def first_unequal(communicator: Communicator, named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that is not the same on every rank, and the ranks where it differs from rank 0's.

    Each rank sends a number a tensor: the sum, modulo 2^64, of its elements' bits read as integers. Unlike a sum of
    floating-point numbers it depends on no order of adding and changes with any single bit.

    Args:
        named: names and tensors, the same names in the same order on every rank.
    """
    if communicator.size == 1:
        return None
    names, tensors = zip(*named, strict=True)
    digests = communicator.gather(torch.stack([_digest(tensor.detach()).cpu() for tensor in tensors]))
    differs = digests != digests[0]
    if not differs.any():
        return None
    at = int(differs.any(0).nonzero()[0])
    ranks = ", ".join(str(rank) for rank in differs[:, at].nonzero()[:, 0].tolist())
    return f"{names[at]} of rank {ranks} is not rank 0's"


def _digest(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
