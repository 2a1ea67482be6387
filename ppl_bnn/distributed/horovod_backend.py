"""Ranks over Horovod. Started by horovodrun or mpirun; the only file that imports Horovod."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator, RankLost


class HorovodRanks(Communicator):
    """Horovod's global process set.

    Args:
        hvd: the module, from `import_horovod`.
        timeout: seconds to wait for a rank that gives no sign; one that has ended is noticed at once.
    """

    def __init__(self, hvd: ModuleType, *, timeout: float) -> None:
        self._hvd = hvd
        # Horovod itself would only warn.
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(math.ceil(timeout)))
        with _rank_lost():
            hvd.init()
        self.name = f"Horovod ({'MPI' if hvd.mpi_enabled() else 'Gloo'}{', NCCL' if hvd.nccl_built() else ''})"
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())

    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        with _rank_lost():
            # The name is the key of Horovod's cache of responses: sums that come again and again keep theirs.
            handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name)

        def wait() -> None:
            with _rank_lost():
                self._hvd.synchronize(handle)

        return wait

    def _broadcast(self, tensor: Tensor) -> None:
        with _rank_lost():
            self._hvd.broadcast_(tensor, root_rank=0)

    def shutdown(self) -> None:
        """Leave; Horovod ends for all ranks when one leaves."""
        self._hvd.shutdown()


def import_horovod() -> ModuleType:
    """Horovod's torch module.

    Raises:
        ImportError: it is not installed, or was built for another torch.
    """
    try:
        import horovod.torch as hvd
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "horovod" and error.name != "horovod.torch.mpi_lib_v2":
            raise ImportError("Horovod is not installed here") from None
        raise ImportError(f"the Horovod that is installed lacks a part: {error}") from None
    except (ImportError, OSError, RuntimeError, Warning) as error:
        first = str(error).strip().splitlines()[0]
        raise ImportError(
            f"the Horovod that is installed was built for another torch than {torch.__version__}: {first}"
        ) from None
    return hvd


@contextmanager
def _rank_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # The first of Horovod's four sentences about it.
        raise RankLost(str(error).strip().split(". ")[0] or type(error).__name__) from error
