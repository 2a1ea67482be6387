"""Starts the ranks of a training and waits for them; says in one line why they failed."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ppl_bnn.errors import UserError
from ppl_bnn.scaling.hosts import rehearsed_hosts, start_ranks

# A line of the run's own log, behind what a launcher writes before it.
_OWN_ERROR = re.compile(r"(?:^|[:>]\s*)error: (.+)")
# The last line of a traceback.
_EXCEPTION = re.compile(r"^[^\s:]*\b\w*(?:Error|Exception|Interrupt)\b: .+")


class PointFailed(RuntimeError):
    """A training failed, or cannot be started. The message says why."""


def checked_launcher(launcher: str) -> str:
    """Return the launcher's name or command; ``auto`` becomes ``horovod`` if Horovod is installed, else ``torch``.

    Raises:
        UserError: it is neither a known name nor a command.
    """
    try:
        command = launcher.format(ranks=2).split()
    except (LookupError, ValueError) as error:
        raise UserError(f"--launcher takes a command with {{ranks}} in it, got {launcher!r} ({error!r})") from None
    if not command:
        raise UserError("--launcher must be auto, horovod, torch, or a command with {ranks} in it; got nothing")
    if launcher == "auto":
        return "horovod" if find_spec("horovod") else "torch"
    return launcher


def launch(
    arguments: Sequence[str], output: Path, *, ranks: int, launcher: str, environment: Mapping[str, str]
) -> None:
    """Run ``python`` with these arguments on every rank, and write what they print to a file.

    Raises:
        PointFailed: the launcher cannot be started, or a rank failed.
    """
    command = [sys.executable] if ranks == 1 else _command(launcher, ranks)
    with output.open("w") as file:
        try:
            process = subprocess.Popen([*command, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT)
        except OSError as error:
            raise PointFailed(f"{command[0]} cannot be started: {error.strerror}") from None
        _wait([process], output)


def launch_on_rehearsed_hosts(
    arguments: Sequence[str], output: Path, *, ranks: int, mbit: float, latency_ms: float
) -> None:
    """Do the same, with a rehearsed host for each rank.

    Raises:
        PointFailed: a rank failed.
        NotPermitted: hosts cannot be rehearsed here.
    """
    with rehearsed_hosts(ranks, mbit=mbit, latency_ms=latency_ms) as hosts, output.open("w") as file:
        _wait(start_ranks(hosts, [sys.executable, *arguments], file), output)


def reason(text: str) -> str:
    """Return the line of a failed training's output that says why it failed; empty if there is no output."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [found[1] for line in lines if (found := _OWN_ERROR.search(line))]
    # The other ranks then miss the one that failed first.
    first = [line for line in own if not line.startswith("another rank is gone")] or own
    if first:
        return first[0]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    return (raised or lines or [""])[-1]


def _wait(processes: list[subprocess.Popen[bytes]], output: Path) -> None:
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if any(codes):
        why = reason(output.read_text(errors="replace"))
        raise PointFailed(why or f"it printed nothing and ended with exit code {max(map(abs, codes))}")


def _command(launcher: str, ranks: int) -> list[str]:
    if launcher == "horovod":
        horovodrun = Path(sys.executable).parent / "horovodrun"
        return [str(horovodrun), "-np", str(ranks), sys.executable]
    if launcher == "torch":
        # The arguments begin with -m, which torchrun passes on to python.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launcher.format(ranks=ranks).split()
