"""The priors of a Pyro model's latent sites, given the values of their hyper-parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, biject_to

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.sites import latent_sites


def site_priors(
    model: Callable[..., object], *args: object, given: Mapping[str, Tensor] | None = None
) -> dict[str, Distribution]:
    """The prior of each latent site of a Pyro model; `args` are what the model runs with (one example).

    Args:
        given: values of hyper-parameters by site: a draw's, or `median_latents`. The priors are those given them.

    Raises:
        UserError: the prior of a layer's weight has a hyper-parameter that `given` lacks.
    """

    def conditioned(*args: object) -> None:
        with _Given(given or {}):
            model(*args)

    with evaluating(model):
        priors = {name: site["fn"] for name, site in latent_sites(conditioned, *args).items()}
    for name, prior in priors.items():
        if absent := [other for other in getattr(prior, "given", ()) if other not in (given or {})]:
            raise UserError(
                f"the prior of {name!r} depends on the hyper-parameter {absent[0]!r}: pass its value, "
                "given=median_latents(model, posterior, x, y) or a draw of the posterior"
            )
    return priors


class _Given(Messenger):
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]].to(msg["value"])


class _Mirrored(Protocol):
    @property
    def latents(self) -> Iterable[str]: ...

    def draw_latents(self, index: int, *, seed: int = 0, sign: float = 1.0) -> Mapping[str, Tensor]: ...


def median_latents(model: Callable[..., object], posterior: object, *args: object) -> dict[str, Tensor]:
    """The posterior medians of the sites that are no weights, {site: [*shape]}, each in its site's support.

    A median is halfway between a draw and its mirror image in unconstrained space. That holds for each element whose
    posterior there is symmetric, such as a Normal. A posterior without `draw_latents` has none.

    Raises:
        UserError: the posterior has such sites, and its draws have no mirror image.
    """
    if not (hasattr(posterior, "draw_latents") and posterior.latents):  # type: ignore[attr-defined]
        return {}
    with_latents: _Mirrored = posterior  # type: ignore[assignment]
    draw, image = (with_latents.draw_latents(0, sign=sign) for sign in (1.0, -1.0))
    found = {}
    for name, site in latent_sites(model, *args).items():
        if name in draw:
            to_support = biject_to(site["fn"].support)
            found[name] = to_support((to_support.inv(draw[name]) + to_support.inv(image[name])) / 2)
    return found
