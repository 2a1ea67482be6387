"""Images per second that `fit` trains VGG-16 on, of the 0.1M transformed digits: the study's measure on 8 V100 GPUs."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu_cells import Cell, Clock, NotHere, Plan, Row
from gpu_networks import network, synchronize
from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, load
from ppl_bnn.data import Images, TensorExamples
from ppl_bnn.data.sources import IDX_NAMES
from ppl_bnn.errors import Interrupted

# Images per second of the study's figure, 8 V100.
STUDY = {"deterministic": 46_000, "flipout": 42_000}
SETTINGS: dict[str, dict[str, Any]] = {
    "deterministic": {"estimator": "plain", "lr": 1e-4},
    # The study's estimator, and the recipe of runs/digits100k-vgg16.
    "flipout": {"estimator": "flipout", "lr": 1e-4},
    "ivon": {"estimator": "plain", "optimizer": "ivon", "lr": 0.1, "beta2": 0.9999},
}


class Trained(NamedTuple):
    """What `fit` is given: a model, its guide, inputs [N, ...] and labels [N] on the device."""

    model: nn.Module
    guide: nn.Module
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Counted(TensorExamples):
    """Examples in memory that count how many were taken."""

    batches: list[int] = field(default_factory=list)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The examples with the numbers `rows`."""
        self.batches.append(len(rows))
        return super().take(rows)


def cells(plan: Plan) -> Iterator[Cell]:
    """Measure each step at the study's batch sizes, in both precisions."""
    batches = (8,) if plan.toy else (512, 1024)
    for precision, batch, name in product(("float32", "bfloat16"), batches, SETTINGS):
        yield Cell(f"{name}, {batch}, {precision}", 4, partial(speed, plan, name, batch, precision))


def speed(plan: Plan, name: str, batch: int, precision: str, clock: Clock) -> Iterator[Row]:
    """Train for some seconds; yield images per second."""
    clock.say("reading the digits")
    data = digits(plan.data_dir, plan.toy)
    clock.say("building the network")
    trained = posed(plan, data, deterministic=name == "deterministic")
    clock.say("training")
    seconds = 0.05 if plan.toy else min(1.5, clock.left() / 3)
    found = images_per_second(trained, seconds=seconds, batch_size=batch, precision=precision, **SETTINGS[name])
    yield {
        "data": data.title, "batch": batch, "precision": precision, "step": name, "images/s": found,
        "the study's 8 V100": STUDY.get(name),
    }  # fmt: skip


@cache
def digits(data_dir: Path, toy: bool) -> Images:
    """Return the transformed digits; at toy size 200 of MNIST's own. Raises NotHere if MNIST is not there."""
    if not all((data_dir / "mnist" / name).exists() for name in IDX_NAMES.values()):
        # `load` would try to download them.
        raise NotHere("MNIST is not there")
    train, _ = load("mnist" if toy else "digits100k", data_dir, progress=False)
    return train.first(200 if toy else None)  # type: ignore[return-value]


def posed(plan: Plan, data: Images, *, deterministic: bool, init_scale: float = 1e-3, **prior: Any) -> Trained:
    """Build VGG-16 for some images, with the images on the device, channels_last."""
    torch.manual_seed(0)
    net = network(plan, "vgg16", data.shape)  # type: ignore[arg-type]
    x = data.inputs().to(plan.device).contiguous(memory_format=torch.channels_last)
    y = data.labels.to(plan.device)
    model = Classifier(net if deterministic else bayesian(net, **prior), len(data)).to(plan.device)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=init_scale, init_jitter=0.0).to(plan.device)
    model, guide = (part.to(memory_format=torch.channels_last) for part in (model, guide))  # type: ignore[call-overload]
    return Trained(model, guide, x, y)


def images_per_second(trained: Trained, *, seconds: float, **settings: Any) -> float:
    """Train by `fit` for about `seconds` after some steps that do not count; return images per second.

    The clock waits for the device at both ends alone, so that steps without waits count as such.
    """
    examples = Counted(trained.x, trained.y)
    marks: list[tuple[float, int]] = []
    started = time.perf_counter()

    def mark() -> None:
        synchronize(trained.x.device)
        marks.append((time.perf_counter(), sum(examples.batches)))

    def should_stop() -> bool:
        now = time.perf_counter()
        if not marks:
            if len(examples.batches) > 10 or now - started > seconds:
                mark()
        elif now - marks[0][0] > seconds and sum(examples.batches) > marks[0][1]:
            mark()
        return len(marks) == 2

    with suppress(Interrupted):
        fit(trained.model, trained.guide, examples, epochs=10_000, progress=False, should_stop=should_stop, **settings)
    (first, before), (last, after) = marks
    return (after - before) / (last - first)
