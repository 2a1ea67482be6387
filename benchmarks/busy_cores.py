"""Measures a training step while other work keeps some cores busy, for each way that OpenMP's threads may wait."""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from tqdm import tqdm

from report import Table, aligned, as_markdown, cpu_name
from train_step import SHAPES, build_contender, set_up

# How often a thread of GNU OpenMP looks for the others before it sleeps: the default, and ppl_bnn's setting.
WAITS = {"OpenMP's own": "300000", "ppl_bnn's": "3000", "none": "0"}

_HELP = """
Each cell is the median over rounds. A round is the mean step over some seconds, in a process of its own. The cells of a
round run one after the other. The step is that of ppl_bnn.fit with sign-flipped groups. A busy core runs another
training of the same network on one thread.

example:
  python benchmarks/busy_cores.py --network bnn-fc --rounds 5
"""


def main(arguments: list[str] | None = None) -> None:
    """Time the step with 0 to `--busy` busy cores, for each way to wait."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("--network", choices=list(SHAPES), default="bnn-fc", help="which network (default: bnn-fc)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--busy", type=int, default=1, help="largest number of busy cores (default: 1)")
    add("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    add("--seconds", type=float, default=5, help="seconds of steps in a process (default: 5)")
    add("--markdown", action="store_true", help="print the table as markdown too")
    options = parser.parse_args(arguments)
    if min(options.threads, options.rounds) < 1 or options.busy < 0:
        parser.error("--threads and --rounds must be at least 1, --busy at least 0")
    if sys.platform != "linux":
        parser.error("the setting is GNU OpenMP's, which torch has on Linux")
    print(f"{options.network}: torch {torch.__version__}, {options.threads} threads, {cpu_name()}", flush=True)
    cells = [(busy, wait) for busy in range(options.busy + 1) for wait in WAITS]
    found: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    for busy, wait in tqdm(cells * options.rounds, unit="process", disable=None):
        with _busy(busy, options.network):
            found[busy, wait].append(_in_a_process(WAITS[wait], options))
    table: Table = [["busy cores", *(f"{wait} ({count}), ms" for wait, count in WAITS.items())]]
    for busy in range(options.busy + 1):
        table.append([str(busy), *(f"{1e3 * statistics.median(found[busy, wait]):.2f}" for wait in WAITS)])
    print(*aligned(table), sep="\n")
    if options.markdown:
        print("", *as_markdown(table), sep="\n")


def step_seconds(network: str, threads: int, seconds: float) -> float:
    """Return the mean seconds of a step in this process."""
    settings = {"batch": 100 if network == "bnn-fc" else 128, "channels_last": network != "bnn-fc"}
    settings |= {"network": network, "device": torch.device("cpu"), "precision": "float32"}
    options = argparse.Namespace(**settings, threads=threads, default_malloc=False)
    set_up(options)
    step = build_contender("groups", options).step
    step()
    steps, started = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() < started + seconds:
        step()
        steps += 1
    return (time.perf_counter() - started) / steps


def _in_a_process(spin_count: str, options: argparse.Namespace) -> float:
    # OpenMP reads this when it is loaded, which each spawned process does again.
    os.environ["GOMP_SPINCOUNT"] = spin_count
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(step_seconds, options.network, options.threads, options.seconds).result()


def _another_training(network: str) -> None:
    # In another session, like the work of another terminal or user: Linux divides its cores between sessions.
    os.setsid()
    step_seconds(network, 1, math.inf)


@contextmanager
def _busy(cores: int, network: str) -> Iterator[None]:
    trainings = [
        get_context("spawn").Process(target=_another_training, args=(network,), daemon=True) for _ in range(cores)
    ]
    for training in trainings:
        training.start()
    # The other trainings run before the step is timed.
    time.sleep(5 * bool(cores))
    try:
        yield
    finally:
        for training in trainings:
            training.kill()
            training.join()


if __name__ == "__main__":
    main()
