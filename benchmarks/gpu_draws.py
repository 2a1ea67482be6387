"""Draws per second of the predictive on the device, beside the deterministic forward pass, and one image at a time."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch

from gpu_cells import Cell, Clock, Plan, Row
from gpu_networks import network, synchronize
from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict, predictor
from ppl_bnn.prediction.draws import coherent
from ppl_bnn.prediction.plain import plain

NETWORKS = ("vgg16", "resnet18")
# Draws of one answer of the predictor, and of one call of `predict`.
ANSWER_DRAWS = 20


def cells(plan: Plan) -> Iterator[Cell]:
    """Measure the draws of each network in both precisions."""
    for precision, name in product(("float32", "bfloat16"), NETWORKS[: 1 if plan.toy else None]):
        yield Cell(f"{name}, {precision}", 6, partial(draws, plan, name, precision))


def draws(plan: Plan, name: str, precision: str, clock: Clock) -> Iterator[Row]:
    """Time a forward pass of the deterministic network, a draw, `predict` with all its results, and an answer."""
    device, images = torch.device(plan.device), 10 if plan.toy else 1000
    torch.manual_seed(0)
    net = network(plan, name).eval()
    random_net = bayesian(net)
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10
    guide = MeanFieldNormal(Classifier(random_net, images), x[:1], y[:1], init_loc="he", init_scale=0.01)
    net, random_net, guide, x, y = (part.to(device) for part in (net, random_net, guide, x, y))
    seconds = 0.05 if plan.toy else min(1.5, clock.left() / 6)
    in_bfloat16 = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with torch.no_grad(), in_bfloat16:
        folded = plain(net).net
        forward = _rate(lambda index: folded(x), device, seconds)
        row = {"network": name, "precision": precision}
        yield row | {"what": "deterministic forward pass", "images": images, "a second": forward, "ratio": 1.0}
        clock.say("draws")
        blocks = coherent(random_net, guide, x, batch_size=images)
        rate = _rate(lambda index: blocks.logits(index, 1.0).softmax(-1), device, seconds)
        yield row | {"what": "draws", "images": images, "a second": rate, "ratio": forward / rate}
        clock.say("predict")
        settings = {"num_samples": ANSWER_DRAWS, "method": "draws", "batch_size": images, "progress": False}
        rate = ANSWER_DRAWS * _rate(lambda index: predict(random_net, guide, x, y, **settings), device, seconds)
        yield row | {"what": "draws of predict, its set-up and results", "images": images, "a second": rate,
                     "ratio": forward / rate}  # fmt: skip
        clock.say("predictor")
        answer = predictor(random_net, guide, x[:1], num_samples=ANSWER_DRAWS)
        one = _rate(lambda index: folded(x[:1]), device, seconds / 2)
        rate = ANSWER_DRAWS * _rate(lambda index: answer(x[:1]), device, seconds)
        yield row | {"what": "draws of predictor", "images": 1, "a second": rate, "ratio": one / rate}


def _rate(run: Callable[[int], object], device: torch.device, seconds: float) -> float:
    """Return the calls a second, from the median of several timings of as many calls as take a tenth of `seconds`."""
    run(0)
    synchronize(device)
    started = time.perf_counter()
    run(1)
    synchronize(device)
    each = time.perf_counter() - started
    count, rates = max(1, int(seconds / 10 / each)), []
    ends = time.perf_counter() + seconds
    while not rates or time.perf_counter() < ends:
        started = time.perf_counter()
        for index in range(count):
            run(index)
        synchronize(device)
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)
