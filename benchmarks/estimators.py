"""Compares estimators: the variance of the gradient, the seconds of a step, and the ELBO reached in equal time."""

import argparse
import random
import statistics
from functools import partial

import pyro
import torch
from tqdm import tqdm

from estimator_steps import METHODS, TRAINABLE, Training, show, shuffled, with_error
from gradient_variance import ANY_BATCH, GROUPS, Variances, variance
from ppl_bnn import Images, kl_by_site, load, predict
from ppl_bnn.data import DATASETS
from ppl_bnn.inference.updates import NonFiniteGradient
from ppl_bnn.models import parse_prior
from ppl_bnn.models.networks import NETWORKS
from ppl_bnn.native.memory import keep_freed_memory
from report import cpu_name

PARTS = ("variance", "time", "elbo")

_HELP = f"""
variance: the trace of the covariance of gradients of the likelihood term, on one batch at one guide, with its standard
  error. The unit is plain's. It is taken over weight draws, and for groups also over which images share a draw.
  "{ANY_BATCH}" is plain with a new batch at each draw, as in a training. An estimator can remove at most plain's 1 of
  it. The mean columns show bias: |mean - plain's mean| divided by its size under chance. The number in brackets says
  by how many standard errors its square is above chance. It means little below 10 draws. A chance deviation of plain
  shows in all rows. The means may differ with batch norm, where the objective depends on how the noise is shared, and
  for local in convolutions, where it leaves out covariances over space.
time: seconds of a step as ppl_bnn.fit runs it. The estimators take turns. A variance x seconds below 1 is better than
  plain.
elbo: trainings from one state on the same batches, in turns, until each has used the same seconds of steps. Then the
  negative ELBO (nll + kl, nats per datum) on held-out training images. ivon is plain with that optimizer.

estimators: {", ".join(METHODS)}. groups has 4 groups. --train also takes ivon, ivon+groups and
so on.

  python benchmarks/estimators.py --network vgg16 --channels_last --parts variance,time --draws 6 --scales 0.0063
  python benchmarks/estimators.py --parts elbo --train plain,groups-2,local,ivon+groups --seconds 120 --markdown
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts named on the command line and print their tables."""
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


def step_seconds(images: Images, options: argparse.Namespace, variances: Variances) -> None:
    """Print the seconds of a training step, and the variances times these seconds."""
    cnn, bnn = (Training.start(images, options, deterministic=kind) for kind in (True, False))
    steps = {"cnn": cnn.step, **{name: partial(bnn.step, estimator=name) for name in METHODS}}
    batches, order = shuffled(images.inputs(), images.labels, options), random.Random(0)
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
    show(f"Seconds of a training step, medians of {rounds}", table, options)
    if variances:
        table = [["estimator", *(f"{group} {scale:g}" for scale in variances for group in GROUPS)]]
        for name in METHODS:
            products = torch.cat([values[name] for values in variances.values()]) * medians[name] / medians["plain"]
            table.append([name, *map(with_error, products)])
        show("Gradient variance x seconds of a step, plain = 1, by group and scale", table, options)


def elbo_reached(images: Images, held_out: Images, options: argparse.Namespace) -> None:
    """Print the ELBO that each estimator reaches on held-out images after the same seconds of steps."""
    trainings = {name: Training.start(images, options, ivon=name.startswith("ivon")) for name in options.train}
    inputs = images.inputs()
    batches = {name: shuffled(inputs, images.labels, options) for name in trainings}
    left, bar = dict(trainings), tqdm(total=options.seconds * len(trainings), desc="elbo", unit="s", disable=None)
    # The training furthest behind runs for a second, so that other work on the machine slows all of them alike.
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
    show(f"After {options.seconds:g} s of steps, on {len(x)} held-out images; nats per datum", table, options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=raw)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="bnn-fc", help="which network (default: bnn-fc)")
    add("--data", choices=DATASETS, help="data set (default: mnist for bnn-*, cifar10 for the others)")
    add("--data_dir", default="data", help="folder of the data sets (default: data)")
    add("--data_file", help="an .npz of CIFAR-10 JPEGs to read instead of downloading")
    add("--batch", type=int, default=128, help="images a step (default: 128)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--channels_last", action="store_true", help="use this memory layout for images and kernels")
    add("--parts", type=names, default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    add("--draws", type=int, default=24, help="variance: gradients of each estimator (default: 24)")
    add("--scales", type=numbers, default="0.002,0.02", help="variance: scales to study (default: 0.002,0.02)")
    add("--warm", type=int, default=100, help="variance: steps of plain with Adam before it is measured (default: 100)")
    add(
        "--train",
        type=names,
        default="plain,flipout,groups,local,ivon",
        help="elbo: what to train (default: plain,flipout,groups,local,ivon)",
    )
    add("--seconds", type=float, default=60, help="elbo: seconds of steps for each estimator (default: 60)")
    add("--held_out", type=int, default=1000, help="elbo: images to evaluate 10 draws on (default: 1000)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add("--ivon_lr", type=float, default=0.05, help="ivon's learning rate (default: 0.05)")
    add("--ivon_beta2", type=float, default=0.9999, help="decay of ivon's curvature (default: 0.9999)")
    add("--prior", type=parse_prior, default="normal(0, 0.316)", help="of every weight (default: normal(0, 0.316))")
    add("--init_scale", type=float, default=0.0063, help="initial scale of the guide (default: 0.0063)")
    add("--markdown", action="store_true", help="print the tables as markdown")
    options = parser.parse_args(arguments)
    options.data = options.data or ("mnist" if options.network.startswith("bnn") else "cifar10")
    options.layout = torch.channels_last if options.channels_last else torch.contiguous_format
    if unknown := (set(options.parts) - set(PARTS)) | (set(options.train) - set(TRAINABLE)):
        parser.error(f"unknown: {min(unknown)!r}; parts are {', '.join(PARTS)}; --train takes {', '.join(TRAINABLE)}")
    # Batch norm cannot train on one image of a 1x1 map, and a spread needs at least two contrasts.
    if options.batch < 2 or options.draws < 3 or min(options.threads, options.held_out) < 1:
        parser.error("--batch must be at least 2, --draws at least 3, --threads and --held_out at least 1")
    return options


def _heading(options: argparse.Namespace, images: Images) -> str:
    return (
        f"torch {torch.__version__}, threads {options.threads}, batch {options.batch}, {cpu_name()}, {images.title}, "
        f"{'channels_last' if options.channels_last else 'contiguous'}, {options.network}"
    )


if __name__ == "__main__":
    main()
