"""Pruning by signal-to-noise ratio: the weights below the cut become exactly zero, loc and scale, in every draw."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.pruning.snr import snr

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Pruned:
    """A pruned posterior.

    Attributes:
        guide: draws exact zeros where weights are pruned.
        threshold: the smallest snr that was kept out of pruning's reach: weights below it are gone. With scope
            ``layer`` and a fraction, the largest of the layers' cuts.
        fraction: zeroed weights / prunable weights.
        nonzero: surviving weights of each site.
        total: prunable weights of each site.
    """

    guide: MeanFieldNormal
    threshold: float
    fraction: float
    nonzero: dict[str, int]
    total: dict[str, int]


def prune(
    guide: MeanFieldNormal, *, threshold: float | None = None, fraction: float | None = None, scope: str = "global"
) -> Pruned:
    """Set the weights with the lowest |loc| / scale to exactly zero.

    Give one of:
        threshold: prune every weight whose snr is below this; at least 0.
        fraction: prune this share of the weights, in [0, 1): exactly round(fraction * weights) of them.

    Args:
        scope: for a fraction, ``global`` ranks all weights together, ``layer`` prunes the same share of every site.

    Raises:
        ValueError: both or neither given, a value out of range, or a posterior without a defined snr.
    """
    if (threshold is None) == (fraction is None):
        raise ValueError(f"give either a threshold or a fraction, got threshold {threshold} and fraction {fraction}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    ratios = snr(guide)
    if threshold is not None:
        if not threshold >= 0 or math.isinf(threshold):
            raise ValueError(f"the pruning threshold is an snr, at least 0 and finite; got {threshold}")
        keep = {site: ratio >= threshold for site, ratio in ratios.items()}
        cut = threshold
    else:
        assert fraction is not None
        if not 0 <= fraction < 1:
            raise ValueError(f"the pruning fraction must be in [0, 1), got {fraction}")
        if scope == "layer":
            kept = {site: _keep_largest(ratio.flatten(), fraction) for site, ratio in ratios.items()}
            keep = {site: mask.view_as(ratios[site]) for site, (mask, _) in kept.items()}
            cut = max(layer_cut for _, layer_cut in kept.values())
        else:
            together, cut = _keep_largest(torch.cat([ratio.flatten() for ratio in ratios.values()]), fraction)
            parts = together.split([ratio.numel() for ratio in ratios.values()])
            keep = {site: mask.view_as(ratios[site]) for site, mask in zip(ratios, parts, strict=True)}
    nonzero = {site: int(mask.sum()) for site, mask in keep.items()}
    total = {site: mask.numel() for site, mask in keep.items()}
    return Pruned(guide.pruned(keep), cut, 1 - sum(nonzero.values()) / sum(total.values()), nonzero, total)


def _keep_largest(ratios: Tensor, fraction: float) -> tuple[Tensor, float]:
    # By rank, not by value: ties would otherwise prune more or fewer than asked for.
    count = round(fraction * len(ratios))
    order = ratios.argsort(stable=True)
    keep = torch.ones_like(ratios, dtype=torch.bool)
    keep[order[:count]] = False
    if count == 0:
        return keep, 0.0
    # A small layer can lose all its weights to rounding: the cut is then above the largest.
    largest = ratios[order[-1]]
    cut = ratios[order[count]] if count < len(ratios) else torch.nextafter(largest, largest + 1)
    return keep, float(cut)
