"""Ranks over torch.distributed, started by torchrun: Gloo for tensors on CPUs, NCCL for tensors on GPUs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ppl_bnn.devices import devices_here
from ppl_bnn.distributed.communicator import Communicator, RankLost
from ppl_bnn.errors import UserError


class TorchRanks(Communicator):
    """The default process group of torch.distributed, from the environment that torchrun sets.

    Args:
        device: device of the gradients, ``cpu`` or ``cuda``.
        timeout: seconds to wait for a silent rank. A rank that has ended is noticed at once.

    Raises:
        UserError: the gradients' device is a GPU, and there is none.
    """

    def __init__(self, device: str, *, timeout: float) -> None:
        self.name = "NCCL" if device.startswith("cuda") else "Gloo"
        if self.name == "NCCL" and not torch.cuda.is_available():
            here = ", ".join(devices_here())
            raise UserError(f"device {device!r} cannot be used: torch finds no GPU on this host, which has {here}")
        backend = "cpu:gloo,cuda:nccl" if self.name == "NCCL" else "gloo"
        with _rank_lost():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        rank, size = dist.get_rank(), dist.get_world_size()
        local = (int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        super().__init__(rank, size, *local)

    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        with _rank_lost():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _rank_lost():
                work.wait()

        return wait

    def _broadcast(self, tensor: Tensor) -> None:
        with _rank_lost():
            dist.broadcast(tensor, src=0)

    def shutdown(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _rank_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"torch.distributed: {str(error).splitlines()[0]}") from error
