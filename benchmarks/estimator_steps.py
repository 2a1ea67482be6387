"""Trains one network with each estimator, step by step, and prints tables of the results."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl_bnn import Classifier, GroupedFlips, Images, KLScaledELBO, MeanFieldNormal, TrainingStep, build
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.optimizers import build_optimizer
from report import Table, aligned, as_markdown

Batches = Iterator[tuple[Tensor, Tensor]]

METHODS: dict[str, Callable[[], Any]] = {
    **ESTIMATORS,
    **{f"groups-{count}": partial(GroupedFlips, count) for count in (2, 8, 16)},
}

TRAINABLE = (*METHODS, "ivon", *(f"ivon+{name}" for name in METHODS))


@dataclass
class Training:
    """A network and its guide, trained as in `ppl_bnn.fit`, with the number of steps so far and their seconds."""

    model: Classifier
    guide: MeanFieldNormal
    elbo: KLScaledELBO
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    steps: int = 0
    own: tuple[str, TrainingStep] | None = None

    @classmethod
    def start(
        cls, images: Images, options: argparse.Namespace, *, deterministic: bool = False, ivon: bool = False
    ) -> "Training":
        """Start from the same network and guide at each call."""
        torch.manual_seed(0)
        shape, one, count = tuple(images.pixels.shape[1:]), images.first(1), len(images)
        net = build(options.network, image_shape=shape, prior=options.prior, deterministic=deterministic)
        model, start = Classifier(net, count), {"init_scale": options.init_scale, "init_jitter": 0.0}
        guide = MeanFieldNormal(model, one.inputs(), one.labels, init_loc="he", **start)
        model, guide = (part.train().to(memory_format=options.layout) for part in (model, guide))
        kind, lr = ("ivon", options.ivon_lr) if ivon else ("adam", options.lr)
        optimizer = build_optimizer(kind, model, guide, lr=lr, beta2=options.ivon_beta2)
        optimizer.param_groups[0]["kl_per_datum"] = 1 / count
        elbo = KLScaledELBO(count)
        return cls(model, guide, elbo, optimizer)

    def step(self, x: Tensor, y: Tensor, estimator: str = "plain") -> float:
        """Run one step and return its seconds."""
        own = self._of(estimator, x, y)
        started = time.perf_counter()
        own(x, y)
        seconds = time.perf_counter() - started
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        return seconds

    def _of(self, estimator: str, x: Tensor, y: Tensor) -> TrainingStep:
        # The guide's parameters are in the buffers of one step at a time.
        if self.own is None or self.own[0] != estimator:
            method = estimator if estimator in ESTIMATORS else METHODS[estimator]()
            step = TrainingStep(
                self.model, self.guide, x, y, num_data=self.elbo.num_data, optimizer=self.optimizer, estimator=method
            )
            self.own = estimator, step
        return self.own[1]


def shuffled(x: Tensor, y: Tensor, options: argparse.Namespace) -> Batches:
    """Yield whole batches without end, in an order that is the same at each call."""
    generator = torch.Generator().manual_seed(0)
    while True:
        # A smaller last batch would be a faster step with another gradient variance.
        for rows in torch.randperm(len(x), generator=generator).split(options.batch)[: len(x) // options.batch]:
            yield x[rows].contiguous(memory_format=options.layout), y[rows]


def with_error(pair: Tensor) -> str:
    """Format a number and its standard error [2]."""
    return f"{float(pair[0]):.3f} ± {float(pair[1]):.3f}"


def show(title: str, table: Table, options: argparse.Namespace) -> None:
    """Print a table under its title, as text or markdown."""
    lines = as_markdown(table) if options.markdown else aligned(table)
    print("", title, "", *lines, "", sep="\n", flush=True)
