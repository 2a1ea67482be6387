"""Measures one point of the scaling study: launches a training, which writes its performance.json."""

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
    """One training to time.

    Args:
        run: run folder.
        batch: batch size of one rank.
        mbit, latency_ms: bandwidth (Mbit/s) and latency (ms) of the links between rehearsed hosts, one host for each
            rank. 0: no rehearsed hosts, the launcher places the ranks.
        repeat: number of this repeat, from 0.
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
        """Name of its folder."""
        run = re.sub(r"\W+", "-", self.run).strip("-")
        link = f"-{self.mbit:g}mbit" if self.mbit else ""
        link += f"-{self.latency_ms:g}ms" if self.latency_ms else ""
        return f"{run}-{self.device.replace(':', '')}-batch{self.batch}-ranks{self.ranks}{link}-{self.repeat}"


class PointFailed(RuntimeError):
    """A training failed."""


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
    """Train in `folder`, unless the same point was finished there before.

    Args:
        steps: number of timed steps, after one untimed step. Ignored with `epochs`.
        epochs: train this number of whole epochs instead.
        threads: threads of each rank.
        launcher: ``auto``, ``horovod``, ``torch``, or a command with {ranks} in it.
        settings: further arguments of `ppl_bnn.run`.

    Raises:
        PointFailed: the training failed.
        NotPermitted: hosts cannot be rehearsed here.
    """
    arguments = [
        "-m", "ppl_bnn.run", point.run, "--stages", "train", "--quiet", "--device", point.device,
        "--threads", str(threads), "--train.batch_size", str(point.batch),
    ]  # fmt: skip
    if epochs is None:
        # One epoch a step: the steps do not depend on the number of images, and nothing is written between them.
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
        raise PointFailed(f"no {folder / 'performance.json'}: did rank 0 write to the disk of another host?")
    write_text(folder / "point.json", json.dumps({"command": command, "done": True}))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _launch(point: Setting, launcher: str, arguments: list[str], output: Path) -> None:
    """Run a training to its end and write its output to a file."""
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
        raise PointFailed(f"exit code {max(map(abs, codes))}; {output} has the whole output: {lines[-1].strip()}")


def check_launcher(launcher: str) -> None:
    """Raise UserError for a launcher that is neither a known name nor a command."""
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
        # A damaged file: the point is measured again.
        content = None
    return content if isinstance(content, dict) else {}


def _launcher(launcher: str, ranks: int) -> list[str]:
    if launcher == "auto":
        launcher = "horovod" if find_spec("horovod") else "torch"
    if launcher == "horovod":
        horovodrun = Path(sys.executable).parent / "horovodrun"
        return [str(horovodrun), "-np", str(ranks), sys.executable]
    if launcher == "torch":
        # The arguments begin with -m, which torchrun passes on to python.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launcher.format(ranks=ranks).split()
