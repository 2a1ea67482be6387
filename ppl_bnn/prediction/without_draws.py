"""The predictive by moments: one pass of means and variances through the network in place of draws."""

import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.inputs import Inputs, call, count, split
from ppl_bnn.models.likelihoods import Categorical, Normal
from ppl_bnn.prediction.chunks import Chunk
from ppl_bnn.prediction.moments import moment_network, moment_predictive
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import Target, latents_of_draw

# Draws of a random noise scale, whose mean square is wanted; nodes of the average over a predicted one.
LATENT_DRAWS, NODES = 400, 16


@torch.no_grad()
def without_draws(
    target: Target, posterior: Posterior, chunks: Iterable[tuple[Chunk, Tensor | None]], kept: Tensor, *, seed: int
) -> Predictive:
    """The predictive of class labels, or of numbers with a Normal likelihood, by `prediction.moments`.

    Of numbers it is the Normal of the predictive's mean and variance.

    Args:
        chunks: the examples, and what was observed of them [n, ...].
        kept: positions [K] of the examples whose means are kept.

    Raises:
        UserError: another likelihood, or what `moment_network` refuses.
    """
    found: dict[str, list[Tensor]] = {}
    seconds, total, score = 0.0, 0, 0.0
    for chunk, y in chunks:
        started = time.perf_counter()
        parts, own_score = _of_chunk(target, posterior, chunk.x, None if y is None else y.cpu(), seed)
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
        seconds += time.perf_counter() - started
        total, score = total + count(chunk.x), score + own_score * count(chunk.x)
    # One after the other: two of everything would take too much memory.
    sums = {name: torch.cat(found.pop(name)) for name in list(found)}
    observed, log_likelihood = sums.pop("y", None), sums.pop("log_likelihood", None)
    mean = sums["mean"]
    # Deviations are from the mean itself: there is no draw to refer to.
    sums.setdefault("spread", torch.zeros_like(mean))
    return Predictive(
        means=mean[kept].float().unsqueeze(0),
        kept=kept,
        y=observed,
        log_likelihood=None if log_likelihood is None else log_likelihood.unsqueeze(0).float(),
        sums=sums,
        squares=torch.zeros_like(mean),
        reference=mean,
        draws=torch.zeros(total, dtype=torch.long),
        draw_scores=None if observed is None else torch.tensor([score / total], dtype=torch.float32),
        seconds=seconds,
        method="moments",
        seed=seed,
        likelihood=target.likelihood,
    )


def _of_chunk(
    target: Target, posterior: Posterior, x: Inputs, y: Tensor | None, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Averages by name, y and its log likelihood, [n, ...] each, and the score; without y no more than averages."""
    likelihood = target.likelihood
    if isinstance(likelihood, Categorical) and likelihood.plain and target.outputs.dim() == 2:
        mean, entropy = (part.cpu().double() for part in moment_predictive(target.net, posterior, x))
        found = {"mean": mean, "entropy": entropy}
        if y is None:
            return found, 0.0
        own = mean.gather(1, y.unsqueeze(1)).log().squeeze(1)
        return found | {"y": y, "log_likelihood": own}, float((mean.argmax(1) == y).float().mean())
    if isinstance(likelihood, Normal):
        found = _normal(target, likelihood, posterior, x, seed)
        mean, std = found["mean"], (found["variance"] + found["spread"]).sqrt()
        if y is None:
            return found, 0.0
        own = torch.distributions.Normal(mean, std).log_prob(y).reshape(count(x), -1).sum(1)
        return found | {"y": y, "log_likelihood": own}, -float((mean - y).square().mean())
    raise UserError(
        "method moments is for Normal and Categorical likelihoods, the latter without options and of one label an "
        f"example, not for this {type(likelihood).__name__}; use method draws"
    )


def _normal(target: Target, likelihood: Normal, posterior: Posterior, x: Inputs, seed: int) -> dict[str, Tensor]:
    """E[y], E[Var[y | weights]] and Var[E[y | weights]], exact where the outputs' moments are."""
    network = moment_network(target.net, posterior)
    both = [call(network, part) for part in split(x, 1000)]
    mean, variance = (torch.cat(parts).cpu().double() for parts in zip(*both, strict=True))
    if likelihood.noise.kind == "predicted":
        loc, _ = likelihood.noise.split(mean, None)
        spread, _ = likelihood.noise.split(variance, None)
        noise = torch.zeros_like(loc)
        # Gauss-Hermite: E[f(u)] = sum_k weight_k / sqrt(pi) f(mean + sqrt(2 variance) node_k).
        for node, weight in zip(*np.polynomial.hermite.hermgauss(NODES), strict=True):
            _, scale = likelihood.noise.split(mean + (2 * variance).sqrt() * float(node), None)
            noise += float(weight) / np.pi**0.5 * scale.square()
        return {"mean": loc, "variance": noise, "spread": spread}
    draws = LATENT_DRAWS if target.latents else 1
    squares: Tensor | float = 0.0
    for index in range(draws):
        latents = latents_of_draw(likelihood, posterior, index, seed=seed) if target.latents else {}
        loc, scale = likelihood.noise.split(mean, **{"noise_scale": None, **latents})
        squares = squares + scale.square().expand(loc.shape) / draws
    spread, _ = likelihood.noise.split(variance, latents.get("noise_scale"))
    assert isinstance(squares, Tensor)
    return {"mean": loc, "variance": squares, "spread": spread}
