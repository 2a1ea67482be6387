"""What each weight is worth: the scores by which pruning ranks weights, the least first."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.models.cross_entropy import kl_by_weight
from ppl_bnn.models.priors import elementwise
from ppl_bnn.pruning.ratios import defined_loc_scale, snr
from ppl_bnn.registry import lookup

Priors = Mapping[str, Distribution]

STRUCTURES = ("weights", "units", "inputs")


def scores(guide: Posterior, criterion: str = "snr", priors: Priors | None = None) -> dict[str, Tensor]:
    """The score of every weight, {site: [*shape]}, by a criterion of `CRITERIA` or an import path.

    Args:
        priors: of each site (`ppl_bnn.models.site_priors`); ``snr`` does without.

    Raises:
        UserError: an unknown criterion, priors that it needs and lacks, or a posterior that is pruned, damaged or
            without `loc_scale`.
    """
    score = lookup(CRITERIA, criterion, what="criterion")
    if criterion != "snr" and (absent := [site for site in guide.sites if site not in (priors or {})]):
        raise UserError(f"the criterion {criterion} needs the prior of {absent[0]!r}: pass site_priors(model, x, y)")
    return score(guide, priors or {})


@torch.no_grad()
def kl(guide: Posterior, priors: Priors) -> dict[str, Tensor]:
    """Each weight's part of KL(q || p), nats: what the data made the posterior pay for it.

    By a formula, or by quadrature where there is none: see `kl_by_weight`.
    """
    return {site: kl_by_weight(*pair, priors[site]) for site, pair in defined_loc_scale(guide).items()}


@torch.no_grad()
def evidence(guide: Posterior, priors: Priors) -> dict[str, Tensor]:
    """What fixing each weight at zero takes off the log evidence, nats: log p(0) - log q(0).

    Bayesian model reduction: when a prior p becomes p', the evidence changes by log E_q[p'(w) / p(w)] (Friston et al.
    2018, eq. 7; Beckers et al. 2022, section 3). For p' a point mass at 0 that is log q(0) / p(0), the Savage-Dickey
    ratio, for any prior with a density there. With q = Normal(loc, scale) and p = Normal(0, s) the score is
    snr^2 / 2 - log(s / scale). A negative score says that the model without the weight has the higher evidence.

    It is exact where q is the posterior. Of a posterior trained at kl_weight b, b times the score is in nats of the
    likelihood.
    """
    found = {}
    for site, (loc, scale) in defined_loc_scale(guide).items():
        at_zero = elementwise(priors[site]).log_prob(torch.zeros_like(loc))
        found[site] = at_zero + 0.5 * (loc / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)
    return found


def by_group(weight_scores: Mapping[str, Tensor], structure: str) -> dict[str, Tensor]:
    """The mean score of each group of weights that go together; it broadcasts to the site's shape.

    * ``weights``: each alone, [*shape].
    * ``units``: the weights into a unit or filter, [out, 1, ...]. The last layer's units are the classes: it is left
      out.
    * ``inputs``: the weights out of an input, [1, in, 1, ...]: pixels in the first layer, units and channels in the
      others.

    Vectors (random biases) are left out of the last two. The evidence is a sum over weights, so the sign of a group's
    mean says whether all of it may go.

    Raises:
        UserError: an unknown structure, or no site that has such groups.
    """
    if structure not in STRUCTURES:
        raise UserError(f"structure must be one of {', '.join(STRUCTURES)}; got {structure!r}")
    if structure == "weights":
        return dict(weight_scores)
    sites = [site for site, score in weight_scores.items() if score.dim() > 1]
    if structure == "units":
        sites = sites[:-1]
    if not sites:
        raise UserError(f"no layer has {structure} to prune; use structure weights")
    kept_dim = 0 if structure == "units" else 1
    return {
        site: weight_scores[site].mean([d for d in range(weight_scores[site].dim()) if d != kept_dim], keepdim=True)
        for site in sites
    }


CRITERIA: dict[str, Callable[[Posterior, Priors], dict[str, Tensor]]] = {
    "snr": lambda guide, _: snr(guide),
    "kl": kl,
    "evidence": evidence,
}
