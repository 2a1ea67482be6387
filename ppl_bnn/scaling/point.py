"""Measures one point of the scaling study: a training, started once and started again when its settings changed."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.saved_config import first_difference
from ppl_bnn.files import write_text
from ppl_bnn.scaling.launch import PointFailed, launch, launch_on_rehearsed_hosts
from ppl_bnn.settings import decisive, per_host

# Environment variables that change how fast a rank computes, by how their names begin, and how fast ranks communicate.
_ARITHMETIC = (
    "ATEN_", "CUDA_", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PPL_BNN_NATIVE",
    "PYTORCH_", "TORCH_",
)  # fmt: skip
_MESSAGES = ("FI_", "GLOO_", "HOROVOD_", "I_MPI_", "MPICH_", "NCCL_", "OMPI_", "UCX_")

log = logging.getLogger("ppl_bnn")


@dataclass(frozen=True)
class Setting:
    """One training to time.

    Args:
        run: run folder.
        batch: batch size of one rank.
        estimator: of the gradient (``train.estimator``); empty for the run's own.
        mbit, latency_ms: bandwidth (Mbit/s) and latency (ms) of the links between rehearsed hosts, one host for each
            rank. 0: no rehearsed hosts, the launcher places the ranks.
        cycle_ms, fusion_mb: Horovod's cycle time (ms) and fusion buffer (MiB). None: not set by the study.
        repeat: number of this repeat, from 0.
    """

    run: str
    device: str
    batch: int
    ranks: int
    estimator: str = ""
    mbit: float = 0.0
    latency_ms: float = 0.0
    cycle_ms: float | None = None
    fusion_mb: float | None = None
    repeat: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = [Path(self.run).name, self.device.replace(":", "")]
        parts += [self.estimator] if self.estimator else []
        parts += [f"batch{self.batch}", f"ranks{self.ranks}"]
        parts += [f"cycle{self.cycle_ms:g}ms"] if self.cycle_ms is not None else []
        parts += [f"fusion{self.fusion_mb:g}mb"] if self.fusion_mb is not None else []
        parts += [f"{self.mbit:g}mbit"] if self.mbit else []
        parts += [f"{self.latency_ms:g}ms"] if self.latency_ms else []
        return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in [*parts, str(self.repeat)])

    def environment(self) -> dict[str, str]:
        """Return the environment of its ranks: this process's, with the settings of Horovod."""
        own = {}
        if self.cycle_ms is not None:
            own["HOROVOD_CYCLE_TIME"] = f"{self.cycle_ms:g}"
        if self.fusion_mb is not None:
            own["HOROVOD_FUSION_THRESHOLD"] = str(round(self.fusion_mb * 2**20))
        return {**os.environ, **own}


def measure(
    point: Setting,
    folder: Path,
    *,
    run_settings: Mapping[str, Any],
    steps: int,
    epochs: int | None,
    threads: int,
    launcher: str,
    settings: Sequence[str],
) -> None:
    """Train in `folder`, unless the same point was finished there before.

    It is the same point if these did not change: the run's settings, the command, its launcher, and the environment
    variables that decide how fast a rank computes and the ranks communicate. Where a host has its data does not count,
    nor do the threads and the arithmetic of a whole training. ``point.json`` holds all this, and ``elapsed_seconds``
    from the launcher's start to its end. A whole training of another point is moved aside, never deleted.

    Args:
        run_settings: the run's own settings, resolved, as JSON.
        steps: number of timed steps, after one untimed step. Ignored with `epochs`.
        epochs: train this number of whole epochs instead.
        threads: threads of each rank.
        launcher: ``horovod``, ``torch``, or a command with {ranks} in it.
        settings: further arguments of `ppl_bnn.run`.

    Raises:
        PointFailed: the training failed, or cannot be started.
        NotPermitted: hosts cannot be rehearsed here.
        Interrupted: the ranks were stopped. A whole training resumes, and one of some steps starts again.
    """
    arguments = _arguments(point, steps=steps, epochs=epochs, threads=threads, settings=settings)
    environment = point.environment()
    identity = {
        "settings": run_settings,
        "arguments": arguments,
        "launcher": launcher if point.ranks > 1 else "",
        "environment": _that_matters(environment, point.ranks),
    }
    record = folder / "point.json"
    if record.exists():
        before = _read(record)
        there, own = before.get("identity"), len(arguments) - len(settings)
        difference = _difference(there, identity, own=own, whole=epochs is not None)
        if not difference and before.get("done"):
            return
        if difference and (epochs is not None or not _is_short(there)):
            aside = _set_aside(folder)
            log.warning("%s: trained anew (%s); the training before is now %s", point.name, difference, aside)
        elif epochs is None:
            # To resume a training of some steps would leave too few to time: the first of each process does not count.
            shutil.rmtree(folder)
    write_text(record, json.dumps({"identity": identity, "done": False}))
    command, output = [*arguments, "--out", str(folder)], folder / "output.txt"
    started = time.monotonic()
    if point.mbit:
        launch_on_rehearsed_hosts(command, output, ranks=point.ranks, mbit=point.mbit, latency_ms=point.latency_ms)
    else:
        launch(command, output, ranks=point.ranks, launcher=launcher, environment=environment)
    elapsed = time.monotonic() - started
    _check(point, folder)
    write_text(record, json.dumps({"identity": identity, "done": True, "elapsed_seconds": round(elapsed, 3)}))
    if epochs is None:
        # A network that was trained for some steps is of no use to anyone.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _arguments(point: Setting, *, steps: int, epochs: int | None, threads: int, settings: Sequence[str]) -> list[str]:
    arguments = [
        "-m", "ppl_bnn.run", point.run, "--stages", "train", "--quiet", "--device", point.device,
        "--threads", str(threads), "--train.batch_size", str(point.batch),
    ]  # fmt: skip
    if point.estimator:
        arguments += ["--train.estimator", point.estimator]
    if epochs is None:
        # One epoch a step: the steps do not depend on the number of images, and nothing is written between them.
        images = point.batch * point.ranks
        arguments += ["--data.num_train", str(images), "--train.epochs", str(steps + 1)]
        arguments += ["--train.checkpoint_every", str(steps + 1)]
    else:
        arguments += ["--train.epochs", str(epochs)]
    return [*arguments, *settings]


