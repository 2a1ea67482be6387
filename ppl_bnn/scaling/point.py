"""One point of the scaling study: a training that is launched, once, and leaves its performance.json."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppl_bnn.errors import UserError
from ppl_bnn.files import write_text
from ppl_bnn.scaling.hosts import rehearsed_hosts, start_ranks


@dataclass(frozen=True)
class Setting:
    """One training to be timed.

    Args:
        mbit, latency_ms: of the links between rehearsed hosts, one for each rank; 0: ranks as the launcher has them.
    """

    run: str
    device: str
    batch: int
    ranks: int
    mbit: float
    latency_ms: float
    repeat: int

    @property
    def name(self) -> str:
        """Of its folder."""
        run = re.sub(r"\W+", "-", self.run).strip("-")
        link = f"-{self.mbit:g}mbit" if self.mbit else ""
        link += f"-{self.latency_ms:g}ms" if self.latency_ms else ""
        return f"{run}-{self.device.replace(':', '')}-batch{self.batch}-ranks{self.ranks}{link}-{self.repeat}"


class PointFailed(RuntimeError):
    """A training did not end well."""


def measure(
    point: Setting,
    folder: Path,
    *,
    steps: int,
    epochs: int | None,
    threads: int,
    launcher: str,
    settings: Sequence[str],
) -> None:
    """Train in `folder`, unless the same point was done there before.

    Args:
        steps: timed ones, after one that is not; without `epochs`.
        epochs: train whole epochs instead.
        threads: of each rank.
        launcher: ``auto``, ``horovod``, ``torch``, or a command with {ranks} in it.
        settings: further arguments of `ppl_bnn.run`.

    Raises:
        PointFailed: the training did not end well.
        NotPermitted: hosts cannot be rehearsed here.
    """
    arguments = [
        "-m", "ppl_bnn.run", point.run, "--stages", "train", "--quiet", "--device", point.device,
        "--threads", str(threads), "--train.batch_size", str(point.batch),
    ]  # fmt: skip
    if epochs is None:
        # An epoch a step: the same steps whatever the number of images, and nothing is written in between.
        images = point.batch * point.ranks
        arguments += ["--data.num_train", str(images), "--train.epochs", str(steps + 1)]
        arguments += ["--train.checkpoint_every", str(steps + 1)]
    else:
        arguments += ["--train.epochs", str(epochs)]
    arguments += settings
    command = {"arguments": arguments, "launcher": launcher if point.ranks > 1 else ""}
    if (folder / "point.json").exists():
        before = _read(folder / "point.json")
        if before.get("command") != command:
            shutil.rmtree(folder)
        elif before.get("done"):
            return
    write_text(folder / "point.json", json.dumps({"command": command, "done": False}))
    _launch(point, launcher, [*arguments, "--out", str(folder)], folder / "output.txt")
    if not (folder / "performance.json").exists():
        raise PointFailed(f"no {folder / 'performance.json'}: the launcher's rank 0 wrote to another host's disk?")
    write_text(folder / "point.json", json.dumps({"command": command, "done": True}))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _launch(point: Setting, launcher: str, arguments: list[str], output: Path) -> None:
    """Run a training to its end, its output in a file."""
    if point.mbit:
        links = rehearsed_hosts(point.ranks, mbit=point.mbit, latency_ms=point.latency_ms)
        with links as hosts, output.open("w") as file:
            _wait(start_ranks(hosts, [sys.executable, *arguments], file), output)
    else:
        command = [sys.executable] if point.ranks == 1 else _launcher(launcher, point.ranks)
        with output.open("w") as file:
            try:
                process = subprocess.Popen([*command, *arguments], stdout=file, stderr=subprocess.STDOUT)
            except OSError as error:
                raise PointFailed(f"{command[0]} cannot be started: {error.strerror}") from None
            _wait([process], output)


def _wait(processes: list[subprocess.Popen[bytes]], output: Path) -> None:
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if any(codes):
        lines = [line for line in output.read_text(errors="replace").splitlines() if "error" in line.lower()] or [""]
        raise PointFailed(f"exit code {max(map(abs, codes))}; {output} has it all: {lines[-1].strip()}")


def check_launcher(launcher: str) -> None:
    """Raise UserError for a launcher that is not known and no command either."""
    try:
        command = launcher.format(ranks=2).split()
    except (LookupError, ValueError) as error:
        raise UserError(f"--launcher takes a command with {{ranks}} in it, got {launcher!r} ({error!r})") from None
    if not command:
        raise UserError("--launcher must be auto, horovod, torch, or a command with {ranks} in it; got nothing")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # Damaged: the point is measured anew.
        content = None
    return content if isinstance(content, dict) else {}


def _launcher(launcher: str, ranks: int) -> list[str]:
    if launcher == "auto":
        launcher = "horovod" if find_spec("horovod") else "torch"
    if launcher == "horovod":
        horovodrun = Path(sys.executable).parent / "horovodrun"
        return [str(horovodrun), "-np", str(ranks), sys.executable]
    if launcher == "torch":
        # Its arguments begin with -m, as python's do.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launcher.format(ranks=ranks).split()
