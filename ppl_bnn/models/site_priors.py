"""The priors of a Pyro model's latent sites, given the values of their hyper-parameters."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributions import Distribution

from ppl_bnn.errors import UserError
from ppl_bnn.models.sites import given_sites


def site_priors(
    model: Callable[..., object], *args: object, given: Mapping[str, Tensor] | None = None
) -> dict[str, Distribution]:
    """The prior of each latent site of a Pyro model; `args` are what the model runs with (one example).

    Args:
        given: values of hyper-parameters by site: a draw's, or `ppl_bnn.guides.median_latents`. The priors are those
            given them.

    Raises:
        UserError: the prior of a layer's weight has a hyper-parameter that `given` lacks.
    """
    priors = {name: site["fn"] for name, site in given_sites(model, given or {}, *args).items()}
    for name, prior in priors.items():
        if absent := [other for other in getattr(prior, "given", ()) if other not in (given or {})]:
            raise UserError(
                f"the prior of {name!r} depends on the hyper-parameter {absent[0]!r}: pass its value, "
                "given=median_latents(model, posterior, x, y) or a draw of the posterior"
            )
    return priors
