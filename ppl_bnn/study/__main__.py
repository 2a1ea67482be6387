"""The study by Sharma and Jennings (2020), redone on this machine and set beside its numbers on one page.

    ppl_bnn study --scale small --cifar10 cifar10.npz       # about three hours on 2 cores
    ppl_bnn study --scale tiny --parts tables,figure-8      # minutes: to see how it works
    ppl_bnn study --scale full --launcher "srun -n {ranks} python" --out /scratch/study
    ppl_bnn study --conv results/conv                       # with a BNN-Conv that you trained

Each part runs the commands of this library that a reader would type, and shows them beside their numbers. The page is
OUT/study.html and OUT/study.md, written after each part. What is done is not done again: the same command resumes.

Exit codes: 0 done; 1 a command of some part failed (the page says which and why); 2 bad command; 75 stopped.
"""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import DONE, FAILED, command_parser, guarded
from ppl_bnn.experiment.recipes import recipes
from ppl_bnn.files import alone_in
from ppl_bnn.scaling.launch import checked_launcher
from ppl_bnn.study.page import Section, keep_section, write_page
from ppl_bnn.study.remarks import remarks
from ppl_bnn.study.scales import SCALES, Scale, scale_named
from ppl_bnn.study.work import Options, Work
from ppl_bnn.version import __version__

log = logging.getLogger("ppl_bnn")

PARTS = (
    "tables", "operations", "figure-2", "figure-2c", "figure-3c", "cycle-time", "figure-4", "figure-5", "figure-6",
    "figure-7", "figure-8", "figure-9", "beta",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return guarded(
            lambda: _study(_parser().parse_args(arguments), shlex.join(["python", "-m", "ppl_bnn.study", *arguments])),
            debug="--debug" in arguments,
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def _study(parsed: Namespace, command: str) -> int:
    names, scale = _parts(parsed.parts), scale_named(parsed.scale)
    options, out = _options(parsed, scale), Path(parsed.out or f"study-{parsed.scale}")
    checked_launcher(options.launcher)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        work, functions = Work(out, scale, options), _functions()
        failed = False
        for name in (bar := tqdm(names, unit="part", disable=None)):
            bar.set_postfix_str(name, refresh=True)
            try:
                section = functions[name](work)
            except UserError as error:
                # A part that cannot be drawn does not stop the others.
                log.error("study: %s failed: %s", name, error)
                section, failed = Section(name, notes=[f"This part failed: {error}"]), True
            # Sections of earlier commands stay on the page.
            sections = keep_section(name, section, out)
            ordered = [sections[part] for part in PARTS if part in sections]
            write_page([*ordered, remarks(work)], _introduction(work, command), out)
    log.info("study: %s and study.md", out / "study.html")
    return FAILED if failed or work.failures else DONE


def _functions() -> dict[str, Callable[[Work], Section]]:
    # Not for --help: ArviZ and matplotlib take seconds to import.
    from ppl_bnn.study import digits, pruning, tables, throughput, trainings

    found = (
        tables.tables, tables.operations, throughput.throughput, throughput.fixed_epochs, trainings.time_to_accuracy,
        digits.cycle_time, trainings.draw_counts, trainings.classes, digits.batches, digits.gpus, pruning.pruning,
        pruning.densities, pruning.kl_weights,
    )  # fmt: skip
    return dict(zip(PARTS, found, strict=True))


def _introduction(work: Work, command: str) -> list[str]:
    return [
        'This page sets "Bayesian Neural Networks at Scale: A Performance Analysis and Pruning Study" (Sharma and '
        "Jennings, 2020) beside what this library measured. Every number of the study stands with its place in the "
        'paper ("figure only" where it stands in a picture), every number of ours with its command.',
        f"Scale: {work.scale.name}. Machine: {os.cpu_count()} CPU cores. torch {version('torch')}, ppl_bnn "
        f"{__version__}. Last command: {command}",
    ]


def _parts(text: str | None) -> list[str]:
    names = PARTS if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts knows {', '.join(PARTS)}; got {name!r}")
    return [name for name in PARTS if name in names]


def _options(parsed: Namespace, scale: Scale) -> Options:
    runs = recipes()["study-cifar10-vgg16"].parent.parent if parsed.runs is None else Path(parsed.runs)
    if not (runs / "study-cifar10-vgg16" / "config.yaml").exists():
        raise UserError(f"--runs {runs} has no study-... run folders: leave it out for those of the library")
    for name, count in (
        ("cifar_image", scale.test_images), ("cifar_images", scale.test_images), ("digits", scale.test_digits)
    ):  # fmt: skip
        given = getattr(parsed, name)
        for image in given if isinstance(given, list) else [] if given is None else [given]:
            if not 0 <= image < count:
                raise UserError(
                    f"--{name} takes numbers of test images, 0 to {count - 1} at the scale {scale.name}; got {image}"
                )
    if parsed.ranks and min(parsed.ranks) < 1:
        raise UserError(f"--ranks must be at least 1, got {parsed.ranks}")
    conv = None if parsed.conv is None else Path(parsed.conv)
    if conv is not None:
        if not any((conv / "checkpoints").glob("step-*.safetensors")):
            raise UserError(f"--conv takes an out folder with checkpoints; there are none in {conv}")
        if (name := saved_config.read(conv / "config.yaml").get("model", {}).get("name")) != "bnn-conv":
            raise UserError(f"--conv takes the out folder of a bnn-conv; {conv} has a {name}")
    if parsed.cifar10 is not None and not Path(parsed.cifar10).is_file():
        raise UserError(f"--cifar10 takes an .npz of CIFAR-10's images as JPEGs; there is no {parsed.cifar10}")
    return Options(
        runs=runs, data_dir=parsed.data_dir, cifar10=parsed.cifar10, launcher=parsed.launcher, ranks=parsed.ranks,
        cifar_image=parsed.cifar_image, cifar_images=parsed.cifar_images, digits=parsed.digits, conv=conv,
    )  # fmt: skip


def _parser() -> ArgumentParser:
    parser = command_parser("study", __doc__)
    add = parser.add_argument
    add("--scale", type=str, default="small", help=f"how large: {', '.join(SCALES)}; full is what the study did")
    add(
        "--parts", type=str | None, default=None, help=f"some of {', '.join(PARTS)}, separated by commas (default: all)"
    )
    add("--out", type=str | None, default=None, help="folder of the page and of all runs (default: study-SCALE)")
    add("--runs", type=str | None, default=None, help="folder of the run folders study-... (default: the recipes)")
    add("--data_dir", type=str, default="data", help="folder of the data sets")
    add("--cifar10", type=str | None, default=None, help="an .npz of CIFAR-10 as JPEGs, to read instead of downloading")
    add("--ranks", type=int, nargs="+", default=None, help="numbers of ranks (default: the scale's)")
    add("--launcher", type=str, default="auto", help="auto, horovod, torch, or a command with {ranks} in it")
    add("--cifar_image", type=int | None, default=None, help="number of the CIFAR-10 test image in figure 4")
    add("--cifar_images", type=int, nargs="+", default=None, help="numbers of the CIFAR-10 test images in figure 5")
    add("--digits", type=int, nargs="+", default=None, help="numbers of the MNIST test digits in figure 9")
    add("--conv", type=str | None, default=None, help="out folder of a BNN-Conv to use, as far as it is trained")
    return parser  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
