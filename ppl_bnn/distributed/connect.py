"""Joins the ranks that the launcher of this process set up in the environment."""

import atexit
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from ppl_bnn.distributed.communicator import Alone, Communicator
from ppl_bnn.errors import UserError

# Where launchers of MPI programs put the number of ranks, and the rank: Open MPI, MPICH and Intel MPI, MVAPICH, srun.
_MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
_RANKS = {"HOROVOD_SIZE": "HOROVOD_RANK", "WORLD_SIZE": "RANK", **_MPI}
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOW = "install Horovod with `make horovod`, or start the ranks with torchrun"


def connect(
    device: str = "cpu", *, timeout: float = 600.0, environment: Mapping[str, str] | None = None
) -> Communicator:
    """Join the other ranks: Horovod under horovodrun and mpirun, torch.distributed under torchrun, else one process.

    Args:
        device: device of the gradients, ``cpu`` or ``cuda``.
        timeout: seconds to wait for a silent rank. A rank that has ended is noticed at once.
        environment: default ``os.environ``.

    Raises:
        UserError: there are several ranks, but no way for them to communicate. The message says what to do.
        RankLost: another rank ended before all had joined.
    """
    environment = os.environ if environment is None else environment
    size, launcher = _launched(environment)
    if size == 1:
        return Alone()
    if launcher == "torchrun":
        if missing := [name for name in _TORCHRUN if name not in environment]:
            raise UserError(f"{size} ranks were started, but {', '.join(missing)} is not set; torchrun sets it")
        from ppl_bnn.distributed.torch_backend import TorchRanks

        return TorchRanks(device, timeout=timeout)
    from ppl_bnn.distributed.horovod_backend import HorovodRanks, import_horovod

    try:
        hvd = import_horovod()
    except ImportError as error:
        raise UserError(f"{size} ranks were started by {launcher}, but {error}; {_HOW}") from None
    if device.startswith("cuda") and not hvd.cuda_built():
        raise UserError(
            f"device is {device!r}, and this Horovod was built without CUDA: build it with "
            "`python tools/build_horovod.py --gpu`, or start the ranks with torchrun"
        )
    ranks = HorovodRanks(hvd, timeout=timeout)
    if ranks.size != size:
        raise UserError(
            f"{size} ranks were started by {launcher}, but Horovod finds {ranks.size}: it was built without the MPI "
            "that started them; use horovodrun, build it where that MPI is, or start the ranks with torchrun"
        )
    return ranks


def is_first(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher of this process made it rank 0, or started it alone; it need not be connected yet."""
    environment = os.environ if environment is None else environment
    rank = next((name for size, name in _RANKS.items() if size in environment), "")
    return environment.get(rank, "0") == "0"


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several ranks without Python's finalization.

    A thread of Gloo may still hold a tensor of the last call. To let go of it during the finalization would abort the
    process, after all its work was done.
    """
    if _launched(os.environ)[0] == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launched(environment: Mapping[str, str]) -> tuple[int, str]:
    """Return the number of ranks and the name of their launcher."""
    if "HOROVOD_SIZE" in environment:
        return int(environment["HOROVOD_SIZE"]), "horovodrun"
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"]), "torchrun"
    for name in _MPI:
        if name in environment:
            return int(environment[name]), "srun" if name.startswith("SLURM") else "mpirun"
    return 1, "nothing"
