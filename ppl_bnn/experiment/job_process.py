"""One job in a process of its own, which ends with the process that started it, however that ends.

`run_job` runs wherever an executor calls it. It starts this file as a program. That program runs ``ppl_bnn.run`` and
holds one end of a pipe, whose other end the system closes when the starting process is gone, killed or not.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppl_bnn.native.openmp import num_cores

# Seconds between two looks at the stop file.
_PAUSE = 0.5
# Seconds for a checkpoint, once the starting process is gone.
_GRACE = 5.0


def run_job(arguments: Sequence[str], log: str, stop: str, working_folder: str, jobs_per_host: int) -> tuple[int, str]:
    """Run ``ppl_bnn.run`` with these arguments; return its exit code, and the last line that it wrote.

    The code is negative, minus the number of the signal, where a signal ended the process at once.

    Args:
        log: the file for its output; its folder is made.
        stop: a file that does not exist, until the job is to be stopped; it has one byte for each signal to send.
        working_folder: relative paths in the arguments start here.
        jobs_per_host: number of jobs that share the cores of this host.
    """
    path, stop_file = Path(log), Path(stop)
    if stop_file.exists():
        return -signal.SIGTERM, "not started"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not as a setting, which the out folder would keep for commands that have all cores. MKL has a variable of its
    # own, which comes first.
    threads = str(max(1, num_cores() // jobs_per_host))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    sent = 0
    with path.open("ab") as file:
        # In a session of its own, so that Ctrl-C comes once and through here.
        process = subprocess.Popen(
            [sys.executable, "-m", "ppl_bnn.experiment.job_process", *arguments], env=environment, cwd=working_folder,
            stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PAUSE)
                while stop_file.exists() and sent < stop_file.stat().st_size:
                    process.send_signal(signal.SIGTERM)
                    sent += 1
        finally:
            # The process ends itself if an executor interrupts this function.
            assert process.stdin is not None
            process.stdin.close()
    last = (path.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return process.returncode, last


def _again(*arguments: Any) -> Any:
    """What submitit runs where the cluster preempted a job, or its time was up: the same, from the last checkpoint."""
    from submitit.helpers import DelayedSubmission

    return DelayedSubmission(run_job, *arguments)


run_job.__submitit_checkpoint__ = _again  # type: ignore[attr-defined]


def main() -> None:
    """Run the arguments as ``python -m ppl_bnn.run`` does."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    # Slurm announces the end of a job's time with it.
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    runpy.run_module("ppl_bnn.run", run_name="__main__", alter_sys=True)


def _end_with_the_starter() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
