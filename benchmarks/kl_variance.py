"""Compares the KL to a heavy-tailed prior from one draw with its expectation: the gradient's variance, and seconds."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from tqdm import tqdm

from estimator_steps import METHODS, Training, show, shuffled
from gradient_variance import moments
from ppl_bnn import load
from ppl_bnn.guides.normal import FactorizedNormal
from ppl_bnn.models import parse_prior, site_priors
from ppl_bnn.models.networks import NETWORKS
from report import cpu_name
from turns import in_turns, ratios

_HELP = """
The defaults are the recipe of runs/mnist-fc after one epoch. A variance is the trace of the covariance of the gradient
of the loss (nats per datum) over draws, on one batch. "one draw" is the objective with -H(q) - log p(w), w being drawn
anew. "expected" is the objective with the KL that training has. The last columns are relative to "one draw".

  python benchmarks/kl_variance.py --data_dir data --prior "scale_mixture(0.5, 1, 0.0025)" --markdown
"""


def main(arguments: list[str] | None = None) -> None:
    """Train for a while, then print the variances and the seconds."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    images, _ = load(options.data, options.data_dir)
    options.batch = min(options.batch, len(images))
    training = Training.start(images, options)
    batches = shuffled(images.inputs(), images.labels, options)
    for _ in tqdm(range(options.warm), desc="warm", unit="step", disable=None):
        training.step(*next(batches), options.estimators[0])
    batch = next(batches)
    priors = site_priors(training.model, *(part[:1] for part in batch))
    print(
        f"torch {torch.__version__}, threads {options.threads}, batch {options.batch}, {cpu_name()}, {images.title}, "
        f"{options.network}, {options.warm} steps of {options.estimators[0]}"
    )
    variances(training, priors, batch, options)
    seconds(training, priors, options)


def variances(
    training: Training, priors: Mapping[str, Distribution], batch: tuple[Tensor, Tensor], options: argparse.Namespace
) -> None:
    """Print the gradient's variance over draws, of the objective and of its parts."""
    table = [["estimator", "objective", "loc", "unconstrained scale", "loc / one draw", "scale / one draw"]]
    training.elbo.kl_weight = 0.0
    bar = tqdm(total=5 * len(options.estimators) * options.draws, desc="variance", unit="draw", disable=None)
    for estimator in options.estimators:
        found = {}
        for name, kl in {"one draw": from_one_draw, "expected": kl_divergence, "no KL": None}.items():
            for likelihood in (True, False) if kl else (True,):
                loss = partial(_loss, training, priors, kl, likelihood)
                changed = replace(training, elbo=SimpleNamespace(differentiable_loss=loss))
                traces = moments(changed, estimator, repeat(batch, options.draws), bar)[1].mean(0)[:2]
                found[name if likelihood else f"KL alone, {name}"] = traces
        for name, traces in found.items():
            shares = traces / found["one draw"]
            table.append([estimator, name, *(f"{float(v):.4g}" for v in traces), *(f"{float(v):.3g}" for v in shares)])
    bar.close()
    show(f"Variance of the gradient on one batch, {options.draws} draws", table, options)


def seconds(training: Training, priors: Mapping[str, Distribution], options: argparse.Namespace) -> None:
    """Print the seconds of the KL of all sites with its gradient."""
    ways = {"one draw": from_one_draw, "expected": kl_divergence}
    contenders = {name: partial(_evaluate, training, priors, kl) for name, kl in ways.items()}
    in_turns(contenders, 2)
    found = in_turns(contenders, options.rounds)
    table = [["KL", "least seconds", "/ one draw", "quartiles"]]
    for name, times in found.items():
        table.append([name, f"{min(times):.5f}", *ratios(times, found["one draw"])])
    show(f"Seconds of the KL and its gradient, {options.rounds} rounds", table, options)


def from_one_draw(q: FactorizedNormal, prior: Distribution) -> Tensor:
    """The estimate -H(q) - log p(w) of KL(q || prior), with w ~ q."""
    return -q.entropy() - prior.log_prob(q.rsample()).sum()


def _loss(
    training: Training, priors: Mapping[str, Distribution], kl: Callable | None, likelihood: bool, *arguments: object
) -> Tensor:
    # The ELBO's KL weight is 0: the gradient of its KL is 0, and one number less is no difference to a variance.
    loss = training.elbo.differentiable_loss(*arguments) * float(likelihood)  # type: ignore[arg-type]
    return loss if kl is None else loss + _sum_of(training, priors, kl) / training.elbo.num_data


def _sum_of(training: Training, priors: Mapping[str, Distribution], kl: Callable) -> Tensor:
    return torch.stack([kl(training.guide.distribution(site), prior) for site, prior in priors.items()]).sum()


def _evaluate(training: Training, priors: Mapping[str, Distribution], kl: Callable) -> None:
    torch.autograd.grad(_sum_of(training, priors, kl), [*training.guide.parameters()])


def _options(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=raw)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="bnn-fc", help="which network (default: bnn-fc)")
    add("--data", default="mnist", help="data set of images, or the import path of one (default: mnist)")
    add("--data_dir", default="data", help="folder of the data sets (default: data)")
    add("--batch", type=int, default=100, help="images a step (default: 100)")
    add("--threads", type=int, default=1, help="torch's CPU threads (default: 1)")
    add("--prior", type=parse_prior, default="student_t(1, 0, 0.01)", help="default: student_t(1, 0, 0.01)")
    add("--init_scale", type=float, default=0.0067, help="initial scale of the guide (default: 0.0067)")
    add("--lr", type=float, default=2.5e-3, help="Adam's learning rate (default: 0.0025)")
    add("--warm", type=int, default=600, help="steps before it is measured (default: 600, an epoch of MNIST)")
    add("--draws", type=int, default=50, help="gradients of each objective (default: 50)")
    add("--rounds", type=int, default=50, help="evaluations that are timed (default: 50)")
    add(
        "--estimators", type=lambda text: text.split(","), default="local,plain",
        help="comma-separated; the first one trains (default: local,plain)",
    )  # fmt: skip
    add("--markdown", action="store_true", help="print the tables as markdown")
    options = parser.parse_args(arguments)
    if unknown := set(options.estimators) - set(METHODS):
        parser.error(f"unknown estimator {min(unknown)!r}; there are {', '.join(METHODS)}")
    if min(options.draws, options.rounds) < 2:
        parser.error("--draws and --rounds must be at least 2")
    # Of `Training` and `shuffled`.
    options.layout, options.ivon_lr, options.ivon_beta2 = torch.contiguous_format, 0.05, 0.9999
    return options


if __name__ == "__main__":
    main()
