"""Many independent jobs of one run: trainings, predictions and pruning over seeds, checkpoints and thresholds.

    ppl_bnn jobs runs/mnist-fc --vary train.seed=0,1,2,3 --workers 2
    ppl_bnn jobs runs/mnist-fc --vary predict.checkpoint=step-00006000,last --stages predict
    ppl_bnn jobs runs/mnist-fc --vary train.seed=0,1 --executor slurm --slurm.partition gpu --slurm.time 60
    ppl_bnn jobs runs/mnist-fc --vary train.seed=0,1 --executor my_package.cluster:make
    ppl_bnn jobs runs/mnist-fc --vary train.seed=0,1,2,3 --shard $SLURM_ARRAY_TASK_ID/4

A job is one combination of the varied settings, a process of its own, and a folder under OUT. Jobs that differ in
predict and pruning settings only share one training. When all are done, trainings that differ in train.seed only are
merged into one InferenceData, with a chain each. Finished work is skipped, and a job that fails does not stop the
others.

Jobs run on this host (local), through Slurm (slurm; every --slurm.NAME VALUE is submitit's), as Slurm jobs would but on
this host (submitit-local), or where a function of your own sends them: it returns an object with submit(function,
*arguments), such as a concurrent.futures.Executor or Dask's client. All hosts must see the same folders.

A signal stops all jobs with a checkpoint each. If this command is killed at once, the jobs on this host end too. The
same command resumes. Jobs that Slurm has stay there.

Exit codes: 0 done; 1 a job failed; 2 bad command, or jobs failed for bad settings only; 75 stopped by a signal.
"""

import argparse
import logging
import math
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import BAD_INPUT, DONE, FAILED, STOPPED, guarded, parse_run, settings_parser
from ppl_bnn.experiment.executors import EXECUTORS, Engine, Future, opened_executor
from ppl_bnn.experiment.job_plan import (
    Job,
    Settings,
    check_folders,
    folder_of,
    link_checkpoints,
    name_of,
    shard,
    training_folder,
    training_of,
    varied_code,
    vary,
    without_seed,
)
from ppl_bnn.experiment.job_process import run_job
from ppl_bnn.experiment.stage_check import stage_names

# Seconds between two looks at the jobs, and for jobs to end by themselves after a signal.
_PAUSE, _PATIENCE = 0.1, 10.0
_RESULTS = {"predictive": "predict", "pruning": "prune"}

