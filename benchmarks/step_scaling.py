"""Times a training step against the number of parameters, the batch and the number of ranks, in one figure."""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from contenders import CONTENDERS
from ppl_bnn.inference.memory import free_memory, is_out_of_memory
from report import Table, aligned, cpu_name
from train_step import set_up
from turns import in_turns, ratios

_BASE = "mlp"
# Bytes of a parameter in the deterministic step and in ours; of the others as many as `groups` has.
_BYTES = {_BASE: 16, "plain": 44, "ivon": 32, "local": 44}
_MOST_BYTES = 68
_MIN_ROUNDS = 5
_NAMES = {_BASE: "deterministic"}
_LABELS = {"parameters": "parameters of the deterministic network", "batch": "examples a step", "ranks": "ranks"}

_HELP = """
The network of the first two panels is a chain of four Linear layers with ReLU; a width for each number of parameters.
At each size all contenders are built, and take their steps in turns (benchmarks/turns.py), so that other work on the
machine slows all of them alike. Ratios are of medians, to the deterministic step `mlp` in the same rounds. The ranks
run benchmarks/scaling_efficiency.py under torchrun, once for each contender: a step of all ranks, each with the same
batch, beside a step of one rank alone, to which its ratio is. More ranks than cores share the cores, so that a step
takes longer.

`growth` is the power of the size by which the time grows from one size to the next: 0 is constant, 1 linear. The gray
line in each panel is linear. A size whose contenders do not fit into memory together is skipped, and a line says so.

OUT/step_scaling.json holds every point with the seconds of each round, and is written anew after each point;
OUT/step_scaling.png is the figure.

examples:
  python benchmarks/step_scaling.py --out scaling
  python benchmarks/step_scaling.py --parameters 1e4,1e6 --batches "" --ranks "" --seconds 2
  python benchmarks/step_scaling.py --contenders plain,ivon,flipout --batches 1,64,4096
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for; print a table, write the points and draw the figure."""
    options = _options(arguments)
    set_up(options)
    options.out.mkdir(parents=True, exist_ok=True)
    how = {"torch": torch.__version__, "cpu": cpu_name(), "threads": options.threads, "device": str(options.device)}
    points: list[dict[str, Any]] = []
    for point in _points(options):
        points.append(point)
        content = json.dumps({**how, "points": points}, indent=1) + "\n"
        (options.out / "step_scaling.json").write_text(content, encoding="utf-8")
    if not points:
        sys.exit("nothing was measured")
    print(*aligned(report(points)), sep="\n")
    draw(points, f"{how['cpu']}, {how['device']}, {options.threads} thread(s)", options.out / "step_scaling.png")


def report(points: list[dict[str, Any]]) -> Table:
    """Return the table of some points."""
    table = [
        ["axis", "size", "step", "rounds", "median s", f"x {_BASE}", "x alone", "quartiles of the rounds'", "growth"]
    ]
    for point in points:
        same = [other for other in points if other["axis"] == point["axis"]]
        base = next(other for other in same if other["size"] == point["size"] and other["contender"] == _BASE)
        before = [other for other in same if other["contender"] == point["contender"] and other["size"] < point["size"]]
        median = statistics.median(point["seconds"])
        growth = ""
        if before:
            steps = median / statistics.median(before[-1]["seconds"])
            growth = f"{math.log(steps) / math.log(point['size'] / before[-1]['size']):.2f}"
        if "alone" in point:
            ratio, quartiles = ratios(point["seconds"], point["alone"])
            compared = "", ratio, quartiles
        elif point["axis"] == "ranks":
            # One rank; the ranks' contenders did not take turns.
            compared = "", "", ""
        else:
            ratio, quartiles = ratios(point["seconds"], base["seconds"])
            compared = ratio, "", quartiles
        cells = point["axis"], f"{point['size']:,}", point["contender"], str(len(point["seconds"])), f"{median:.5f}"
        table.append([*cells, *compared, growth])
    return table


