"""Ranks over Horovod, started by horovodrun or mpirun. Only this file imports Horovod."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.distributed.communicator import Communicator, RankLost
from ppl_bnn.errors import UserError

# Seconds that a process may take to end after it has lost another rank.
_LAST_SECONDS = 10.0


class HorovodRanks(Communicator):
    """Horovod's global process set.

    Args:
        hvd: the module, from `import_horovod`.
        timeout: seconds to wait for a silent rank. A rank that has ended is noticed at once.
    """

    def __init__(self, hvd: ModuleType, *, timeout: float) -> None:
        self._hvd, self._timeout, self._lost = hvd, timeout, False
        seconds = math.ceil(timeout)
        # By default Horovod only warns, and its own thread answers as long as its process runs.
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, seconds)))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(seconds))
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(min(30, seconds)))
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            # A new rank's response cache is not that of the others, who would then fuse other messages than it does.
            os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "0")
        if not hvd.nccl_built():
            # Horovod's thread looks for messages every millisecond by default. Each time it takes a processor from the
            # thread that computes. A longer cycle than this would outlast the step of a small network.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "3")
            # While that thread waits for another rank, Open MPI would keep a processor busy with polling.
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        with self._rank_lost():
            hvd.init()
        self.name = f"Horovod ({'MPI' if hvd.mpi_enabled() else 'Gloo'}{', NCCL' if hvd.nccl_built() else ''})"
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())

    def _start_sum(self, tensor: Tensor, name: str) -> Callable[[], None]:
        with self._rank_lost():
            # The name is the key of Horovod's response cache, so a repeated sum keeps its entry.
            handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name)
        return lambda: self._finish(handle)

    def _broadcast(self, tensor: Tensor) -> None:
        with self._rank_lost():
            handle = self._hvd.broadcast_async_(tensor, root_rank=0)
        self._finish(handle)

    def _finish(self, handle: int) -> None:
        deadline = time.monotonic() + self._timeout
        with self._rank_lost():
            # Over MPI, Horovod's own thread waits forever for a stopped process.
            while not self._hvd.poll(handle):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"one of the {self.size} ranks sent nothing for {self._timeout:g} s")
                time.sleep(1e-4)
            self._hvd.synchronize(handle)

    def shutdown(self) -> None:
        """Leave the ranks. Horovod ends for all ranks when one leaves."""
        if self._lost:
            # At exit Horovod waits for its own thread, which may wait forever for the lost rank.
            end = threading.Timer(_LAST_SECONDS, os._exit, (1,))
            end.daemon = True
            end.start()
        else:
            self._hvd.shutdown()

    @contextmanager
    def _rank_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            # Horovod's message has four sentences; the first says what happened.
            raise RankLost(str(error).strip().split(". ")[0] or type(error).__name__) from error


def run_elastic(work: Callable[[Communicator, Callable[[], bool]], bool], *, timeout: float) -> None:
    """Call work(ranks, changed) with the available ranks. Call it again when it raises RankLost or returns False.

    Args:
        work: what the ranks do together. `changed()` becomes true when ranks are added or removed. Then `work` returns
            False, on all ranks at the same point.
        timeout: as in `HorovodRanks`.

    Raises:
        UserError: these processes were not started by an elastic horovodrun.
    """
    if os.environ.get("HOROVOD_ELASTIC") != "1":
        raise UserError("--elastic needs horovodrun with --min-np and --host-discovery-script to start the ranks")
    hvd = import_horovod()
    from horovod.common.elastic import ObjectState
    from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

    # The last checkpoint holds everything that must survive a change.
    state = ObjectState(bcast_object=hvd.broadcast_object, get_rank=hvd.rank)

    def once(state: Any) -> None:
        try:
            done = work(HorovodRanks(hvd, timeout=timeout), lambda: not state._host_messages.empty())
        except RankLost as error:
            raise HorovodInternalError(str(error)) from error
        if not done:
            raise HostsUpdatedInterrupt(False)

    hvd.elastic.run(once)(state)
    hvd.shutdown()


def import_horovod() -> ModuleType:
    """Import Horovod's torch module.

    Raises:
        ImportError: Horovod is not installed, or was built for another torch.
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
