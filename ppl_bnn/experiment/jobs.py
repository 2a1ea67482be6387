"""Many independent jobs of one run: trainings, predictions and pruning over seeds, checkpoints and thresholds.

    python -m ppl_bnn.jobs runs/mnist-fc --vary train.seed=0,1,2,3 --workers 2
    python -m ppl_bnn.jobs runs/mnist-fc --vary predict.checkpoint=step-00006000,last --stages predict
    python -m ppl_bnn.jobs runs/mnist-fc --vary train.seed=0,1,2,3 --shard $SLURM_ARRAY_TASK_ID/4

A job is one combination of the varied settings, a process of its own, and a folder under OUT. Jobs that differ in
predict and pruning settings only share one training. When all are done, trainings that differ in train.seed only are
merged into one InferenceData, with a chain each. Finished work is skipped, and a job that fails does not stop the
others.

Exit codes: 0 done; 1 a job failed; 2 bad command, or jobs failed for bad settings only; 75 stopped by a signal.
"""

import argparse
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import BAD_INPUT, DONE, FAILED, STOPPED, guarded
from ppl_bnn.experiment.stage_check import stage_names

# What a training does not depend on.
_AFTER_TRAINING = ("predict.", "pruning.")

log = logging.getLogger("ppl_bnn")

Settings = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _command(*_parser().parse_known_args(arguments)), debug="--debug" in arguments)