log = logging.getLogger("ppl_bnn")


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
        prog="ppl_bnn jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every --slurm.NAME VALUE is an option of submitit's Slurm executor: partition, time in minutes, "
        "cpus_per_task, gpus_per_node, mem, account, ... Every other option is passed on to ppl_bnn run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run folder, or a run's out folder")
    parser.add_argument("--vary", action="append", required=True, metavar="SETTING=VALUE,...", help="may be repeated")
    parser.add_argument("--stages", default="train,predict,prune", help="stages of each job (default: %(default)s)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="run only every N-th job, from job I on (from 0)")
    parser.add_argument(
        "--workers", type=int, help="jobs run at a time; on this host they share the cores (default: 1 on this host, "
        "and as many as the executor takes elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--executor", default="local", help=f"where jobs run: {', '.join(EXECUTORS)}, or an import path of your own "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", help="where results go (default: <run>/out, or the out folder itself)")
    return parser


def _job_parser() -> ArgumentParser:
    """The parser of what is passed on to each job, beside its stages and its folder."""
    parser = settings_parser()
    for name in ("--elastic", "--quiet"):
        parser.add_argument(name, action="store_true")
    return parser


def _command(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
    out = Path(parsed.out) if parsed.out else saved_config.out_of(Path(parsed.run))
    combinations, stages = vary(parsed.vary), stage_names(parsed.stages)
    if parsed.workers is not None and parsed.workers < 1:
        raise UserError(f"--workers must be at least 1, got {parsed.workers}")
    part = shard(parsed.shard)
    check_folders(combinations)
    options, rest = _slurm_options(rest)
    # Without a run, or with another user's code, no job could start, and folders of jobs would be left behind.
    for varied in varied_code(combinations):
        parse_run(_job_parser, [parsed.run, *rest, *varied])
    with (
        opened_executor(parsed.executor, workers=parsed.workers, options=options, folder=out.resolve()) as engine,
        # Inside: an executor that is closed waits for its jobs, which a signal must still reach.
        _Jobs(engine, [parsed.run, "--quiet", *rest], out) as jobs,
    ):
        _run(jobs, combinations, stages, part, out)
    # Outside: files are read in another way while one of Dask's clients is open.
    if not jobs.stopping:
        _merge(combinations, out, [name for name, stage in _RESULTS.items() if stage in stages])
    return jobs.exit_code()


def _slurm_options(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options ``--slurm.NAME VALUE``, numbers as such, and the other words."""
    options: dict[str, Any] = {}
    others, left = [], iter(words)
    for word in left:
        if not word.startswith("--slurm."):
            others.append(word)
            continue
        name, equals, value = word.removeprefix("--slurm.").partition("=")
        value = value if equals else next(left, "")
        if not name or not value:
            raise UserError(f"an option for Slurm is --slurm.NAME VALUE, got {word} without a value")
        options[name] = int(value) if value.isdecimal() else value
    return options, others


def _run(jobs: "_Jobs", combinations: Sequence[Settings], stages: Sequence[str], part: slice, out: Path) -> None:
    after = [stage for stage in stages if stage != "train"]
    if "train" in stages:
        trainings = list({name_of(training_of(job)): training_of(job) for job in combinations}.values())[part]
        done = jobs.run([Job(training_folder(out, job), ["train"], job) for job in trainings])
        mine = [job for job in combinations if training_folder(out, job) in done]
    else:
        mine = list(combinations[part])
    if after and not jobs.stopping:
        for job in mine:
            link_checkpoints(folder_of(out, job), training_folder(out, job))
        jobs.run([Job(folder_of(out, job), after, job) for job in mine])


@dataclass
class _Jobs:
    """Runs jobs through an engine. After a signal no more are started, and those that run are told to stop."""

    engine: Engine
    command: Sequence[str]
    out: Path
    stopping: bool = False
    codes: list[int] = field(default_factory=list)
    # When the executor is to cancel what is left.
    _cancelled: float | None = None

    def run(self, jobs: Sequence[Job]) -> set[Path]:
        """Run all jobs. Return the folders of those that succeeded."""
        waiting, running = list(jobs), list[tuple[Future, Job]]()
        done = set()
        while running or (waiting and not self.stopping):
            if not self.stopping:
                free = len(waiting) if self.engine.limit is None else self.engine.limit - len(running)
                now, waiting = waiting[:free], waiting[free:]
                running += zip(self._submitted(now), now, strict=True)
            ended = [(future, job) for future, job in running if future.done()]
            running = [pair for pair in running if pair not in ended]
            for future, job in ended:
                self.codes.append(self._ended(future, job))
                if self.codes[-1] == DONE:
                    done.add(job.folder)
            if not ended:
                time.sleep(_PAUSE)
            if self.stopping and self._cancelled is None:
                self._cancelled = time.monotonic() + _PATIENCE
            elif self._cancelled is not None and time.monotonic() > self._cancelled:
                # They wait in the executor's queue, or do not stop by themselves.
                for future, _ in running:
                    future.cancel()
                self._cancelled = math.inf
        return done

    def _submitted(self, jobs: Sequence[Job]) -> list[Future]:
        if not jobs:
            return []
        here, per_host = str(Path.cwd()), self.engine.jobs_per_host
        # Absolute: an executor's processes may work in another folder.
        calls = [
            (
                [*self.command, *job.arguments()], str((job.folder / "job.log").absolute()), str(self._stop_file), here,
                per_host,
            )
            for job in jobs
        ]  # fmt: skip
        return self.engine.submit_all(run_job, calls)

    def _ended(self, future: Future, job: Job) -> int:
        try:
            code, last = future.result()
        except Exception as error:  # noqa: BLE001 -- an executor has errors of its own, of lost hosts and the like
            code, last = FAILED, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"
            code = STOPPED if self.stopping else code
        if code < 0 and self.stopping:
            code = STOPPED
        path = job.folder / "job.log"
        said = {DONE: "done", STOPPED: "stopped"}.get(code, f"failed with exit code {code}: {last}; see {path}")
        log.info("%s, %s: %s", job.folder, ",".join(job.stages), said)
        return code

    def exit_code(self) -> int:
        """The exit code of the whole command."""
        failed = {code for code in self.codes if code != DONE}
        if self.stopping or failed == {STOPPED}:
            log.warning("stopped; run the same command again to resume")
            return STOPPED
        return DONE if not failed else BAD_INPUT if failed == {BAD_INPUT} else FAILED

    def __enter__(self) -> "_Jobs":
        # Of this command alone: others may work in the same folder.
        self._stop_file = self.out.absolute() / f".stop-{secrets.token_hex(4)}"
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._stop_file.unlink(missing_ok=True)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self.out.mkdir(parents=True, exist_ok=True)
        # One byte a signal: the jobs get as many.
        with self._stop_file.open("ab") as file:
            file.write(b".")


def _merge(combinations: Sequence[Settings], out: Path, names: Sequence[str]) -> None:
    # Not for --help: ArviZ takes seconds to import.
    from ppl_bnn.experiment.merging import differing, generators, merge
    from ppl_bnn.experiment.provenance import read_inputs, result_path
    from ppl_bnn.results import idata as inference_data
    from ppl_bnn.results import netcdf

    for name in names:
        groups: dict[str, list[Settings]] = {}
        for job in combinations:
            groups.setdefault(name_of(without_seed(job)), []).append(job)
        for group, jobs in groups.items():
            paths = [result_path(folder_of(out, job), name) for job in jobs]
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
