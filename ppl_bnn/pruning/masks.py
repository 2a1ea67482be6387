"""Pruning: the weights worth least become exactly zero, loc and scale, in every draw."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior, Prunable, offered
from ppl_bnn.models.priors import unused_pattern
from ppl_bnn.pruning.criteria import Priors, by_group, scores

SCOPES = ("global", "layer")

Threshold = float | Mapping[str, float]


@dataclass(frozen=True)
class Pruned:
    """A pruned posterior.

    Attributes:
        guide: the posterior, of the class it had; it draws exact zeros where weights are pruned.
        threshold: the smallest score that was kept out of pruning's reach: weights below it are gone. Where layers
            have cuts of their own, the largest of them.
        fraction: zeroed weights / all random weights.
        nonzero: surviving weights of each site.
        total: weights of each site.
    """

    guide: Any
    threshold: float
    fraction: float
    nonzero: dict[str, int]
    total: dict[str, int]


def prune(
    guide: Posterior,
    *,
    threshold: Threshold | None = None,
    fraction: float | None = None,
    scope: str = "global",
    criterion: str = "snr",
    structure: str = "weights",
    priors: Priors | None = None,
) -> Pruned:
    """Set the weights with the lowest scores to exactly zero.

    Give one of:
        threshold: prune every weight whose score is below this (snr and kl: at least 0); or a mapping from patterns
            of site names to a threshold each.
        fraction: prune this share of the weights, in [0, 1): exactly round(fraction * weights) of them, and of groups
            as many as do not exceed that.

    Args:
        scope: for a fraction, ``global`` ranks all weights together, ``layer`` prunes the same share of every site.
        criterion: ``snr``, ``kl`` or ``evidence`` (`ppl_bnn.pruning.criteria`).
        structure: ``weights``, or whole ``units`` or ``inputs``, by their mean score. A fraction is then one of the
            sites that have such groups.
        priors: of each site (`ppl_bnn.models.site_priors`); ``snr`` does without.

    Raises:
        UserError: both or neither given, a value out of range, or a posterior without defined scores or without
            `pruned`.
    """
    prunable = offered(guide, Prunable, "pruning", "it is for posteriors whose weights can be fixed at zero")
    if (threshold is None) == (fraction is None):
        raise UserError(f"give either a threshold or a fraction, got threshold {threshold} and fraction {fraction}")
    if scope not in SCOPES:
        raise UserError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
    if threshold is not None:
        check_threshold(threshold, criterion)
        if isinstance(threshold, Mapping):
            check_patterns(threshold, guide.sites)
    elif not 0 <= fraction < 1:  # type: ignore[operator]
        raise UserError(f"the pruning fraction must be in [0, 1), got {fraction}")
    weight_scores = scores(guide, criterion, priors)
    groups = by_group(weight_scores, structure)
    if threshold is not None:
        cuts = {site: _of_site(threshold, site) for site in groups}
        kept = {site: score >= cuts[site] for site, score in groups.items()}
        cut = max(cuts.values())
    else:
        assert fraction is not None
        kept, cut = {}, -math.inf
        for together in [[site] for site in groups] if scope == "layer" else [list(groups)]:
            sizes = [weight_scores[site].numel() // groups[site].numel() for site in together]
            masks, own_cut = _keep_largest([groups[site] for site in together], sizes, fraction)
            kept |= dict(zip(together, masks, strict=True))
            cut = max(cut, own_cut)
    # Contiguous: an expanded mask shares memory among its weights, and could not be written to.
    keep = {
        site: kept[site].expand_as(score).contiguous() if site in kept else torch.ones_like(score, dtype=torch.bool)
        for site, score in weight_scores.items()
    }
    nonzero = {site: int(mask.sum()) for site, mask in keep.items()}
    total = {site: mask.numel() for site, mask in keep.items()}
    return Pruned(prunable.pruned(keep), cut, 1 - sum(nonzero.values()) / sum(total.values()), nonzero, total)


def check_threshold(threshold: Threshold, criterion: str) -> None:
    """Raise UserError for a threshold that the criterion's scores cannot have."""
    for value in threshold.values() if isinstance(threshold, Mapping) else (threshold,):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise UserError(
                f"a threshold must be a number, or a mapping of site patterns to numbers; got {value!r}"
            ) from None
        if not math.isfinite(value) or (value < 0 and criterion != "evidence"):
            least = "finite" if criterion == "evidence" else "at least 0 and finite"
            raise UserError(f"pruning.threshold must be {least}; got {value} (criterion {criterion})")


def check_patterns(threshold: Mapping[str, float], sites: Collection[str]) -> None:
    """Raise UserError for a site without a threshold, or a pattern that is of no site."""
    for site in sites:
        if not any(fnmatchcase(site, pattern) for pattern in threshold):
            raise UserError(
                f"pruning.threshold has none for {site!r}: it matches none of {sorted(threshold)}; add '*' for all the "
                "rest"
            )
    if (pattern := unused_pattern(threshold, sites)) is not None:
        raise UserError(f"pruning.threshold has {pattern!r}, which is none of the sites {', '.join(sites)}")


def _of_site(threshold: Threshold, site: str) -> float:
    if not isinstance(threshold, Mapping):
        return threshold
    return next(value for pattern, value in threshold.items() if fnmatchcase(site, pattern))


def _keep_largest(group_scores: list[Tensor], sizes: list[int], fraction: float) -> tuple[list[Tensor], float]:
    # By rank, not by value: ties would otherwise prune more or fewer than asked for.
    together = torch.cat([score.flatten() for score in group_scores])
    counts = torch.tensor([score.numel() for score in group_scores])
    weights = torch.tensor(sizes).repeat_interleave(counts).to(together.device)
    order = together.argsort(stable=True)
    count = int((weights[order].cumsum(0) <= round(fraction * int(weights.sum()))).sum())
    keep = torch.ones_like(together, dtype=torch.bool)
    keep[order[:count]] = False
    parts = keep.split(counts.tolist())
    masks = [part.view_as(score) for part, score in zip(parts, group_scores, strict=True)]
    if count == 0:
        return masks, float(together.min().clamp_max(0))
    # A small layer can lose all its weights to rounding: the cut is then above the largest.
    largest = together[order[-1]]
    cut = together[order[count]] if count < len(together) else torch.nextafter(largest, largest + 1)
    return masks, float(cut)
