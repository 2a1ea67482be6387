"""VGG-16 on CIFAR-10, deterministic and Bayesian, in slices of equal time: test metrics by seconds of training."""

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gpu_cells import Cell, Clock, NotHere, Plan, Row
from gpu_digits import Trained, images_per_second, posed
from gpu_networks import synchronize
from ppl_bnn import fit, load, predict
from ppl_bnn.data import Images
from ppl_bnn.errors import Interrupted
from ppl_bnn.inference import checkpoint
from ppl_bnn.models.prior_parsing import parse_prior

RUNS = Path(__file__).resolve().parent.parent / "runs"
RUN_OF = {"deterministic": "cifar10-vgg16-cnn", "Bayesian": "cifar10-vgg16"}
# Each network is trained in so many slices, and tested after each.
SLICES = 6
TEST_DRAWS = 10
# Of the time left: what training takes. The rest is for tests, checkpoints and the figure.
TRAINING_SHARE = 0.75
FIGURE_SECONDS = 3.0
METRICS = {"accuracy": "accuracy", "nll": "NLL (nats per datum)", "ece": "ECE"}


@dataclass
class Twin:
    """One of the two trainings.

    Attributes:
        settings: of `fit`.
        epochs: as many as fit into the network's time.
        seconds: of training so far, without tests and checkpoints.
    """

    name: str
    trained: Trained
    settings: dict[str, Any]
    folder: Path
    epochs: int = 0
    seconds: float = 0.0
    finished: bool = False
    tested: list[Row] = field(default_factory=list)


def cells(plan: Plan) -> Iterator[Cell]:
    """Train both, in turns."""
    yield Cell("training", 25, partial(training, plan))


def training(plan: Plan, clock: Clock) -> Iterator[Row]:
    """Train each network for the same time by its run's recipe, and yield its test metrics after each slice."""
    if plan.data is None:
        raise NotHere("give an .npz of CIFAR-10 as JPEGs with --data")
    clock.say(f"reading {plan.data}")
    train, test = load("cifar10", plan.data_dir, file=plan.data, progress=False)
    if plan.toy:
        train, test = train.first(128), test.first(32)
    x_test = test.inputs().to(plan.device).contiguous(memory_format=torch.channels_last)
    y_test = test.targets.to(plan.device)
    with tempfile.TemporaryDirectory(dir=plan.out, prefix=".training-") as temporary:
        twins = [_twin(plan, name, train, Path(temporary)) for name in RUN_OF]  # type: ignore[arg-type]
        # At toy size the first slice ends at its second step.
        each = 0.0 if plan.toy else TRAINING_SHARE * (clock.left() - FIGURE_SECONDS) / len(twins)
        slices = 2 if plan.toy else SLICES
        for twin in twins:
            clock.say(f"the speed of {twin.name}")
            twin.epochs = 4 if plan.toy else _epochs(twin, each)
        for number in range(1, slices + 1):
            for after, twin in enumerate(twins):
                limit = (clock.left() - FIGURE_SECONDS) / (len(twins) - after)
                if twin.finished or limit < 0:
                    continue
                clock.say(f"{twin.name}, slice {number}")
                # The last slice runs to the end of the schedule.
                _train(twin, until=number * each / slices if number < slices else math.inf, limit=limit)
                twin.tested.append({"data": test.title, **_tested(twin, x_test, y_test)})
                yield twin.tested[-1]
    clock.say("the figure")
    yield {"network": "figure", "note": _draw(twins, plan.out / "gpu-training.png")}


def _twin(plan: Plan, name: str, train: Images, folder: Path) -> Twin:
    recipe = yaml.safe_load((RUNS / RUN_OF[name] / "config.yaml").read_text(encoding="utf-8"))
    settings = {key: value for key, value in recipe["train"].items() if key != "epochs"}
    # YAML 1.1 reads 1e-3 as text.
    settings["lr"] = float(settings["lr"])
    if name == "deterministic":
        trained = posed(plan, train, deterministic=True)
    else:
        prior, scale = parse_prior(recipe["model"]["prior"]), recipe["guide"]["init_scale"]
        trained = posed(plan, train, deterministic=False, init_scale=scale, prior=prior)
    return Twin(name, trained, settings, folder / name)


def _epochs(twin: Twin, seconds: float) -> int:
    """Return how many epochs fit into `seconds`, measured on a copy."""
    model, guide = copy.deepcopy((twin.trained.model, twin.trained.guide))
    probe = twin.trained._replace(model=model, guide=guide)
    speed = images_per_second(probe, seconds=min(2.0, seconds / 20), **twin.settings)
    return max(1, int(seconds * speed / len(probe.x)))


def _train(twin: Twin, *, until: float, limit: float) -> None:
    """Continue until `until` seconds of training, for no more than `limit` seconds, or to the training's end."""
    began = time.perf_counter()
    # The first step's end: before it the checkpoint is read.
    first = last = None

    def should_stop() -> bool:
        nonlocal first, last
        last = time.perf_counter()
        first = first or last
        stop = twin.seconds + last - first > until or last - began > limit
        if stop:
            synchronize(twin.trained.x.device)
            last = time.perf_counter()
        return stop

    with suppress(Interrupted):
        fit(
            *twin.trained, epochs=twin.epochs, progress=False, folder=twin.folder, checkpoint_every=10_000,
            checkpoint_minutes=1000.0, keep_checkpoints=1, should_stop=should_stop, **twin.settings,
        )  # fmt: skip
        twin.finished = True
    if first is not None and last is not None:
        twin.seconds += last - first


def _tested(twin: Twin, x: Tensor, y: Tensor) -> Row:
    """Return the metrics of the test images x [N, 3, 32, 32] with the labels y [N]."""
    draws = TEST_DRAWS if twin.trained.guide.sites else 1
    found = predict(twin.trained.model, twin.trained.guide, x, y, num_samples=draws, progress=False).summary()
    meta = checkpoint.read_meta(checkpoint.saved(twin.folder / "checkpoints")[-1])
    epochs = len(meta["history"]) + meta["sums"].get("rows", 0) / len(twin.trained.x)
    return {
        "network": twin.name, "seconds": twin.seconds, "epochs": epochs,
        "of epochs": twin.epochs, "draws": draws, **{name: found[name] for name in METRICS}, "note": "",
    }  # fmt: skip


def _draw(twins: list[Twin], path: Path) -> str:
    """Draw the metrics by seconds; return the file's name, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "needs matplotlib"
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for twin in twins:
            seconds, values = ([row[key] for row in twin.tested] for key in ("seconds", metric))
            axis.plot(seconds, values, "o-", label=twin.name)
        axis.set(xlabel="seconds of training", ylabel=f"test {label}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path.name
