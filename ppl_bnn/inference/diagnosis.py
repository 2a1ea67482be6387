"""Is it Bayesian yet? Measures how far each layer's posterior has moved from the start of its training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.guides.posterior import median_latents
from ppl_bnn.models.cross_entropy import kl_by_weight
from ppl_bnn.models.priors import elementwise
from ppl_bnn.models.site_priors import site_priors

# AT_PRIOR: a weight is at its prior if its KL is within this many nats of the least that a Normal can have.
# MOVED: a layer has moved if the median |log(scale / initial scale)| is at least this.
AT_PRIOR, MOVED = 0.05, 0.25
# A weight is nearly deterministic if its scale is below this share of the layer's root mean square loc.
QUIET = 0.01


@dataclass(frozen=True)
class LayerPosterior:
    """Diagnosis of one site of the guide.

    Attributes:
        site, weights: name and number of weights.
        scale, initial_scale: geometric means over the weights.
        scale_moved: median over the weights of |log(scale / initial scale)|; 0.1 is ten per cent.
        kl, initial_kl: KL(q || p), nats a weight.
        snr: 5%, 50% and 95% quantile of |loc| / scale.
        at_prior: share of the weights whose KL is within 0.05 nats of the least that a Normal can have with that prior.
            The least is 0 for a Normal prior. It is taken as 0 where each weight has a prior of its own.
        nearly_deterministic: share of the weights with a scale below 1% of the layer's root mean square loc.
    """

    site: str
    weights: int
    scale: float
    initial_scale: float
    scale_moved: float
    kl: float
    initial_kl: float
    snr: tuple[float, float, float]
    at_prior: float
    nearly_deterministic: float


def layer_posteriors(
    model: Callable, guide: MeanFieldNormal, initial: MeanFieldNormal, *args: object
) -> list[LayerPosterior]:
    """Compare `guide` with `initial`, the same guide before training. `args` are the arguments of the model.

    The KL of each weight is exact for a Normal prior. For any other prior it is a 16-point Gauss-Hermite quadrature. A
    hierarchical prior is the one given the posterior medians of its hyper-parameters.
    """
    priors = site_priors(model, *args, given=median_latents(model, guide, *args))
    with torch.no_grad():
        return [_layer(site, guide, initial, priors[site]) for site in guide.sites]


def verdict(layers: Sequence[LayerPosterior]) -> str:
    """Sum up the table in a sentence or two."""
    still = [layer for layer in layers if layer.scale_moved < MOVED]
    weights = sum(layer.weights for layer in layers)
    quiet = sum(layer.weights * layer.nearly_deterministic for layer in layers) / weights
    at_prior = sum(layer.weights * layer.at_prior for layer in layers) / weights
    if len(still) == len(layers):
        parts = [
            "The posterior has not moved: in every layer the typical scale is within "
            f"{math.expm1(MOVED):.0%} of where it started. Its uncertainty is its initialization's, not the data's"
        ]
    elif still:
        names = ", ".join(layer.site for layer in still)
        parts = [f"The posterior has moved, but not in {names}: the scale there is its initialization's"]
    else:
        parts = ["The posterior has moved in every layer"]
    if quiet > 0.5:
        parts.append(
            f"{100 * quiet:.1f}% of the weights carry noise below {100 * QUIET:.0f}% of their layer's typical weight: "
            "the network is nearly deterministic"
        )
    if at_prior > 0.5:
        parts.append(f"{100 * at_prior:.1f}% of the weights are at their prior: the data did not ask for them")
    return ". ".join(parts) + "."


def render_diagnosis(layers: Sequence[LayerPosterior]) -> str:
    """The table as text, the verdict under it."""
    header = (
        "site", "weights", "scale", "at start", "moved by", "KL a weight", "at start", "SNR 5%", "50%", "95%",
        "at prior", "nearly det.",
    )  # fmt: skip
    rows = [
        (
            layer.site, f"{layer.weights:,}", f"{layer.scale:.3g}", f"{layer.initial_scale:.3g}",
            f"{math.expm1(layer.scale_moved):.1%}", f"{layer.kl:.3f}", f"{layer.initial_kl:.3f}",
            *(f"{quantile:.3g}" for quantile in layer.snr), f"{layer.at_prior:.1%}",
            f"{layer.nearly_deterministic:.1%}",
        )
        for layer in layers
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", verdict(layers)])


def _layer(
    site: str, guide: MeanFieldNormal, initial: MeanFieldNormal, prior: torch.distributions.Distribution
) -> LayerPosterior:
    loc, scale = guide.loc_scale(site)
    _, initial_scale = initial.loc_scale(site)
    kl, initial_kl = (kl_by_weight(*each.loc_scale(site), prior) for each in (guide, initial))
    ratio = (loc.abs() / scale).flatten().cpu().numpy()
    low, middle, high = (float(value) for value in np.quantile(ratio, (0.05, 0.5, 0.95)))
    return LayerPosterior(
        site=site,
        weights=loc.numel(),
        scale=float(scale.log().mean().exp()),
        initial_scale=float(initial_scale.log().mean().exp()),
        scale_moved=float((scale / initial_scale).log().abs().median()),
        kl=float(kl.mean()),
        initial_kl=float(initial_kl.mean()),
        snr=(low, middle, high),
        at_prior=float((kl < _least_kl(prior) + AT_PRIOR).float().mean()),
        nearly_deterministic=float((scale < QUIET * loc.square().mean().sqrt()).float().mean()),
    )


def _least_kl(prior: torch.distributions.Distribution) -> float:
    base = elementwise(prior)
    if base.batch_shape.numel() > 1 or isinstance(base, torch.distributions.Normal):
        return 0.0
    scales = torch.logspace(-6, 4, 500, device=base.sample().device)
    loc = torch.as_tensor(getattr(base, "loc", 0.0)).to(scales)
    return float(kl_by_weight(loc.expand_as(scales), scales, prior).min())
