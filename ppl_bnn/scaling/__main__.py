"""The scaling study: time networks on lists of rank counts and batches, write one table, and predict more ranks.

    python -m ppl_bnn.scaling runs/study-cifar10-vgg16 runs/study-cifar10-vgg16-cnn --ranks 1 2 4 --batches 128 256
    python -m ppl_bnn.scaling RUN ... --launcher "srun -n {ranks} python" --ranks 1 16 64       # a cluster's launcher
    python -m ppl_bnn.scaling RUN ... --ranks 1 2 --mbit 0 100 400 1000 --latency_ms 0 5        # rehearsed hosts
    python -m ppl_bnn.scaling RUN ... --epochs 64 --accuracy 0.6                                # whole trainings
    python -m ppl_bnn.scaling RUN ... -- --data.file cifar10.npz --channels_last true           # settings for every run

A point is a run folder, a device, a batch size (of one rank) and a number of ranks. Each point is a training of --steps
steps, or a whole training with --epochs. horovodrun starts the ranks if Horovod is installed, else torchrun. Results
are OUT/scaling.csv and OUT/scaling.nc, one row a point, and OUT/figures. Finished points are skipped.

Exit codes: 0 done; 1 a point failed; 2 bad command or settings; 75 stopped (run the same command again to resume).
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.command import DONE, FAILED, command_parser, guarded
from ppl_bnn.files import written_atomically
from ppl_bnn.scaling.hosts import NotPermitted
from ppl_bnn.scaling.point import PointFailed, Setting, check_launcher, measure

if TYPE_CHECKING:
    import xarray as xr

log = logging.getLogger("ppl_bnn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        return guarded(
            lambda: FAILED if _study(_parser().parse_args(arguments[:at]), arguments[at + 1 :]) else DONE,
            debug="--debug" in arguments[:at],
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def _study(options: Namespace, settings: list[str]) -> bool:
    # Not for --help: xarray and matplotlib take seconds to import.
    import xarray as xr

    from ppl_bnn.results import netcdf
    from ppl_bnn.scaling.figures import draw_scaling
    from ppl_bnn.scaling.table import held_out, predictions, table

    out = Path(options.out)
    for run in options.runs:
        saved_config.read(Path(run) / "config.yaml")
    if len({Path(run).name for run in options.runs}) < len(options.runs):
        raise UserError(f"run folders need different names, because the table lists them by name; got {options.runs}")
    least = {"ranks": 1, "batches": 1, "steps": 2, "repeats": 1, "epochs": 1, "threads": 1, "mbit": 0, "latency_ms": 0}
    for name, lowest in least.items():
        values = getattr(options, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < lowest:
            raise UserError(f"--{name} must be at least {lowest}, got {values}")
    if any(options.latency_ms) and not any(options.mbit):
        raise UserError("--latency_ms is of rehearsed hosts: give them a bandwidth with --mbit")
    check_launcher(options.launcher)
    points = list(_points(options))
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // max(options.ranks))
    failed, done = False, []
    for point in (bar := tqdm(points, unit="point", disable=None)):
        bar.set_postfix_str(point.name, refresh=True)
        try:
            folder = out / "points" / point.name
            measure(
                point, folder, steps=options.steps, epochs=options.epochs, threads=threads, launcher=options.launcher,
                settings=settings,
            )  # fmt: skip
            done.append((point, folder))
        except NotPermitted as reason:
            log.warning("%s: skipped: %s", point.name, reason)
        except PointFailed as error:
            failed = True
            log.error("%s: failed: %s", point.name, error)
    if max((point.ranks for point, _ in done), default=1) == 1:
        log.error("error: no point on several ranks was measured, so there is no table")
        return True
    rows = table(
        [(asdict(point), folder) for point, folder in done], options.accuracy, whole=options.epochs is not None
    )
    rows["held_out_step_seconds"] = held_out(rows)
    predicted = predictions(rows, mbit=options.predict_mbit)
    with written_atomically(out / "scaling.csv") as temporary:
        _flat(rows).to_csv(temporary, index=False)
    netcdf.save(
        xr.DataTree.from_dict({"/": xr.Dataset(), "scaling": rows, "prediction": predicted}), out / "scaling.nc"
    )
    figures = draw_scaling(rows, predicted, out / "figures")
    _report(rows, predicted)
    log.info("%d points in %s and scaling.nc; %d figures in %s", rows.sizes["point"], out / "scaling.csv", figures,
             out / "figures")  # fmt: skip
    return failed


def _points(options: Namespace) -> Iterator[Setting]:
    # Repeats are the outer loop, so that a machine that slows down slows all points alike.
    links = dict.fromkeys((mbit, delay if mbit else 0.0) for mbit, delay in product(options.mbit, options.latency_ms))
    for repeat, device, batch, ranks in product(
        range(options.repeats), options.devices, options.batches, options.ranks
    ):
        for (mbit, delay), run in product(links if ranks > 1 else [(0.0, 0.0)], options.runs):
            yield Setting(run, device, batch, ranks, mbit, delay, repeat)


def _flat(rows: "xr.Dataset") -> Any:
    """Return one row a point, with columns for each kind of call and without the single steps."""
    frame = rows.drop_dims(["kind", "step", "quantile"]).to_dataframe().reset_index(drop=True)
    for kind in rows["kind"].values:
        for name in ("count", "mean_bytes", "seconds"):
            # `step_seconds` is already the column of a step's own seconds.
            column = f"{'step message' if kind == 'step' else kind}_{name}".replace(" ", "_")
            frame[column] = rows[f"call_{name}"].sel(kind=kind).values
    frame["held_out_step_seconds"] = rows["held_out_step_seconds"].sel(quantile=0.5).values
    return frame


def _report(rows: "xr.Dataset", predicted: "xr.Dataset") -> None:
    from ppl_bnn.scaling.table import PUBLISHED

    for point in rows["point"].values:
        row = rows.sel(point=point)
        log.info(
            "%s: %.1f +- %.1f samples/s, efficiency %.3f, communication %.1f%% of the time",
            point, row["samples_per_second"], row["samples_per_second_std"], row["efficiency"],
            100 * row["communication_share"],
        )  # fmt: skip
        if (band := row["held_out_step_seconds"]).notnull().all():
            log.info(
                "    %.4f s a step; predicted by the other links: %.4f (%.4f to %.4f)",
                row["step_seconds"], band[1], band[0], band[2],
            )  # fmt: skip
    for line in (*predicted.attrs["ratios"].splitlines(), PUBLISHED):
        log.info(line)


def _parser() -> ArgumentParser:
    parser = command_parser("scaling", __doc__)
    add = parser.add_argument
    add("runs", type=str, nargs="+", help="run folders, such as a Bayesian network and its deterministic twin")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks; efficiency compares with 1")
    add("--batches", type=int, nargs="+", default=[128], help="batch sizes, of each rank")
    add("--devices", type=str, nargs="+", default=["cpu"], help="devices: cpu, cuda")
    add(
        "--mbit",
        type=float,
        nargs="+",
        default=[0.0],
        help="rehearse one host for each rank, with links of this many Mbit/s (needs root); 0: no rehearsed hosts",
    )
    add(
        "--latency_ms",
        type=float,
        nargs="+",
        default=[0.0],
        help="one-way latencies between rehearsed hosts, in ms; each is combined with each of --mbit",
    )
    add("--steps", type=int, default=10, help="number of timed steps of each point, after one untimed step")
    add("--repeats", type=int, default=1, help="number of times to measure every point")
    add("--epochs", type=int | None, default=None, help="train whole epochs, to measure the time to --accuracy")
    add("--accuracy", type=float, default=0.6, help="training accuracy to time, with --epochs")
    add("--launcher", type=str, default="auto", help="auto, horovod, torch, or a command with {ranks} in it")
    add("--threads", type=int | None, default=None, help="threads of a rank (default: cores / the largest of --ranks)")
    add(
        "--predict_mbit",
        type=float | None,
        default=None,
        help="predict for links of this many Mbit/s (default: the measured links)",
    )
    add("--out", type=str, default="scaling", help="output folder")
    return parser  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
