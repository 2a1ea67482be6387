"""Checks that all ranks hold bitwise the same parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def first_unequal(communicator: Communicator, named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that differs between ranks, and the ranks on which it differs from rank 0.

    Each rank sends one number a tensor: the sum, modulo 2^64, of its elements' bits read as integers. Unlike a sum of
    floating-point numbers, it does not depend on the order of addition, and any single bit changes it.

    Args:
        named: names and tensors, with the same names in the same order on every rank.

    Returns:
        The name and the ranks as text, or None if all tensors are equal.
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
