"""Measures on one GPU, within minutes, what no CPU can show."""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from gpu_record import Record
from gpu_worker import SMALLEST_START, Worker


class Part(NamedTuple):
    """A part: its cells are ``cells(plan)`` of `module`. It gets `share` of the time left, if that is `minimum` s.

    `about` says what to see in its table.
    """

    module: str
    share: float
    minimum: float
    title: str
    about: str


PARTS = {
    "where": Part("gpu_where", 0.10, 5, "Where", "The machine and its libraries."),
    "tests": Part("gpu_tests", 0.18, 15, "Tests on the device", "Tests whose device is the GPU, if there is one."),
    "agreement": Part(
        "gpu_agreement", 0.14, 10, "Agreement with float64 on the CPU",
        "Relative differences: of NLL and KL, of all gradients (or logits) together, and of the tensor that differs "
        "most. `float32 on the CPU` shows what rounding alone does.",
    ),
    "steps": Part(
        "gpu_steps", 0.42, 15, "Training steps in turns",
        "A turn is 3 steps, and the clock waits for the device after each turn. The ratio is the median of the "
        "rounds' ratios to the deterministic step in the same mode. TF32 is as torch has it by default.",
    ),
    "digits": Part(
        "gpu_digits", 0.20, 15, "VGG-16 on the 0.1M digits",
        "Images per second in `fit`. The study reached its numbers on 8 V100 GPUs.",
    ),
    "draws": Part(
        "gpu_draws", 0.18, 10, "Draws of the predictive",
        "The ratio is the time of a draw to that of the deterministic forward pass of the same images.",
    ),
    "memory": Part(
        "gpu_memory", 0.18, 10, "Memory and kernels of a step",
        "The peak is above what was allocated before the network was built. Bytes a weight: all that a random weight "
        "takes beside the deterministic network's activations.",
    ),
    "training": Part(
        "gpu_training", 1.0, 30, "VGG-16 on CIFAR-10 by seconds of training",
        "Test metrics after each slice. Seconds do not count tests and checkpoints.",
    ),
}  # fmt: skip
# Seconds past its part's deadline after which a cell is cut off.
GRACE = 15.0
# Seconds at the end that no part gets.
RESERVE = 2.0
# Of a part's minimum, what is enough at toy size.
TOY = 0.2

_HELP = """
parts, in this order, each with a share of the time that is left:
  where      the card, torch, CUDA, cuDNN, driver and memory
  tests      tests/test_device.py on the device
  agreement  one step and the predictions of the same draws, beside float64 on the CPU
  steps      training steps in turns: VGG-16 and ResNet-18, batch 512, 128, 1024, float32 and bfloat16, eager, in a CUDA
             graph, compiled; ours and ivon-opt beside the deterministic network
  digits     images per second of VGG-16 on the 0.1M transformed digits, in fit; needs MNIST's four files in
             DATA_DIR/mnist (nothing is downloaded)
  draws      draws per second of 1,000 images, and the predictor of one image
  memory     peak memory, kernels and host waits of a step
  training   VGG-16 on CIFAR-10, deterministic and Bayesian, in slices of equal time; needs --data

OUT/gpu.json is written anew after each row and OUT/gpu.md after each measurement, so a run that is cut off keeps what
it has. What fails, hangs or kills its process is recorded with one line, and the rest runs. On a CPU, what needs CUDA
is recorded as such.

examples:
  python benchmarks/gpu.py --minutes 8 --data cifar10_jpeg.npz --data_dir data
  python benchmarks/gpu.py --minutes 3 --parts where,steps
  python benchmarks/gpu.py --toy --device cpu          # everything at toy size, in a minute
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the parts named on the command line within the time given, and record what they find."""
    started = time.monotonic()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="the whole run takes no longer (default: 8)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="of several GPUs, CUDA_VISIBLE_DEVICES chooses one (default: cuda)",
    )
    add("--out", type=Path, default=Path("gpu-check"), help="folder of the results (default: gpu-check)")
    add("--data", type=Path, help="an .npz of CIFAR-10 as JPEGs (arrays jpeg, offsets, labels, is_test), to train on")
    add("--data_dir", type=Path, default=Path("data"), help="folder of the named data sets (default: data)")
    add("--parts", help="which parts to run, separated by commas (default: all)")
    add("--toy", action="store_true", help="tiny networks and few repetitions, to try the check itself")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.parts.split(",")] if options.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}")
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = Record(options.out, shown)
    settings = {name: getattr(options, name) for name in ("device", "toy", "out", "data_dir", "data")}
    try:
        run(names, settings, record, started + 60 * options.minutes)
    except NoDevice as error:
        parser.error(f"--device {options.device}: {error}; --toy --device cpu tries the check without one")
    print((options.out / "gpu.md").read_text(encoding="utf-8"))


