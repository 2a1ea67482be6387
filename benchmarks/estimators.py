"""Which estimator learns most in a second: its gradient's variance, its step's seconds, and the ELBO it reaches."""

import argparse
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_bnn import Classifier, Images, KLScaledELBO, MeanFieldNormal, build, kl_by_site, load, predict
from ppl_bnn.data import DATASETS
from ppl_bnn.guides import ESTIMATORS, GroupedFlips
from ppl_bnn.guides.normal import inverse_scale
from ppl_bnn.memory import keep_freed_memory
from ppl_bnn.models import parse_prior
from ppl_bnn.models.networks import NETWORKS
from ppl_bnn.optimizers import NonFiniteGradient, build_optimizer, descend
from ppl_bnn.training_log import BatchAccuracy

Batches = Iterator[tuple[Tensor, Tensor]]
# {scale: {estimator: [3, 2]}}: by group, the variance relative to plain and its standard error.
Variances = dict[float, dict[str, Tensor]]

PARTS = ("variance", "time", "elbo")
GROUPS = ("loc", "unconstrained_scale", "point")
ANY_BATCH = "any batch"
METHODS: dict[str, Callable[[], AbstractContextManager]] = {
    **ESTIMATORS,
    **{f"groups-{count}": partial(GroupedFlips, count) for count in (2, 8, 16)},
}
TRAINABLE = (*METHODS, "ivon", *(f"ivon+{name}" for name in METHODS))

