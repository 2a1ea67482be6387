"""The scaling study: time networks on lists of rank counts and batches, write one table, and predict more ranks.

    ppl_bnn scaling runs/study-cifar10-vgg16 runs/study-cifar10-vgg16-cnn --ranks 1 2 4 --batches 128 256
    ppl_bnn scaling RUN ... --launcher "srun -n {ranks} python" --ranks 1 16 64       # a cluster's launcher
    ppl_bnn scaling RUN ... --ranks 1 2 --mbit 0 100 400 1000 --latency_ms 0 5        # rehearsed hosts
    ppl_bnn scaling RUN ... --estimators flipout groups plain                         # estimators compared
    ppl_bnn scaling RUN ... --cycle_ms 1 5 10 --fusion_mb 64                          # Horovod's settings
    ppl_bnn scaling RUN ... --epochs 64 --accuracy 0.4 0.6                            # whole trainings
    ppl_bnn scaling RUN ... -- --data.file cifar10.npz --channels_last true           # settings for every run

A point is a run folder, a device, a batch size (of one rank) and a number of ranks. Each point is a training of --steps
steps, or a whole training with --epochs. horovodrun starts the ranks if Horovod is installed, else torchrun. Results
are OUT/scaling.csv and OUT/scaling.nc, one row a point, OUT/calls.md, OUT/figures, and OUT/failed.json with the points
that failed and why. Finished points are skipped, unless their settings or the environment of the launcher changed.

Exit codes: 0 done; 1 a point failed; 2 bad command or settings; 75 stopped (run the same command again to resume).
"""

import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from ppl_bnn.experiment.command import DONE, FAILED, command_parser, guarded
from ppl_bnn.files import write_text, written_atomically
from ppl_bnn.scaling.plan import Plan, plan_of

if TYPE_CHECKING:
    import xarray as xr

PUBLISHED = (
    "published (Sharma, Jennings 2020): BNN over CNN 2.4 for fixed epochs; VGG-16 on 128 nodes 3.37 over 1.3 minutes, "
    "that is 2.59"
)

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
    """Measure, and write all results; return whether a point failed."""
    plan = plan_of(options, settings)
    done, skipped, failed = plan.measure()
    # The points that could not be measured, for a page that tells of the study.
    reasons = {**{name: f"skipped: {reason}" for name, reason in skipped.items()}, **failed}
    write_text(plan.out / "failed.json", json.dumps(reasons, indent=2) + "\n")
    if done:
        _write(plan, done, options)
    else:
        log.error("error: no point was measured, so there is no table%s", _without_results(plan.out))
    return bool(failed) or not done


def _without_results(out: Path) -> str:
    """Delete the table and figures of before, which are not of these points; return what to say of it."""
    names = ("scaling.csv", "scaling.nc", "calls.md", "figures/*.png")
    if not (found := [path for name in names for path in out.glob(name)]):
        return ""
    for path in found:
        path.unlink()
    return f"; the table and figures of before were deleted from {out}"


def _write(plan: Plan, done: Sequence, options: Namespace) -> None:
    # Not for --help: xarray and matplotlib take seconds to import.
    import xarray as xr

    from ppl_bnn.results import netcdf
    from ppl_bnn.scaling.calls import calls_page
    from ppl_bnn.scaling.figures import draw_scaling
    from ppl_bnn.scaling.prediction import held_out, predictions
    from ppl_bnn.scaling.table import flat, table

    accuracies = list(dict.fromkeys(options.accuracy))
    rows = table([(asdict(point), folder) for point, folder in done], accuracies, whole=options.epochs is not None)
    rows["held_out_step_seconds"] = held_out(rows)
    predicted = predictions(rows, mbit=options.predict_mbit)
    with written_atomically(plan.out / "scaling.csv") as temporary:
        flat(rows).to_csv(temporary, index=False)
    groups = {"/": xr.Dataset(), "scaling": rows} | ({} if predicted is None else {"prediction": predicted})
    netcdf.save(xr.DataTree.from_dict(groups), plan.out / "scaling.nc")
    calls = calls_page(rows)
    write_text(plan.out / "calls.md", calls)
    figures = draw_scaling(rows, predicted, plan.out / "figures")
    _report(rows, predicted)
    log.info("%s", calls.rstrip())
    log.info(
        "%d points in %s and scaling.nc; calls.md; %d figures in %s",
        rows.sizes["point"], plan.out / "scaling.csv", figures, plan.out / "figures",
    )  # fmt: skip


def _report(rows: "xr.Dataset", predicted: "xr.Dataset | None") -> None:
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
    if predicted is None:
        log.warning("no point on several ranks was measured, so nothing is predicted")
        return
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
        "--estimators",
        type=str,
        nargs="+",
        default=None,
        help="train.estimator of the Bayesian runs, each in turn; deterministic runs need none (default: the run's)",
    )
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
    add(
        "--cycle_ms",
        type=float,
        nargs="+",
        default=None,
        help="Horovod's cycle times in ms (HOROVOD_CYCLE_TIME), each in turn (default: as the environment has it)",
    )
    add(
        "--fusion_mb",
        type=float,
        nargs="+",
        default=None,
        help="Horovod's fusion buffers in MiB (HOROVOD_FUSION_THRESHOLD); each is combined with each of --cycle_ms; 0: "
        "no fusion (default: as the environment has it)",
    )
    add("--steps", type=int, default=10, help="number of timed steps of each point, after one untimed step")
    add("--repeats", type=int, default=1, help="number of times to measure every point")
    add("--epochs", type=int | None, default=None, help="train whole epochs, to measure the time to --accuracy")
    add(
        "--accuracy",
        type=float,
        nargs="+",
        default=[0.6],
        help="training accuracies to time, with --epochs: the mean over the last 20 steps, or an epoch's if fewer",
    )
    add("--launcher", type=str, default="auto", help="auto, horovod, torch, or a command with {ranks} in it")
    add("--threads", type=int | None, default=None, help="threads of a rank (default: cores / the largest of --ranks)")
    add(
        "--predict_mbit",
        type=float | None,
        default=None,
        help="predict for links of this many Mbit/s (default: the measured links)",
    )
    add("--out", type=str, default="scaling", help="output folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
