"""Measures the variance of each estimator's gradient, and whether their means agree."""

import argparse
from itertools import islice

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from estimator_steps import METHODS, Batches, Training, show, shuffled, with_error
from ppl_bnn import Images
from ppl_bnn.guides.normal import inverse_scale

# {scale: {estimator: [3, 2]}}: for each group, the variance relative to plain and its standard error.
Variances = dict[float, dict[str, Tensor]]

GROUPS = ("loc", "unconstrained_scale", "point")
ANY_BATCH = "any batch"


def variance(images: Images, options: argparse.Namespace) -> Variances:
    """Print the gradients' variances and whether their means agree; return the variances."""
    training, batches, found = Training.start(images, options), shuffled(images.inputs(), images.labels, options), {}
    for _ in tqdm(range(options.warm), desc="warm", unit="step", disable=None):
        training.step(*next(batches))
    training.elbo.kl_weight = 0.0
    norms = [module for module in training.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        # The running statistics do not change. In training mode no gradient depends on them.
        norm.momentum = 0.0
    # One batch in a new random order each time, because in training chance decides which images share a group.
    sources = {**dict.fromkeys(METHODS, shuffled(*next(batches), options)), ANY_BATCH: batches}
    bar = tqdm(total=len(options.scales) * len(sources) * options.draws, desc="variance", unit="draw", disable=None)
    for scale in options.scales:
        for value in training.guide.unconstrained_scale.parameters():
            nn.init.constant_(value, float(inverse_scale(torch.tensor(scale))))
        moments = {name: moments(training, name, islice(sources[name], options.draws), bar) for name in sources}
        plain, base = moments["plain"]
        found[scale] = {name: _relative(squares, base) for name, (_, squares) in moments.items()}
        table = [["estimator", *GROUPS, *(f"mean of {group}" for group in GROUPS)]]
        for name, (mean, squares) in moments.items():
            own = name in ("plain", ANY_BATCH)
            table.append([name, *map(with_error, found[scale][name])])
            table[-1] += ["-"] * 3 if own else _mean_differences(mean, squares, plain, base)
        show(f"Gradient variance at scale {scale:g}, plain = 1; means against plain's, chance = 1", table, options)
        for what, values in (("traces", base.mean(0)), ("mean gradient's squared norms", _squares(plain))):
            print(f"plain's {what}:", ", ".join(f"{g} {float(v):.3g}" for g, v in zip(GROUPS, values, strict=True)))
        if norms:
            print("batch norm: the objective depends on how the noise is shared in the batch, so means may differ")
    bar.close()
    return found


def moments(training: Training, name: str, batches: Batches, bar: tqdm) -> tuple[list[Tensor], Tensor]:
    """Return the mean gradient, one vector a group, and [n - 1, 3] estimates of the trace of the covariance, by group.

    Welford's contrasts sqrt(k / (k + 1)) (g - mean of the k before) are uncorrelated, and each has the covariance of g.
    The mean of their squared norms is the unbiased sample variance. Their spread gives its standard error.
    """
    parts = (training.guide.loc, training.guide.unconstrained_scale, training.model)
    groups = [[value for value in part.parameters() if value.requires_grad] for part in parts]
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
    # The first draw has no draw before it to differ from.
    return mean, torch.stack(squares[1:])


def _relative(squares: Tensor, base: Tensor) -> Tensor:
    ratio = squares.mean(0) / base.mean(0)
    # The ratio of plain is 1 by definition. Its error says how well plain's variance is known.
    parts = (squares,) if squares is base else (squares, base)
    errors = sum((part.std(0) / part.mean(0)).square() / len(part) for part in parts)
    return torch.stack([ratio, ratio * errors.sqrt()], 1)


def _mean_differences(mean: list[Tensor], squares: Tensor, plain: list[Tensor], base: Tensor) -> list[str]:
    found, draws = _squares([a - b for a, b in zip(mean, plain, strict=True)]), len(base) + 1
    chance = (squares.mean(0) + base.mean(0)) / draws
    # Upper bound, by Cauchy-Schwarz, for a difference due to chance. Its expectation is itself an estimate.
    error = (squares.std(0) + base.std(0)) / draws * (1 + 1 / len(base)) ** 0.5
    above = (found - chance) / error
    return [f"{float(r):.2f} ({float(z):+.1f})" for r, z in zip((found / chance).sqrt(), above, strict=True)]


def _squares(vectors: list[Tensor]) -> Tensor:
    return torch.stack([vector.norm().double().square() for vector in vectors])