class _Parser(argparse.ArgumentParser):
    """argparse's own, which lets unknown options through to the jobs; an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m ppl_bnn.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other option is passed on to python -m ppl_bnn.run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run folder, or a run's out folder")
    parser.add_argument("--vary", action="append", required=True, metavar="SETTING=VALUE,...", help="may be repeated")
    parser.add_argument("--stages", default="train,predict,prune", help="stages of each job (default: %(default)s)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="run only every N-th job, from job I on (from 0)")
    parser.add_argument("--workers", type=int, default=1, help="jobs run at a time; they share the cores (default: 1)")
    parser.add_argument("--out", help="where results go (default: <run>/out, or the out folder itself)")
    return parser


def _command(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    out = Path(parsed.out) if parsed.out else saved_config.out_of(Path(parsed.run))
    combinations, stages = vary(parsed.vary), stage_names(parsed.stages)
    if parsed.workers < 1:
        raise UserError(f"--workers must be at least 1, got {parsed.workers}")
    with _Processes(parsed.workers, [parsed.run, "--quiet", *rest]) as processes:
        return _run(processes, combinations, stages, _shard(parsed.shard), out)


def vary(options: Iterable[str]) -> list[dict[str, Any]]:
    """All combinations of ``setting=value,value`` (a YAML list without its brackets), the last setting fastest.

    Raises:
        UserError: not of that form, or the same value or setting twice.
    """
    choices: dict[str, list[Any]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not equals or not values or name in choices or len({_text(value) for value in values}) < len(values):
            raise UserError(f"--vary takes SETTING=VALUE,VALUE,... with each value and setting once; got {option!r}")
        choices[name] = values
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _shard(text: str) -> slice:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard takes I/N with I from 0 to N - 1, got {text!r}")
    return slice(int(match[1]), None, int(match[2]))


def _run(
    processes: "_Processes", combinations: Sequence[Settings], stages: Sequence[str], shard: slice, out: Path
) -> int:
    folders = {_name(job): _folder(out, job) for job in combinations}
    if len(folders) < len(combinations):
        raise UserError("two jobs would have the same folder: choose values that differ in letters and digits")
    after = [stage for stage in stages if stage != "train"]
    if "train" in stages:
        trainings = list({_name(_training(job)): _training(job) for job in combinations}.values())[shard]
        done = processes.run([(_training_folder(out, job), ["train"], job) for job in trainings])
        mine = [job for job in combinations if _training_folder(out, job) in done]
    else:
        mine = list(combinations[shard])
    if after:
        for job in mine:
            _link_checkpoints(_folder(out, job), _training_folder(out, job))
        processes.run([(_folder(out, job), after, job) for job in mine])
        if not processes.stopping:
            _merge(combinations, out, [name for name, stage in _RESULTS.items() if stage in after])
    return processes.exit_code()


_RESULTS = {"predictive": "predict", "pruning": "prune"}


@dataclass
class _Processes:
    """Runs `workers` jobs at a time. A signal is passed on to them, and no more are started."""

    workers: int
    command: Sequence[str]
    stopping: bool = False
    codes: list[int] = field(default_factory=list)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def run(self, jobs: Sequence[tuple[Path, Sequence[str], Settings]]) -> set[Path]:
        """Run all jobs. Return the folders of those that succeeded."""
        with ThreadPoolExecutor(self.workers) as pool:
            codes = list(pool.map(lambda job: self._run_one(*job), jobs))
        self.codes += codes
        return {folder for (folder, _, _), code in zip(jobs, codes, strict=True) if code == DONE}

    def _run_one(self, folder: Path, stages: Sequence[str], settings: Settings) -> int:
        if self.stopping:
            return STOPPED
        folder.mkdir(parents=True, exist_ok=True)
        varied = [word for name, value in settings.items() for word in (f"--{name}", _text(value))]
        # The command's own options last: they count.
        arguments = [*self.command, *varied, "--out", str(folder), "--stages", ",".join(stages)]
        path = folder / "job.log"
        # Not as a setting, which the out folder would keep for commands that have all cores. MKL has a variable of its
        # own, which comes first.
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.workers))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with path.open("ab") as file:
            # In a session of its own, so that Ctrl-C comes once and through here.
            process = subprocess.Popen(
                [sys.executable, "-m", "ppl_bnn.run", *arguments], env=environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        last = (path.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        if code < 0 and self.stopping:
            code = STOPPED
        done = {DONE: "done", STOPPED: "stopped"}.get(code, f"failed with exit code {code}: {last}; see {path}")
        log.info("%s, %s: %s", folder, ",".join(stages), done)
        return code

    def exit_code(self) -> int:
        """The exit code of the whole command."""
        failed = {code for code in self.codes if code != DONE}
        if self.stopping or failed == {STOPPED}:
            log.warning("stopped; run the same command again to resume")
            return STOPPED
        return DONE if not failed else BAD_INPUT if failed == {BAD_INPUT} else FAILED

    def __enter__(self) -> "_Processes":
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)


def _merge(combinations: Sequence[Settings], out: Path, names: Sequence[str]) -> None:
    # Not for --help: ArviZ takes seconds to import.
    from ppl_bnn.experiment.merging import differing, generators, merge
    from ppl_bnn.experiment.provenance import read_inputs, result_path
    from ppl_bnn.results import idata as inference_data
    from ppl_bnn.results import netcdf

    for name in names:
        groups: dict[str, list[Settings]] = {}
        for job in combinations:
            groups.setdefault(_name(_without_seed(job)), []).append(job)
        for group, jobs in groups.items():
            paths = [result_path(_folder(out, job), name) for job in jobs]
            file, there = paths[0].name, sum(path.exists() for path in paths)
            if len(paths) > 1 and there == len(paths):
                attributes = [netcdf.read_attrs(path) for path in paths]
                if difference := differing([of.get("inputs", {}) for of in attributes]):
                    log.info("%s of %s: not merged, the results differ (%s)", file, group or "all", difference)
                    continue
                if len(found := generators(attributes)) > 1:
                    log.info("%s of %s: not merged, drawn by %s", file, group or "all", " and ".join(sorted(found)))
                    continue
                likelihood = read_inputs(attributes[0].get("inputs", {}))["model.likelihood"]
                if name == "predictive" and likelihood != "categorical":
                    log.info("%s of %s: not merged, which is for classes, not %s", file, group or "all", likelihood)
                    continue
                merged = out / "merged" / group / file
                attrs = {"chains": [str(path.relative_to(out)) for path in paths]}
                netcdf.save(merge([inference_data.load(path) for path in paths], attrs=attrs), merged)
                log.info("%s: %d chains", merged, len(paths))
            elif there < len(paths):
                log.info("%s of %s: %d of %d are done; merged once all are", file, group or "all", there, len(paths))


def _without_seed(job: Settings) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != "train.seed"}


def _training(job: Settings) -> dict[str, Any]:
    return {name: value for name, value in job.items() if not name.startswith(_AFTER_TRAINING)}


def _training_folder(out: Path, job: Settings) -> Path:
    return out / "jobs" / _name(_training(job)) if _training(job) else out


def _folder(out: Path, job: Settings) -> Path:
    after = {name: value for name, value in job.items() if name.startswith(_AFTER_TRAINING)}
    folder = _training_folder(out, job)
    return (folder / _name(after) if _training(job) else out / "jobs" / _name(after)) if after else folder


def _link_checkpoints(folder: Path, training: Path) -> None:
    link = folder / "checkpoints"
    if folder != training and not link.is_symlink():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(training / "checkpoints", folder))


def _name(settings: Settings) -> str:
    return ",".join(f"{name}={re.sub(r'[^A-Za-z0-9._+-]+', '_', _text(value))}" for name, value in settings.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