class NoDevice(Exception):
    """The device is not there."""


def run(names: list[str], settings: dict, record: Record, until: float) -> None:
    """Run parts by name until then (of ``time.monotonic()``). Raises NoDevice before the first one."""
    worker = Worker(settings)
    try:
        for at, name in enumerate(names):
            part, left = PARTS[name], until - RESERVE - time.monotonic()
            record.start_part(name, part.title, part.about)
            # The last part gets all that is left.
            seconds = max(0.0, left * (1.0 if at == len(names) - 1 else part.share))
            if seconds < part.minimum * (TOY if settings["toy"] else 1):
                record.end_part(name, "no time", f"it has {seconds:.0f} s and needs {part.minimum:.0f} s")
                continue
            _say(f"{name}: {seconds:.0f} s")
            note = _run_part(name, time.monotonic() + seconds, until, record, worker)
            record.end_part(name, "failed" if note else "finished", note)
    finally:
        worker.end()
        # Of a worker that was ended while it trained.
        for checkpoints in record.out.glob(".training-*"):
            shutil.rmtree(checkpoints, ignore_errors=True)
    record.finish()


def _run_part(name: str, deadline: float, until: float, record: Record, worker: Worker) -> str:
    """Run a part, in another process where one is lost; return why it failed, or an empty text."""
    while True:
        try:
            return _run_cells(name, deadline, min(deadline + GRACE, until - RESERVE / 2), record, worker)
        except _Lost as lost:
            worker.end(patience=0.0)
            if not lost.cell:
                return lost.why
            before = record.cells(name)[lost.cell]["note"]
            record.end_cell(name, lost.cell, "failed", "; ".join(filter(None, (before, lost.why))))
            _say(f"  {lost.cell}: {lost.why}")
        if deadline - time.monotonic() < SMALLEST_START:
            return ""


class _Lost(Exception):
    """The worker was lost, in a cell or before the first one (``cell`` is empty then)."""

    def __init__(self, cell: str, why: str, doing: str) -> None:
        super().__init__(why)
        self.cell, self.why = cell, f"{why}, {doing}" if doing else why


def _run_cells(name: str, deadline: float, hard: float, record: Record, worker: Worker) -> str:
    """Record a part's cells as they come, until `hard`; return why the part failed, or an empty text."""
    cell = doing = ""
    try:
        worker.run(PARTS[name].module, deadline, record.started(name))
        while message := worker.listen(hard):
            kind, *rest = message
            if kind == "done":
                return ""
            if kind == "refused":
                raise NoDevice(rest[0])
            if kind == "failed":
                return rest[0]
            if kind == "cells":
                record.expect(name, rest[0])
            elif kind == "doing":
                doing = rest[0]
            elif kind == "start":
                cell, doing = rest[0], ""
                record.start_cell(name, cell)
            elif kind == "row":
                record.add_row(name, *rest)
            else:
                record.end_cell(name, *rest)
                _say(f"  {rest[0]}: {rest[1]}{': ' if rest[2] else ''}{rest[2]}")
        raise _Lost(cell, "cut off: the time was up", doing)
    except (EOFError, ConnectionError):
        raise _Lost(cell, f"its process ended with code {worker.end(patience=5.0)}", doing) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