def _that_matters(environment: Mapping[str, str], ranks: int) -> dict[str, str]:
    begin = (*_ARITHMETIC, *_MESSAGES) if ranks > 1 else _ARITHMETIC
    return {name: value for name, value in sorted(environment.items()) if name.startswith(begin)}


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any], *, own: int, whole: bool) -> str | None:
    """Return in words the first difference that makes it another point, or None."""
    if before is None:
        return "its point.json is damaged"
    there, here = (_compared(identity, own=own, whole=whole) for identity in (before, now))
    # What only one of them has is found in one direction only.
    return first_difference(here, there, words=("before", "now")) or first_difference(
        there, here, words=("now", "before")
    )


def _compared(identity: Mapping[str, Any], *, own: int, whole: bool) -> dict[str, Any]:
    """Return what makes it the same point. Of the arguments the first `own` count: the others are in the settings."""
    _, _, run, _, _, _, *options = identity["arguments"][:own]
    of_host = {
        name: set(per_host(type(part))) - set(decisive(type(part)))
        for name, part in vars(Config()).items()
        if is_dataclass(part)
    }
    found = {
        "run": run,
        "options": dict(zip(options[::2], options[1::2], strict=False)),
        "settings": {
            name: {key: value for key, value in part.items() if key not in of_host.get(name, ())}
            if isinstance(part, dict)
            else part
            for name, part in identity["settings"].items()
        },
        "launcher": identity["launcher"],
        "environment": dict(identity["environment"]),
    }
    if whole:
        # They decide how fast it trains, not what.
        found["options"].pop("--threads", None)
        found["settings"].pop("threads", None)
        found["environment"] = {
            name: value for name, value in found["environment"].items() if not name.startswith(_ARITHMETIC)
        }
    return found


def _is_short(identity: Mapping[str, Any] | None) -> bool:
    """Whether this is known to be a training of some steps."""
    arguments = identity["arguments"] if identity else ["--train.epochs"]
    return "--data.num_train" in arguments[: arguments.index("--train.epochs")]


def _set_aside(folder: Path) -> Path:
    """Rename a folder to ``<name>-before``, or ``<name>-before-2`` and so on; return its new path."""
    names = (f"{folder.name}-before" + (f"-{number}" if number > 1 else "") for number in count(1))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def _check(point: Setting, folder: Path) -> None:
    """Raise PointFailed if the training did not leave what the table needs."""
    path = folder / "performance.json"
    if not path.exists():
        raise PointFailed(f"no {path}: did rank 0 write to the disk of another host?")
    content = _read(path)
    if (count := len(content["seconds"]) - len(content["starts"])) < 2:
        raise PointFailed(f"at least 2 steps are needed after the first of each process, got {max(count, 0)}")
    if content["ranks"] != point.ranks:
        raise PointFailed(f"the launcher started {content['ranks']} ranks, not {point.ranks}: has it {{ranks}} in it?")
    if (point.cycle_ms, point.fusion_mb) != (None, None) and not content["backend"].startswith("Horovod"):
        raise PointFailed(f"cycle_ms and fusion_mb are settings of Horovod; these ranks used {content['backend']}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # A damaged file: the point is measured again.
        content = None
    return content if isinstance(content, dict) else {}