def draw(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the points' medians and quartiles, a panel for each axis."""
    axes_here = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(4.5 * len(axes_here), 4), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes_here), squeeze=False)[0], axes_here, strict=True):
        its = [point for point in points if point["axis"] == axis]
        for number, name in enumerate(dict.fromkeys(point["contender"] for point in its)):
            own = [point for point in its if point["contender"] == name]
            sizes = [point["size"] for point in own]
            low, middle, high = zip(*(_quartiles(point["seconds"]) for point in own), strict=True)
            panel.plot(sizes, middle, marker="o^sDvP*"[number % 7], color=f"C{number}", label=_NAMES.get(name, name))
            panel.fill_between(sizes, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            if name == _BASE:
                linear = [middle[-1] * size / sizes[-1] for size in sizes]
                panel.plot(sizes, linear, color="gray", linestyle=":", label="linear")
        bottom = min(min(point["seconds"]) for point in its)
        panel.set(xscale="log", yscale="log", xlabel=_LABELS[axis], ylabel="seconds a step", ylim=(0.5 * bottom, None))
        if axis != "parameters":
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        panel.set_title(_what(its), fontsize="small")
        panel.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=130)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contenders", default="plain,groups", help="beside mlp; see train_step.py --help (default: plain,groups)")
    add("--parameters", default="1e4,1e5,1e6,1e7,1e8", help="of the first panel; '' skips it (default: %(default)s)")
    add("--batches", default="1,4,16,64,256,1024,4096", help="of the second; '' skips it (default: %(default)s)")
    add("--ranks", default="1,2,4", help="of the third, from 1; '' skips it (default: %(default)s)")
    add("--batch", type=_number, default=32, help="examples a step where parameters or ranks vary (default: 32)")
    add("--size", type=_number, default=10**6, help="parameters where the batch varies (default: 1e6)")
    add("--ranks_network", choices=("vgg16", "resnet18"), default="resnet18", help="(default: resnet18)")
    add("--ranks_rounds", type=int, default=9, help="rounds of the ranks (default: 9)")
    add("--seconds", type=float, default=10.0, help=f"of a size's rounds, {_MIN_ROUNDS} or more (default: 10)")
    add("--threads", type=int, default=1, help="CPU threads of each rank (default: 1)")
    add("--device", default="cpu", help="of the first two panels: cpu, cuda or cuda:N (default: cpu)")
    add("--out", type=Path, default=Path(), help="folder of the results (default: this folder)")
    options = parser.parse_args(arguments)
    options.default_malloc = False
    names = [name.strip() for name in options.contenders.split(",") if name.strip()]
    options.contenders = list(dict.fromkeys([_BASE, *names]))
    if unknown := [name for name in options.contenders if name not in CONTENDERS]:
        parser.error(f"--contenders has {unknown[0]!r}; known are {', '.join(CONTENDERS)}")
    try:
        for axis in ("parameters", "batches", "ranks"):
            numbers = [_number(text) for text in getattr(options, axis).split(",") if text.strip()]
            setattr(options, axis, sorted(numbers))
        options.device = torch.empty(0, device=options.device).device
    except (argparse.ArgumentTypeError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    if options.ranks and (options.ranks[0] != 1 or len(options.ranks) == 1):
        parser.error("--ranks needs 1, to compare with, and another number")
    return options


def _points(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for size in options.parameters:
        yield from _at("parameters", size, options.batch, options)
    for batch in options.batches:
        yield from _at("batch", options.size, batch, options)
    if options.ranks:
        yield from _ranks(options)


def _at(axis: str, size: int, batch: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all contenders at one number of parameters and one batch; yield nothing if they do not fit."""
    what = f"{size:,} parameters, batch {batch:,}"
    need = size * sum(_BYTES.get(name, _MOST_BYTES) for name in options.contenders)
    there = free_memory(options.device)
    # What building takes for a while, and activations, are left room.
    if there is not None and need > 0.7 * there:
        print(f"{what}: skipped, it needs about {need / 1e9:.1f} GB, and {there / 1e9:.1f} are free", flush=True)
        return
    width = _width(size)
    try:
        found = _rounds(width, batch, options)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{what}: skipped, it did not fit into memory", flush=True)
        return
    parameters = sum(value.numel() for value in _chain(width).parameters())
    print(f"{what}: {len(found[_BASE])} rounds", flush=True)
    for name, seconds in found.items():
        sizes = {"parameters": parameters, "batch": batch}
        yield {"axis": axis, "size": sizes[axis], "contender": name, **sizes, "ranks": 1, "seconds": seconds}


def _rounds(width: int, batch: int, options: argparse.Namespace) -> dict[str, list[float]]:
    x = torch.rand(batch, width, device=options.device)
    y = torch.randint(10, (batch,), device=options.device)
    steps = {
        name: CONTENDERS[name](_chain(width).to(options.device), x, y, torch.contiguous_format).step
        for name in options.contenders
    }

    def wait() -> None:
        if options.device.type != "cpu":
            torch.get_device_module(options.device).synchronize(options.device)

    in_turns(steps, 2, wait=wait)
    once = sum(seconds[0] for seconds in in_turns(steps, 1, wait=wait).values())
    found = in_turns(steps, max(_MIN_ROUNDS, min(1000, int(options.seconds / once))), wait=wait)
    # What a contender holds must be gone before the next size.
    steps.clear()
    gc.collect()
    return found


def _ranks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from ppl_bnn.guides import ESTIMATORS

    for name in options.contenders:
        if name != _BASE and name not in ESTIMATORS:
            print(f"{name}: is not measured on several ranks", flush=True)
            continue
        kind = ["--deterministic"] if name == _BASE else ["--estimator", name]
        for number in options.ranks[1:]:
            found = _on_ranks(number, kind, options)
            point = {"axis": "ranks", "contender": name, "network": options.ranks_network, "batch": options.batch}
            if number == options.ranks[1]:
                yield {**point, "size": 1, "ranks": 1, "seconds": found["alone"]}
            # Beside the step of one rank in the same rounds.
            yield {**point, "size": number, "ranks": number, "seconds": found["ours"], "alone": found["alone"]}


def _on_ranks(number: int, kind: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    script = str(Path(__file__).with_name("scaling_efficiency.py"))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), script,
             options.ranks_network, *kind, "--batch", str(options.batch), "--rounds", str(options.ranks_rounds),
             "--threads", str(options.threads), "--json", str(file)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{number} ranks ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{number} ranks, {' '.join(kind)}: {options.ranks_rounds} rounds", flush=True)
        found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _chain(width: int) -> nn.Sequential:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def _width(size: int) -> int:
    # 3 (width^2 + width) + 10 width + 10 parameters.
    return max(1, round((math.sqrt(13**2 + 12 * (size - 10)) - 13) / 6))


def _what(points: list[dict[str, Any]]) -> str:
    first = points[0]
    fixed = {
        "parameters": f"chain of Linear layers, batch {first['batch']:,}",
        "batch": f"chain of Linear layers, {first.get('parameters', 0):,} parameters",
        "ranks": f"{first.get('network')}, batch {first['batch']:,} on each rank",
    }
    return fixed[first["axis"]]


def _quartiles(seconds: list[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive")


def _number(text: str) -> int:
    """A number such as 1000 or 1e3."""
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"sizes must be whole numbers of at least 1, got {text!r}")
    return number


if __name__ == "__main__":
    main()