_HELP = f"""
variance: gradients of the likelihood term on one batch at one guide: the trace of their covariance over weight draws
  (and, for groups, over who shares one), plain = 1, with its standard error. "{ANY_BATCH}" is plain with a new batch at
  each draw, what a training meets; of it an estimator can take away plain's 1 and no more. The mean columns show bias:
  |mean - plain's mean| over what chance makes of it, and in brackets the standard errors by which its square is above
  chance (of little worth below 10 draws; a chance of plain's own shows in all rows). With batch norm the objective
  itself depends on how the noise is shared, and local leaves out covariances over space in convolutions: there the
  means may differ.
time: seconds of a step as ppl_bnn.fit runs it, in turns; variance x seconds below 1 is better than plain.
elbo: trainings from one state on the same batches, in turns, until each has had the same seconds of steps; then the
  negative ELBO (nll + kl, nats per datum) on training images held out. ivon is plain with that optimizer.

estimators: {", ".join(METHODS)}; groups has 4 groups. --train also takes ivon,
ivon+groups and the like.

  python benchmarks/estimators.py --network vgg16 --channels_last --parts variance,time --draws 6 --scales 0.0063
  python benchmarks/estimators.py --parts elbo --train plain,groups-2,local,ivon+groups --seconds 120 --markdown
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that the command line names and print their tables."""
    options = _options(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    images, held_out = load(options.data, options.data_dir, file=options.data_file, holdout=options.held_out)
    options.batch = min(options.batch, len(images))
    print(_heading(options, images), flush=True)
    variances = variance(images, options) if "variance" in options.parts else {}
    if "time" in options.parts:
        step_seconds(images, options, variances)
    if "elbo" in options.parts:
        elbo_reached(images, held_out, options)


def variance(images: Images, options: argparse.Namespace) -> Variances:
    """Print the gradients' variances and whether their means agree; return the variances."""
    training, batches, found = Training.start(images, options), _batches(images.inputs(), images.labels, options), {}
    for _ in tqdm(range(options.warm), desc="warm", unit="step", disable=None):
        training.step(*next(batches))
    training.elbo.kl_weight = 0.0
    norms = [module for module in training.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        # The running statistics stay as they are; no gradient depends on them in training mode.
        norm.momentum = 0.0
    # One batch in an order drawn anew each time: in training it is chance too which images share a group.
    sources = {**dict.fromkeys(METHODS, _batches(*next(batches), options)), ANY_BATCH: batches}
    bar = tqdm(total=len(options.scales) * len(sources) * options.draws, desc="variance", unit="draw", disable=None)
    for scale in options.scales:
        for value in training.guide.unconstrained_scale.parameters():
            nn.init.constant_(value, float(inverse_scale(torch.tensor(scale))))
        moments = {name: _moments(training, name, islice(sources[name], options.draws), bar) for name in sources}
        plain, base = moments["plain"]
        found[scale] = {name: _relative(squares, base) for name, (_, squares) in moments.items()}
        table = [["estimator", *GROUPS, *(f"mean of {group}" for group in GROUPS)]]
        for name, (mean, squares) in moments.items():
            own = name in ("plain", ANY_BATCH)
            table.append([name, *map(_with_error, found[scale][name])])
            table[-1] += ["-"] * 3 if own else _mean_differences(mean, squares, plain, base)
        _show(f"Gradient variance at scale {scale:g}, plain = 1; means against plain's, chance = 1", table, options)
        for what, values in (("traces", base.mean(0)), ("mean gradient's squared norms", _squares(plain))):
            print(f"plain's {what}:", ", ".join(f"{g} {float(v):.3g}" for g, v in zip(GROUPS, values, strict=True)))
        if norms:
            print("batch norm: the objective depends on how the noise is shared in the batch, so means may differ")
    bar.close()
    return found


def step_seconds(images: Images, options: argparse.Namespace, variances: Variances) -> None:
    """Print the seconds of a training step, and the variances times them."""
    cnn, bnn = (Training.start(images, options, deterministic=kind) for kind in (True, False))
    steps = {"cnn": cnn.step, **{name: partial(bnn.step, estimator=name) for name in METHODS}}
    batches, order = _batches(images.inputs(), images.labels, options), random.Random(0)
    first = [step(*next(batches)) for _ in range(2) for step in steps.values()]
    rounds = max(5, min(100, int(30 / sum(first[len(steps) :]))))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc="time", unit="round", disable=None):
        for name in order.sample(list(steps), len(steps)):
            found[name].append(steps[name](*next(batches)))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    table = [["step", "seconds", "quartiles", "/ plain", "/ cnn"]]
    for name, seconds in found.items():
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        ratios = (f"{medians[name] / medians[base]:.2f}" for base in ("plain", "cnn"))
        table.append([name, f"{medians[name]:.5f}", f"{low:.5f} to {high:.5f}", *ratios])
    _show(f"Seconds of a training step, medians of {rounds}", table, options)
    if variances:
        table = [["estimator", *(f"{group} {scale:g}" for scale in variances for group in GROUPS)]]
        for name in METHODS:
            products = torch.cat([values[name] for values in variances.values()]) * medians[name] / medians["plain"]
            table.append([name, *map(_with_error, products)])
        _show("Gradient variance x seconds of a step, plain = 1, by group and scale", table, options)


def elbo_reached(images: Images, held_out: Images, options: argparse.Namespace) -> None:
    """Print what each estimator reaches on held-out images after the same seconds of steps."""
    trainings = {name: Training.start(images, options, ivon=name.startswith("ivon")) for name in options.train}
    inputs = images.inputs()
    batches = {name: _batches(inputs, images.labels, options) for name in trainings}
    left, bar = dict(trainings), tqdm(total=options.seconds * len(trainings), desc="elbo", unit="s", disable=None)
    # The one furthest behind runs for a second, so that whatever else the machine does slows all of them.
    while left:
        name, training = min(left.items(), key=lambda item: item[1].seconds)
        estimator, until = name.removeprefix("ivon").removeprefix("+") or "plain", training.seconds + 1
        try:
            while training.seconds < min(until, options.seconds):
                bar.update(round(training.step(*next(batches[name]), estimator), 3))
        except NonFiniteGradient:
            del left[name]
        else:
            left = {key: value for key, value in left.items() if value.seconds < options.seconds}
    bar.close()
    x, y = held_out.inputs().contiguous(memory_format=options.layout), held_out.labels
    table = [["trained", "steps", "-elbo", "nll", "kl", "accuracy"]]
    for name, training in trainings.items():
        predictive = predict(training.model.net, training.guide, x, y, num_samples=10, batch_size=500, progress=False)
        nll = -float(predictive.log_likelihood.mean())
        kl = sum(kl_by_site(training.model, training.guide, x[:1], y[:1]).values()) / len(images)
        numbers = [f"{nll + kl:.4f}", f"{nll:.4f}", f"{kl:.4f}", f"{predictive.summary()['accuracy']:.2%}"]
        ended = "" if training.seconds >= options.seconds else " (diverged)"
        table.append([name + ended, str(training.steps), *numbers])
    _show(f"After {options.seconds:g} s of steps, on {len(x)} held-out images; nats per datum", table, options)


@dataclass
class Training:
    """A network and its guide under `ppl_bnn.fit`'s machinery, and the steps so far and their seconds."""

    model: Classifier
    guide: MeanFieldNormal
    elbo: KLScaledELBO
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    steps: int = 0

    @classmethod
    def start(
        cls, images: Images, options: argparse.Namespace, *, deterministic: bool = False, ivon: bool = False
    ) -> "Training":
        """The same network and guide at each call."""
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
        started = time.perf_counter()
        # A parameter store of its own: the parameters of all trainings have the same names.
        with pyro.get_param_store().scope(), METHODS[estimator](), BatchAccuracy():
            self.elbo.loss_and_grads(self.model, self.guide, x, y)
            descend(self.optimizer)
        seconds = time.perf_counter() - started
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        return seconds


def _moments(training: Training, name: str, batches: Batches, bar: tqdm) -> tuple[list[Tensor], Tensor]:
    """The mean gradient, a vector a group, and [n - 1, 3] estimates of the trace of the covariance, by group.

    Welford's contrasts sqrt(k / (k + 1)) (g - mean of the k before) are uncorrelated and each has the covariance of g:
    the mean of their squared norms is the unbiased sample variance, and their spread gives its standard error.
    """
    parts = (training.guide.loc, training.guide.unconstrained_scale, training.model)
    groups = [list(part.parameters()) for part in parts]
    mean, squares = [torch.zeros(())] * len(groups), []
    for drawn, batch in enumerate(batches):
        with pyro.get_param_store().scope(), METHODS.get(name, METHODS["plain"])():
            loss = training.elbo.differentiable_loss(training.model, training.guide, *batch)
        gradients = iter(torch.autograd.grad(loss, [parameter for group in groups for parameter in group]))
        vectors = [torch.cat([next(gradients).flatten() for _ in group]) for group in groups]
        changes = [vector.sub_(before) for vector, before in zip(vectors, mean, strict=True)]
        squares.append(_squares(changes) * (drawn / (drawn + 1)))
        mean = [before + change / (drawn + 1) for before, change in zip(mean, changes, strict=True)]
        bar.update()
    # The first draw has none before it to differ from.
    return mean, torch.stack(squares[1:])


def _relative(squares: Tensor, base: Tensor) -> Tensor:
    ratio = squares.mean(0) / base.mean(0)
    # Plain's own ratio is 1: what is said of it is how well its variance is known.
    parts = (squares,) if squares is base else (squares, base)
    errors = sum((part.std(0) / part.mean(0)).square() / len(part) for part in parts)
    return torch.stack([ratio, ratio * errors.sqrt()], 1)


def _mean_differences(mean: list[Tensor], squares: Tensor, plain: list[Tensor], base: Tensor) -> list[str]:
    found, draws = _squares([a - b for a, b in zip(mean, plain, strict=True)]), len(base) + 1
    chance = (squares.mean(0) + base.mean(0)) / draws
    # Of a difference that is chance alone, by Cauchy-Schwarz at most this; its expectation is itself an estimate.
    error = (squares.std(0) + base.std(0)) / draws * (1 + 1 / len(base)) ** 0.5
    above = (found - chance) / error
    return [f"{float(r):.2f} ({float(z):+.1f})" for r, z in zip((found / chance).sqrt(), above, strict=True)]


def _squares(vectors: list[Tensor]) -> Tensor:
    return torch.stack([vector.norm().double().square() for vector in vectors])


def _batches(x: Tensor, y: Tensor, options: argparse.Namespace) -> Batches:
    generator = torch.Generator().manual_seed(0)
    while True:
        # A last batch that is smaller would be a faster step with another gradient variance.
        for rows in torch.randperm(len(x), generator=generator).split(options.batch)[: len(x) // options.batch]:
            yield x[rows].contiguous(memory_format=options.layout), y[rows]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=raw)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="bnn-fc", help="which network (default: bnn-fc)")
    add("--data", choices=DATASETS, help="which images (default: mnist for bnn-*, cifar10 for the others)")
    add("--data_dir", default="data", help="where the data are, or are downloaded to (default: data)")
    add("--data_file", help="an .npz of CIFAR-10 JPEGs to read instead")
    add("--batch", type=int, default=128, help="images a step (default: 128)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--channels_last", action="store_true", help="that memory layout of images and kernels")
    add("--parts", type=names, default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    add("--draws", type=int, default=24, help="variance: gradients of each estimator (default: 24)")
    add("--scales", type=numbers, default="0.002,0.02", help="variance: scales to study (default: 0.002,0.02)")
    add("--warm", type=int, default=100, help="variance: steps of plain Adam before it (default: 100)")
    add(
        "--train",
        type=names,
        default="plain,flipout,groups,local,ivon",
        help="elbo: what to train (default: plain,flipout,groups,local,ivon)",
    )
    add("--seconds", type=float, default=60, help="elbo: seconds of steps of each (default: 60)")
    add("--held_out", type=int, default=1000, help="elbo: images to evaluate 10 draws on (default: 1000)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add("--ivon_lr", type=float, default=0.05, help="ivon's learning rate (default: 0.05)")
    add("--ivon_beta2", type=float, default=0.9999, help="decay of ivon's curvature (default: 0.9999)")
    add("--prior", type=parse_prior, default="normal(0, 0.316)", help="of every weight (default: normal(0, 0.316))")
    add("--init_scale", type=float, default=0.0063, help="of the guide when training starts (default: 0.0063)")
    add("--markdown", action="store_true", help="print the tables as markdown")
    options = parser.parse_args(arguments)
    options.data = options.data or ("mnist" if options.network.startswith("bnn") else "cifar10")
    options.layout = torch.channels_last if options.channels_last else torch.contiguous_format
    if unknown := (set(options.parts) - set(PARTS)) | (set(options.train) - set(TRAINABLE)):
        parser.error(f"unknown: {min(unknown)!r}; parts are {', '.join(PARTS)}; --train takes {', '.join(TRAINABLE)}")
    # Batch norm cannot learn from one image of a 1x1 map, and two contrasts are the fewest that have a spread.
    if options.batch < 2 or options.draws < 3 or min(options.threads, options.held_out) < 1:
        parser.error("--batch must be at least 2, --draws at least 3, --threads and --held_out at least 1")
    return options


def _heading(options: argparse.Namespace, images: Images) -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = named[1] if (named := re.search(r"model name\s*:\s*(.+)", info)) else platform.machine()
    return (
        f"torch {torch.__version__}, threads {options.threads}, batch {options.batch}, {cpu}, {images.title}, "
        f"{'channels_last' if options.channels_last else 'contiguous'}, {options.network}"
    )


def _with_error(pair: Tensor) -> str:
    return f"{float(pair[0]):.3f} ± {float(pair[1]):.3f}"


def _show(title: str, table: list[list[str]], options: argparse.Namespace) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if options.markdown:
        rule = ["---", *["---:"] * (len(widths) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])]
    else:
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    print("", title, "", *lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
