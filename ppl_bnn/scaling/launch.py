"""Starts the ranks of a training and waits for them; says in one line why they failed."""

import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ppl_bnn.errors import Interrupted, UserError
from ppl_bnn.experiment.command import STOPPED
from ppl_bnn.scaling.hosts import rehearsed_hosts, start_ranks

# A line of the run's own log, behind what a launcher writes before it.
_OWN_ERROR = re.compile(r"(?:^|[:>]\s*)error: (.+)")
# The last line of a traceback.
_EXCEPTION = re.compile(r"(?:^|[:>]\s*)([^\s:]*\b\w*(?:Error|Exception|Interrupt)\b: .+)")
# The exit codes of ranks as torchrun and horovodrun list them; their own is another.
_EXIT_CODE = re.compile(r"\bexit ?code\s*:\s*(-?\d+)", re.IGNORECASE)
_SIGNALS = {number.value: number.name for number in signal.Signals}


class PointFailed(RuntimeError):
    """A training failed, or cannot be started. The message says why."""


def checked_launcher(launcher: str) -> str:
    """Return the launcher's name or command; ``auto`` becomes ``horovod`` if Horovod is installed, else ``torch``.

    Raises:
        UserError: it is neither a known name nor a command that depends on the number of ranks.
    """
    try:
        two, three = (launcher.format(ranks=ranks) for ranks in (2, 3))
    except (LookupError, ValueError) as error:
        raise UserError(f"--launcher takes a command with {{ranks}} in it, got {launcher!r} ({error!r})") from None
    if two == three and launcher not in ("auto", "horovod", "torch"):
        raise UserError(f"--launcher must be auto, horovod, torch, or a command with {{ranks}} in it; got {launcher!r}")
    if launcher == "auto":
        return "horovod" if find_spec("horovod") else "torch"
    return launcher


def launch(
    arguments: Sequence[str], output: Path, *, ranks: int, launcher: str, environment: Mapping[str, str]
) -> None:
    """Run ``python`` with these arguments on every rank, and write what they print to a file.

    Raises:
        PointFailed: the launcher cannot be started, or a rank failed.
        Interrupted: the ranks were stopped by a signal, to them or to this process (KeyboardInterrupt).
    """
    command = [sys.executable] if ranks == 1 else _command(launcher, ranks)
    with output.open("w") as file:
        try:
            # In a session of its own, so that Ctrl-C comes once and through here.
            process = subprocess.Popen(
                [*command, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
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
        Interrupted: as `launch`.
    """
    with rehearsed_hosts(ranks, mbit=mbit, latency_ms=latency_ms) as hosts, output.open("w") as file:
        _wait(start_ranks(hosts, [sys.executable, *arguments], file), output)


def reason(text: str, codes: Collection[int] = ()) -> str:
    """Return why a training failed: a line of its output, or the signal that killed it; empty if there is neither.

    Args:
        codes: the exit codes of its processes that are not 0.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [found[1] for line in lines if (found := _OWN_ERROR.search(line))]
    # The other ranks then miss the one that failed first.
    first = [line for line in own if not line.startswith("another rank is gone")]
    if told := first or [killer for code in codes if (killer := _killed(code))] or own:
        return told[0]
    raised = [found[1] for line in lines if (found := _EXCEPTION.search(line))]
    return (raised or lines or [""])[-1]


def _killed(code: int) -> str:
    # A shell and srun report a signal as 128 and its number.
    name = _SIGNALS.get(-code if code < 0 else code - 128, "")
    return name and f"killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")


def _wait(processes: list[subprocess.Popen[bytes]], output: Path) -> None:
    """Wait for all; a KeyboardInterrupt is passed on to them as one SIGTERM. Ranks that get two stop at once."""
    interrupted = 0
    while True:
        try:
            codes = {process.wait() for process in processes} - {0}
            break
        except KeyboardInterrupt:
            interrupted += 1
            # The second may be the same wish: of the terminal, and of a parent that passes it on.
            for process in processes if interrupted != 2 else []:
                process.terminate()
    if interrupted:
        raise Interrupted("stopped")
    if codes:
        text = output.read_text(errors="replace")
        codes = {int(code) for code in _EXIT_CODE.findall(text)} - {0} or codes
        # A launcher terminates the ranks that are left.
        codes = codes - {-signal.SIGTERM} or codes
        if codes == {STOPPED}:
            raise Interrupted("the ranks were stopped")
        raise PointFailed(reason(text, codes) or f"it printed nothing and ended with exit code {max(map(abs, codes))}")


def _command(launcher: str, ranks: int) -> list[str]:
    if launcher == "horovod":
        horovodrun = Path(sys.executable).parent / "horovodrun"
        return [str(horovodrun), "-np", str(ranks), sys.executable]
    if launcher == "torch":
        # The arguments begin with -m, which torchrun passes on to python.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launcher.format(ranks=ranks).split()
