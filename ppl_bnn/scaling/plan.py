"""The points of a study in the order in which they are measured, from the options of the command."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm import tqdm

from ppl_bnn.errors import UserError
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.native.openmp import num_cores
from ppl_bnn.registry import lookup
from ppl_bnn.scaling.hosts import NotPermitted
from ppl_bnn.scaling.launch import PointFailed, checked_launcher
from ppl_bnn.scaling.point import Setting, measure
from ppl_bnn.scaling.run_settings import run_settings

_LEAST = {
    "ranks": 1, "batches": 1, "steps": 2, "repeats": 1, "epochs": 1, "threads": 1, "mbit": 0, "latency_ms": 0,
    "fusion_mb": 0,
}  # fmt: skip

log = logging.getLogger("ppl_bnn")

Done = list[tuple[Setting, Path]]


@dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes:
        points: in the order of measuring.
        runs: the resolved settings of each run folder.
        settings: further arguments of `ppl_bnn.run`.
        launcher: as `measure` takes it.
    """

    points: Sequence[Setting]
    runs: Mapping[str, Mapping[str, Any]]
    settings: Sequence[str]
    launcher: str
    threads: int
    steps: int
    epochs: int | None
    out: Path

    def measure(self) -> tuple[Done, dict[str, str], dict[str, str]]:
        """Measure every point; return those measured with their folders, and why others were skipped or failed.

        Raises:
            Interrupted: a point was stopped; the points after it are not measured.
        """
        done: Done = []
        skipped, failed = {}, {}
        for point in (bar := tqdm(self.points, unit="point", disable=None)):
            bar.set_postfix_str(point.name, refresh=True)
            folder = self.out / "points" / point.name
            try:
                measure(
                    point, folder, run_settings=self.runs[point.run], steps=self.steps, epochs=self.epochs,
                    threads=self.threads, launcher=self.launcher, settings=self.settings,
                )  # fmt: skip
                done.append((point, folder))
            except NotPermitted as reason:
                skipped[point.name] = str(reason)
                log.warning("%s: skipped: %s", point.name, reason)
            except PointFailed as reason:
                failed[point.name] = str(reason)
                log.error("error: %s failed: %s (output.txt in %s has more)", point.name, reason, folder)
        return done, skipped, failed


def plan_of(options: Namespace, settings: Sequence[str]) -> Plan:
    """Return what the options ask for.

    Args:
        options: of the command (`ppl_bnn.scaling`).
        settings: options of `ppl_bnn.run`, for every run.

    Raises:
        UserError, ArgumentError: options or settings that cannot be used.
    """
    runs = {run: run_settings(run, settings) for run in options.runs}
    _check(options, settings)
    return Plan(
        points=list(dict.fromkeys(_points(options, runs))),
        runs=runs,
        settings=settings,
        launcher=checked_launcher(options.launcher),
        threads=options.threads or max(1, num_cores() // max(options.ranks)),
        steps=options.steps,
        epochs=options.epochs,
        out=Path(options.out),
    )


def _check(options: Namespace, settings: Sequence[str]) -> None:
    if len({Path(run).name for run in options.runs}) < len(options.runs):
        raise UserError(f"run folders need different names, because the table lists them by name; got {options.runs}")
    for name, lowest in _LEAST.items():
        values = getattr(options, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < lowest:
            raise UserError(f"--{name} must be at least {lowest}, got {values}")
    if options.cycle_ms is not None and min(options.cycle_ms) <= 0:
        raise UserError(f"--cycle_ms must be above 0, got {options.cycle_ms}")
    if bad := [accuracy for accuracy in options.accuracy if not 0 < accuracy <= 1]:
        raise UserError(f"--accuracy is a share above 0 and at most 1, got {bad[0]}")
    if any(options.latency_ms) and not any(options.mbit):
        raise UserError("--latency_ms is of rehearsed hosts: give them a bandwidth with --mbit")
    for estimator in options.estimators or ():
        lookup(ESTIMATORS, estimator, what="--estimators")
    if options.estimators and any(setting.startswith("--train.estimator") for setting in settings):
        raise UserError("--estimators and --train.estimator both choose the estimator: give one of them")
    if options.cycle_ms or options.fusion_mb:
        _check_horovod(options)


def _check_horovod(options: Namespace) -> None:
    what = "--cycle_ms and --fusion_mb are settings of Horovod"
    if checked_launcher(options.launcher) == "torch":
        why = (
            "Horovod is not installed here, so --launcher auto takes torchrun, which has no such settings"
            if options.launcher == "auto"
            else "--launcher torch has no such settings"
        )
        raise UserError(f"{what}; {why}")
    if any(options.mbit):
        raise UserError(f"{what}; the ranks on rehearsed hosts (--mbit) use torch.distributed, which has none")


def _points(options: Namespace, runs: Mapping[str, Mapping[str, Any]]) -> Iterator[Setting]:
    # Repeats are the outer loop, so that a machine that slows down slows all points alike.
    links = dict.fromkeys((mbit, delay if mbit else 0.0) for mbit, delay in product(options.mbit, options.latency_ms))
    messages = [
        {"mbit": mbit, "latency_ms": delay, "cycle_ms": cycle, "fusion_mb": fusion}
        for (mbit, delay), cycle, fusion in product(links, options.cycle_ms or [None], options.fusion_mb or [None])
    ]
    for repeat, device, batch, ranks in product(
        range(options.repeats), options.devices, options.batches, options.ranks
    ):
        for sent, (run, settings) in product(messages if ranks > 1 else [{}], runs.items()):
            for estimator in [""] if settings["model"]["deterministic"] else options.estimators or [""]:
                yield Setting(run, device, batch, ranks, estimator, **sent, repeat=repeat)
