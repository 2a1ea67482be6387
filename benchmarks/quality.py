"""Compares the predictive of mean-field VI with its deterministic twin, MC dropout and a deep ensemble.

All train on the same data for the same processor time. Each gets the seconds that VI took; the members of the ensemble
share them. The table is of the whole test set: accuracy, NLL (nats per datum), ECE, and epistemic uncertainty (nats).

    python benchmarks/quality.py runs/mnist-lenet
    python benchmarks/quality.py runs/fashion-lenet --methods twin,dropout,ensemble --budget 1500
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal, build, fit, load, predict
from ppl_bnn.experiment import saved_config
from ppl_bnn.experiment.config import GuideConfig, TrainConfig
from ppl_bnn.inference.schedules import kl_schedule
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.metrics import accuracy, ece, entropy, uncertainties
from ppl_bnn.models import parse_prior

METHODS = ("vi", "twin", "dropout", "ensemble")
MEMBERS = 5
_PROGRESS = sys.stderr.isatty()


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate the methods named on the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("run", type=Path, help="run folder whose config.yaml is VI's recipe")
    add("--methods", default=",".join(METHODS), help=f"which of {', '.join(METHODS)} (default: all)")
    add("--budget", type=float, help="processor seconds of training for each method but vi (default: vi's)")
    add("--draws", type=int, default=100, help="number of draws of vi and of MC dropout (default: 100)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate of other methods (default: 0.001, cosine to 0)")
    add("--dropout", type=float, default=0.5, help="MC dropout's rate before the dense layers (default: 0.5)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown method {min(unknown)!r}; there are {', '.join(METHODS)}")
    if "vi" not in methods and options.budget is None:
        parser.error("without vi, --budget has to say how long to train")
    torch.set_num_threads(options.threads)
    run = saved_config.read(options.run / "config.yaml")
    train, test = load(run["data"]["name"])
    data = train.inputs(), train.labels
    x, y = test.inputs(), test.labels
    budget = options.budget
    print(f"{run['model']['name']}, {len(train)} training images, {len(test)} test images of {test.title}")
    print(f"{'method':9}{'epochs':>8}{'train s':>9}{'accuracy':>10}{'nll':>8}{'ece':>8}{'epistemic':>11}")
    for method in sorted(methods, key=METHODS.index):
        if method == "vi":
            probs, epochs, seconds = _vi(run, data, x, y, options.draws)
            budget = budget or seconds
        else:
            probs, epochs, seconds = _point_estimates(method, run, data, x, budget, options)
        mean = probs.mean(0)
        nll = -mean.gather(1, y[:, None]).log().mean()
        epistemic = uncertainties(mean, entropy(probs).mean(0))[2].mean()
        numbers = f"{accuracy(mean, y):10.4f}{nll:8.4f}{ece(mean, y):8.4f}{epistemic:11.4f}"
        print(f"{method:9}{epochs:8}{seconds:9.0f}{numbers}", flush=True)


def _vi(run: dict, data: tuple[Tensor, Tensor], x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, int, float]:
    torch.manual_seed(0)
    settings, guide_settings = TrainConfig(**run["train"]), GuideConfig(**run["guide"])
    model = Classifier(build(run["model"]["name"], prior=parse_prior(run["model"]["prior"])), len(data[0]))
    start = {name: getattr(guide_settings, name) for name in ("init_loc", "init_scale", "init_jitter")}
    guide = MeanFieldNormal(model, data[0][:1], data[1][:1], **start)
    weight = kl_schedule(settings.kl_schedule, settings.kl_weight, ramp=settings.kl_ramp, cycles=settings.kl_cycles)
    began = time.process_time()
    fit(
        model,
        guide,
        *data,
        **{known.name: getattr(settings, known.name) for known in fields(TrainSettings)},
        kl_weight=weight,
        progress=_PROGRESS,
    )
    seconds = time.process_time() - began
    return (
        predict(model.net, guide, x, y, num_samples=draws, progress=_PROGRESS).probs.double(),
        settings.epochs,
        seconds,
    )


def _point_estimates(
    method: str, run: dict, data: tuple[Tensor, Tensor], x: Tensor, budget: float, options: argparse.Namespace
) -> tuple[Tensor, int, float]:
    members = MEMBERS if method == "ensemble" else 1
    rate = options.dropout if method == "dropout" else 0.0
    # A hundred timed steps say how many epochs the budget holds, because a cosine schedule has to know its end. The
    # hundred steps before them are slower, because torch starts up.
    for _ in range(2):
        started = time.process_time()
        _trained(run, (data[0][:10000], data[1][:10000]), rate, epochs=1, lr=options.lr, seed=0)
    epochs = max(1, math.floor(budget / members / ((time.process_time() - started) * len(data[0]) / 10000)))
    began = time.process_time()
    nets = [_trained(run, data, rate, epochs=epochs, lr=options.lr, seed=seed) for seed in range(members)]
    seconds = time.process_time() - began
    return torch.stack(list(_probs(nets, x, options.draws if rate else 1))), epochs, seconds


def _trained(run: dict, data: tuple[Tensor, Tensor], rate: float, *, epochs: int, lr: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = build(run["model"]["name"], deterministic=True)
    if rate:
        # One mask for each draw and example before each dense layer, in training and prediction (Gal, Ghahramani 2016).
        layers = [
            part
            for layer in net.children()
            for part in ([nn.Dropout(rate), layer] if isinstance(layer, nn.Linear) else [layer])
        ]
        net = nn.Sequential(*layers)
    model = Classifier(net, len(data[0]))
    guide = MeanFieldNormal(model, data[0][:1], data[1][:1])
    fit(
        model,
        guide,
        *data,
        epochs=epochs,
        lr=lr,
        lr_schedule="cosine",
        estimator="plain",
        seed=seed,
        progress=_PROGRESS,
    )
    return net


@torch.no_grad()
def _probs(nets: list[nn.Module], x: Tensor, draws: int) -> Iterator[Tensor]:
    torch.manual_seed(0)
    for net in nets:
        for module in net.eval().modules():
            module.training = isinstance(module, nn.Dropout)
        for _ in range(draws):
            yield torch.cat([net(part) for part in x.split(2000)]).double().softmax(1)


if __name__ == "__main__":
    main()
