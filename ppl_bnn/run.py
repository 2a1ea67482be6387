"""Train, look at, predict with, prune and report a run.

    ppl_bnn run runs/mnist-fc                                     # or python -m ppl_bnn.run runs/mnist-fc
    ppl_bnn run mnist-fc                                          # a recipe, from any folder
    ppl_bnn run runs/mnist-fc --stages predict,prune --predict.num_samples 1000
    ppl_bnn run runs/mnist-fc --stages summary
    ppl_bnn run runs/mnist-fc/out --stages prune                  # a run again, by its out folder alone
    horovodrun -np 2 python -m ppl_bnn.run runs/mnist-fc          # two ranks train it
    torchrun --nproc-per-node 2 -m ppl_bnn.run runs/mnist-fc      # the same without Horovod

Exit codes: 0 done; 1 failed while running; 2 bad command, settings or data; 75 stopped by a signal with a
checkpoint saved (run the same command again to resume).
"""

import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from ppl_bnn.native.openmp import num_cores, wait_briefly

# Before torch is imported, which reads it.
if __name__ == "__main__":
    wait_briefly()

import torch
from jsonargparse import ArgumentParser, Namespace

from ppl_bnn.devices import check_precision
from ppl_bnn.distributed import Alone, Communicator, RankLost, connect, leave, run_elastic
from ppl_bnn.errors import Interrupted, did_you_mean
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import command_parser, guarded, parse_run, set_log
from ppl_bnn.experiment.config import Config
from ppl_bnn.experiment.config_check import check
from ppl_bnn.experiment.out_folder import check_out, run_name
from ppl_bnn.experiment.recipes import recipes
from ppl_bnn.experiment.setup import Experiment, device_of
from ppl_bnn.experiment.stage_check import STAGES, check_stages, stage_names
from ppl_bnn.experiment.summary import summary
from ppl_bnn.files import alone_in
from ppl_bnn.native.memory import keep_freed_memory

log = logging.getLogger("ppl_bnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()

    def run() -> None:
        with _StopRequest() as stop:
            _run(*parse_run(_parser, arguments), stop)

    return guarded(run, debug="--debug" in arguments, explain=lambda text: text + _close_setting(text))


class _StopRequest:
    """Set by SIGINT and SIGTERM and asked by the stages' loops; before those, and when given twice, it ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self.asked = False
        self.ranks_change: Callable[[], bool] = lambda: False

    def __call__(self) -> bool:
        return self.requested or self.ranks_change()

    def __enter__(self) -> "_StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.asked:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("stopping at the next safe point (%s); send it again to stop at once", signal.Signals(number).name)


def _run(parsed: Namespace, config: Config, stop: _StopRequest) -> None:
    names = stage_names(parsed.stages)
    check(config)
    if parsed.elastic:
        if names := _train_elastically(names, parsed, config, stop):
            _run_stages(names, parsed, config, stop, Alone())
        return
    ranks = connect(config.device, timeout=config.train.rank_timeout)
    try:
        _set_up(config, ranks)
        _run_stages(names, parsed, config, stop, ranks)
    finally:
        ranks.shutdown()


def _train_elastically(names: list[str], parsed: Namespace, config: Config, stop: _StopRequest) -> list[str]:
    """Train with the ranks there are, however they come and go; the stages that are left for this process."""
    left: list[str] = []

    def train(ranks: Communicator, change: Callable[[], bool]) -> bool:
        _set_up(config, ranks)
        stop.ranks_change = change
        try:
            _run_stages(["train"], parsed, config, stop, ranks)
        except Interrupted:
            if ranks.any(stop.requested):
                raise
            return False
        except RankLost as error:
            log.error("a rank is gone (%s): the others resume from the last checkpoint", error)
            raise
        left[:] = [name for name in names if name != "train"] if ranks.is_main else []
        return True

    run_elastic(train, timeout=config.train.rank_timeout)
    stop.ranks_change = lambda: False
    return left


def _set_up(config: Config, ranks: Communicator) -> None:
    """Share the host's cores out among the ranks on it, and leave the log to rank 0: the others log errors only."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif ranks.size > 1:
        torch.set_num_threads(max(1, num_cores() // ranks.local_size))
    if ranks.is_main:
        set_log()
    else:
        set_log(logging.ERROR, f"rank {ranks.rank}: ")


def _run_stages(names: list[str], parsed: Namespace, config: Config, stop: _StopRequest, ranks: Communicator) -> None:
    ranks.check_same("settings or stages", [saved_config.shared_part(config).encode(), parsed.stages.encode()])
    if "summary" in names and ranks.is_main:
        print(summary(config))
    # The others need the data, and write.
    if not (names := [name for name in names if name != "summary"]):
        return
    # ArviZ and matplotlib are for the stages alone: --help does without.
    from ppl_bnn.experiment import stages

    if "train" in names:
        check_precision(device_of(config, ranks), config.train.precision)
    folder = Path(parsed.run)
    out = Path(parsed.out) if parsed.out else saved_config.out_of(folder)
    if ranks.is_main:
        check_out(config, out, folder)
    with alone_in(out) if ranks.is_main else nullcontext():
        progress = not parsed.quiet and sys.stderr.isatty()
        run = Experiment(run_name(folder), config, out, stop, progress, ranks)
        # Of all the stages that the command names: elastic ranks train first, and know of the others here alone.
        check_stages(run, stage_names(parsed.stages))
        # Only now: settings that cannot be run must not stand in the way of those that can.
        if ranks.is_main:
            saved_config.save(config, out / "config.yaml")
        stop.asked = True
        if ranks.size > 1 and (alone := [name for name in names if name not in stages.SHARED]):
            log.info("%s: run by rank 0 alone; the other ranks exit first", ", ".join(alone))
        for name in names if ranks.is_main else [name for name in names if name in stages.SHARED]:
            stages.STAGES[name](run)
            if stop() and name != names[-1]:
                raise Interrupted(f"stopped after the {name} stage")


def _parser() -> ArgumentParser:
    parser = command_parser(
        "run", __doc__, trust=True, usage="RUN [--stages STAGE,...] [--out FOLDER] [--<setting> VALUE ...]"
    )
    parser.add_argument(
        "run",
        type=str,
        help="run folder: its config.yaml holds the settings, the options below override it. Or the "
        "out folder of a run, wherever it lies: its own settings, and results into that same folder. Or a recipe: "
        f"{', '.join(name for name in recipes() if not name.startswith('study-'))}",
    )
    parser.add_argument(
        "--stages",
        type=str,
        default="train,diagnose,predict,prune,report",
        help=f"stages to run, separated by commas: {', '.join(STAGES)}; summary, the layer table, writes nothing",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="where results go (default: <run>/out, or the out folder given as RUN; runs/<name>/out of a recipe)",
    )
    parser.add_argument("--config", action="config", help="a YAML file of settings that override the run's own")
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="keep training when ranks are lost or added; needs an elastic horovodrun",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_class_arguments(Config, help="settings")
    return parser


def _close_setting(message: str) -> str:
    unknown = re.search(
        r"unrecognized arguments: --([\w.]+)|Group '([\w.]+)' does not accept option '([\w.]+)'", message
    )
    if not unknown:
        return ""
    name = unknown[1] or f"{unknown[2]}.{unknown[3]}"
    return did_you_mean(name, [action.dest for action in _parser()._actions])


if __name__ == "__main__":
    leave(main())
