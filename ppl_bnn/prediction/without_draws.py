"""The predictive by moments: one pass of means and variances through the network in place of draws."""

import time

import numpy as np
import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.models.likelihoods import Categorical, Normal
from ppl_bnn.prediction.moments import moment_network, moment_predictive
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import Target, latents_of_draw

# Draws of a random noise scale, whose mean square is wanted; nodes of the average over a predicted one.
LATENT_DRAWS, NODES = 400, 16


@torch.no_grad()
def without_draws(
    target: Target, posterior: Posterior, x: Tensor, y: Tensor | None, kept: Tensor, *, seed: int
) -> Predictive:
    """The predictive of class labels, or of numbers with a Normal likelihood, by `prediction.moments`.

    Of numbers it is the Normal of the predictive's mean and variance.

    Raises:
        UserError: another likelihood, or what `moment_network` refuses.
    """
    started, likelihood = time.perf_counter(), target.likelihood
    log_likelihood = scores = None
    y = None if y is None else y.cpu()
    if isinstance(likelihood, Categorical) and likelihood.plain and target.outputs.dim() == 2:
        mean, entropy = (part.cpu().double() for part in moment_predictive(target.net, posterior, x))
        sums = {"mean": mean, "entropy": entropy}
        if y is not None:
            log_likelihood = mean.gather(1, y.unsqueeze(1)).log().T
            scores = (mean.argmax(1) == y).float().mean().unsqueeze(0)
    elif isinstance(likelihood, Normal):
        sums = _normal(target, likelihood, posterior, x, seed)
        mean, std = sums["mean"], (sums["variance"] + sums["spread"]).sqrt()
        if y is not None:
            log_likelihood = torch.distributions.Normal(mean, std).log_prob(y).reshape(len(x), -1).sum(1).unsqueeze(0)
            scores = -(mean - y).square().mean().unsqueeze(0)
    else:
        raise UserError(
            "method moments is for Normal and Categorical likelihoods, the latter without options and of one label an "
            f"example, not for this {type(likelihood).__name__}; use method draws"
        )
    seconds = time.perf_counter() - started
    # Deviations are from the mean itself: there is no draw to refer to.
    sums.setdefault("spread", torch.zeros_like(mean))
    return Predictive(
        means=mean[kept].float().unsqueeze(0),
        kept=kept,
        y=y,
        log_likelihood=None if log_likelihood is None else log_likelihood.float(),
        sums=sums,
        squares=torch.zeros_like(mean),
        reference=mean,
        draws=torch.zeros(len(x), dtype=torch.long),
        draw_scores=None if scores is None else scores.float(),
        seconds=seconds,
        method="moments",
        seed=seed,
        likelihood=likelihood,
    )


def _normal(target: Target, likelihood: Normal, posterior: Posterior, x: Tensor, seed: int) -> dict[str, Tensor]:
    """E[y], E[Var[y | weights]] and Var[E[y | weights]], exact where the outputs' moments are."""
    network = moment_network(target.net, posterior)
    both = [network(part) for part in x.split(1000)]
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
