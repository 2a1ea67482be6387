"""Reports the time of trainings to an accuracy, and their test metrics against time.

python benchmarks/time_to_accuracy.py runs/cifar10-vgg16-cnn/out runs/cifar10-vgg16/out --figure learning.png

Seconds are the number of steps times the median step.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from ppl_bnn import predict
from ppl_bnn.experiment.setup import opened
from ppl_bnn.inference import checkpoint
from ppl_bnn.native.memory import keep_freed_memory


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, and draw them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", type=Path, help="out folders of runs; ratios are to the first")
    parser.add_argument("--accuracies", default="0.4,0.6", help="training accuracies to reach (default: 0.4,0.6)")
    parser.add_argument("--num_samples", type=int, default=10, help="posterior draws of each checkpoint (default: 10)")
    parser.add_argument("--num_test", type=int, default=2000, help="number of test images (default: 2000)")
    parser.add_argument("--figure", type=Path, help="PNG file for a figure of accuracy and test metrics against time")
    options = parser.parse_args(arguments)
    for folder in options.out:
        for name in ("performance.json", "steps.csv"):
            if not (folder / name).exists():
                parser.error(f"{folder} has no {name}: it is no out folder of a training of at least 50 steps")
    keep_freed_memory()
    steps = {folder: _steps(folder) for folder in options.out}
    base: dict[float, dict[str, float]] = {}
    print(
        "| run | training accuracy | step | seconds | steps, x first | seconds, x first |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for folder, rows in steps.items():
        for accuracy in map(float, options.accuracies.split(",")):
            found = next((row for row in rows if row["accuracy"] >= accuracy), None)
            if found is None:
                print(f"| {folder} | {accuracy:g} | not reached | | | |")
                continue
            first = base.setdefault(accuracy, found)
            ratios = (f"{found[name] / first[name]:.2f}" for name in ("step", "seconds"))
            print(f"| {folder} | {accuracy:g} | {found['step']:.0f} | {found['seconds']:.0f} | {' | '.join(ratios)} |")
    print(
        "\n| run | step | training s | draws | test accuracy | NLL | ECE |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    tested = {folder: _tested(folder, steps[folder], options) for folder in options.out}
    if options.figure:
        _draw(steps, tested, options.figure)


def _steps(folder: Path) -> list[dict[str, float]]:
    # At the speed of the median step, so that other work on the machine and interruptions do not count.
    each = median(json.loads((folder / "performance.json").read_text(encoding="utf-8"))["seconds"])
    with (folder / "steps.csv").open(encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "seconds": row["step"] * each} for row in rows]


def _tested(folder: Path, steps: list[dict[str, float]], options: argparse.Namespace) -> list[dict[str, float]]:
    run = opened(folder)
    x, y = (part[: options.num_test] for part in run.tensors(run.test_data))
    found = []
    for path in checkpoint.saved(folder / "checkpoints")[1:]:
        state = checkpoint.load(path)
        checkpoint.restore(state, model=run.model, guide=run.guide)
        draws = options.num_samples if run.guide.sites else 1
        metrics = predict(run.model.net, run.guide, x, y, num_samples=draws, progress=False).summary()
        # The nearest record; records are 50 steps apart.
        seconds = min(steps, key=lambda row: abs(row["step"] - state.step))["seconds"]
        found.append({"step": state.step, "train_seconds": seconds, **metrics})
        values = " | ".join(f"{metrics[name]:.4f}" for name in ("accuracy", "nll", "ece"))
        print(f"| {folder} | {state.step} | {seconds:.0f} | {draws} | {values} |", flush=True)
    return found


def _draw(steps: dict[Path, list[dict[str, float]]], tested: dict[Path, list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for folder, rows in steps.items():
        name = folder.parent.name if folder.name == "out" else folder.name
        axes[0].plot([row["seconds"] for row in rows], [row["accuracy"] for row in rows], label=name)
        for axis, metric in zip(axes[1:], ("accuracy", "nll", "ece"), strict=True):
            points = tested[folder]
            axis.plot([row["train_seconds"] for row in points], [row[metric] for row in points], "o-", label=name)
    labels = ("training accuracy (one draw a step)", "test accuracy", "test NLL (nats per datum)", "test ECE")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel="seconds of training", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
