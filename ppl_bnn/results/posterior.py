"""The posterior behind a predictive as a small group of ArviZ's schema: norms of the weights, and all other latents."""

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from ppl_bnn.guides.posterior import Posterior, latents_of, signed_draw
from ppl_bnn.prediction.result import Predictive
from ppl_bnn.prediction.running import drawn_latents, of_number
from ppl_bnn.results.idata import dataset

# Scales of a horseshoe are as many as the weights.
_LARGEST = 1000


def posterior_group(
    predictive: Predictive, guide: Posterior, kl: Mapping[str, float], *, norms: bool = True
) -> xr.Dataset | None:
    """`posterior` [chain, draw, ...] of the draws that `predictive` was made of; None where there is nothing to tell.

    norm_<site> is the Euclidean norm of each draw's weights at a site. Each latent that is no weight (a noise scale, a
    hyper-prior) has its own name; one of more than 1000 numbers has its norm alone. The KL of a site, in nats, is the
    attribute ``kl`` of its variable.

    The draws are those of (`predictive.seed`, index). With the method layerwise, which draws outputs of layers, they
    are whole draws of the same posterior. The method moments has none.
    """
    if predictive.method == "moments":
        return None
    latents = bool(latents_of(guide))
    if not latents and not (norms and guide.sites):
        return None
    found: dict[str, list[Tensor]] = {}
    for index in range(predictive.num_samples):
        at, sign = of_number(index, predictive.sampling)
        # A draw of the latents alone is cheap.
        draw = signed_draw(guide, at, seed=predictive.seed, sign=sign) if norms else {}
        for site in guide.sites if norms else ():
            found.setdefault(f"norm_{site}", []).append(_norm(draw[site]))
        for site, value in (drawn_latents(guide, at, sign, seed=predictive.seed) if latents else {}).items():
            large = value.numel() > _LARGEST
            found.setdefault(f"norm_{site}" if large else site, []).append(_norm(value) if large else value)
    variables: dict[str, Any] = {}
    for name, values in found.items():
        drawn = torch.stack(values)[None].detach()
        # A file has no variables with a slash in their names; Pyro's scopes have.
        variables[_file_name(name)] = (("chain", "draw", *_dims(name, drawn.dim() - 2)), drawn)
    made = dataset(variables)
    for site, nats in kl.items():
        for name in {_file_name(f"norm_{site}"), _file_name(site)} & set(made.data_vars):
            made[name].attrs["kl"] = float(nats)
    return made


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def _file_name(site: str) -> str:
    return site.replace("/", ".")


def _dims(name: str, count: int) -> list[str]:
    return [f"{_file_name(name)}_dim_{at}" for at in range(count)]
