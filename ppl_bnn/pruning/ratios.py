"""The signal-to-noise ratio of a factorized posterior: |loc| / scale of a weight (Blundell et al. 2015, sec. 5.1)."""

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Factorized, Posterior, offered


@torch.no_grad()
def snr(guide: Posterior) -> dict[str, Tensor]:
    """|loc| / scale of every weight, {site: [*shape]}. Raises UserError as `defined_loc_scale` does."""
    return {site: loc.abs() / scale for site, (loc, scale) in defined_loc_scale(guide).items()}


def defined_loc_scale(guide: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    """loc and scale of every site, if every weight has a density.

    Raises:
        UserError: the posterior has no sites or no `loc_scale`, is already pruned, or has a loc or scale that is not
            finite.
    """
    if not guide.sites:
        raise UserError("the guide has no random weights: a deterministic network has no signal-to-noise ratio")
    factorized = offered(
        guide, Factorized, "a signal-to-noise ratio", "pruning is for posteriors of independent weights"
    )
    found = {site: factorized.loc_scale(site) for site in guide.sites}
    for site, (loc, scale) in found.items():
        if not bool(torch.isfinite(loc).all()) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise UserError(
                f"site {site!r} has a loc that is not finite or a scale that is not positive; "
                "its signal-to-noise ratio is not defined"
            )
    return found


def snr_histogram(ratios: dict[str, Tensor], *, bins: int = 70) -> tuple[Tensor, dict[str, Tensor]]:
    """Counts of log10(snr) for each site on common bins: (edges [bins + 1], {site: counts [bins]}).

    The edges run from -4 to 3; what lies outside is counted in the first and last bin.
    """
    edges = torch.linspace(-4, 3, bins + 1)
    return edges, {
        site: torch.histc(ratio.flatten().log10().clamp(-4, 3).float().cpu(), bins, -4, 3)
        for site, ratio in ratios.items()
    }
