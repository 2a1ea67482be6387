"""Where jobs run: on this host, on a Slurm cluster, or wherever an executor of the user's own takes them.

An executor is anything with ``submit(function, *arguments)`` that returns a future, as `concurrent.futures`, submitit
and Dask's client have it.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ppl_bnn.errors import UserError
from ppl_bnn.registry import lookup

# Minutes: submitit ends a local job after two, unless it is told otherwise.
_A_YEAR = 365 * 24 * 60
# submitit's logs and messages.
_FOLDER = "submitit"


class Future(Protocol):
    """A job that was submitted."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> Any:
        """What the function returned; raises what it raised."""
        ...

    def cancel(self) -> Any:
        """Do not start it, and end it if the executor can."""
        ...


class Executor(Protocol):
    """Runs functions elsewhere: in threads, in processes, or on other hosts that see the same folders."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        """Start the function, now or later."""
        ...


@dataclass(frozen=True)
class Engine:
    """An executor, and how jobs are handed to it.

    Attributes:
        limit: number of jobs handed over at a time; None for all of them.
        jobs_per_host: number of jobs that share a host's cores.
    """

    executor: Executor
    limit: int | None
    jobs_per_host: int

    def submit_all(self, function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> list[Future]:
        """Submit one call of the function for each list of arguments; to Slurm all of them as one array.

        Raises:
            UserError: Slurm refuses them.
        """
        # submitit's.
        batch = getattr(self.executor, "batch", nullcontext)
        try:
            with batch():
                return [self.executor.submit(function, *arguments) for arguments in calls]
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.output or b"").decode(errors="replace").strip() or str(error)
            raise UserError(f"the jobs were not submitted: {said}") from None


@contextmanager
def opened_executor(name: str, *, workers: int | None, options: Mapping[str, Any], folder: Path) -> Iterator[Engine]:
    """Yield the engine of an executor by its name; close it on exit.

    Args:
        name: local, slurm, submitit-local, or the import path of a function without arguments that returns an executor.
        workers: number of jobs at a time; None for one on this host, and as many as the executor takes elsewhere.
        options: of Slurm, by submitit's names: ``partition``, ``time`` (minutes), ``cpus_per_task``.
        folder: where submitit may write.

    Raises:
        UserError: no such executor, or one that is not installed; options that it does not take.
    """
    if name not in EXECUTORS and (here := str(Path.cwd())) not in sys.path:
        # The console script has its own folder there instead.
        sys.path.insert(0, here)
    make = lookup(EXECUTORS, name, what="--executor")
    if options and make is not _slurm:
        raise UserError(f"--slurm.{min(options)} is for --executor slurm, got --executor {name}: leave it out")
    if name in EXECUTORS:
        engine = make(workers, options, folder)
    else:
        executor: Any = make()
        if not callable(getattr(executor, "submit", None)):
            raise UserError(
                f"--executor {name} must return an object with submit(function, *arguments), such as a "
                f"concurrent.futures.Executor; got {executor!r:.60}"
            )
        engine = Engine(executor, workers, workers or 1)
    held: Any = engine.executor
    closing: AbstractContextManager[Any] = held if hasattr(held, "__exit__") else nullcontext()
    with closing:
        yield engine


def _local(workers: int | None, options: Mapping[str, Any], folder: Path) -> Engine:
    # Its threads wait for the processes of the jobs.
    return Engine(ThreadPoolExecutor(workers or 1), workers or 1, workers or 1)


def _submitit_local(workers: int | None, options: Mapping[str, Any], folder: Path) -> Engine:
    executor = _submitit("submitit-local").LocalExecutor(folder / _FOLDER)
    executor.update_parameters(timeout_min=_A_YEAR)
    return Engine(executor, workers or 1, workers or 1)


def _slurm(workers: int | None, options: Mapping[str, Any], folder: Path) -> Engine:
    submitit = _submitit("slurm")
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise UserError(f"--executor slurm needs Slurm's commands on this host, and {missing[0]} is not there")
    if not str(options.get("time", "")).isdecimal():
        raise UserError(f"--executor slurm needs --slurm.time, the minutes of a job, got {options.get('time')!r}")
    executor = submitit.SlurmExecutor(folder / _FOLDER)
    parallel = {} if workers is None else {"array_parallelism": workers}
    known = executor._valid_parameters()
    if unknown := sorted(options.keys() - known):
        raise UserError(f"--slurm.{unknown[0]} is unknown to submitit, which takes {', '.join(sorted(known))}")
    executor.update_parameters(job_name="ppl_bnn", **{**parallel, **options})
    # Slurm gives a job its own cores.
    return Engine(executor, None, 1)


def _submitit(name: str) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError(f"--executor {name} needs submitit: pip install 'ppl_bnn[jobs]'") from None
    return submitit


EXECUTORS: dict[str, Callable[..., Engine]] = {
    "local": _local,
    "slurm": _slurm,
    "submitit-local": _submitit_local,
}
