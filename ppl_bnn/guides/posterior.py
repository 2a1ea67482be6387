"""The Posterior protocol: what prediction, pruning, export and results ask of q(w), and what they may ask beside it.

`Posterior` is all that draws need. A posterior that can do more offers one of the capabilities below; whoever needs one
asks for it with `offered`, which refuses by name. One name is reserved for later: ``output_moments(x)`` (predictives
that are no draws of weights).

tests/guides/posterior_conformance.py runs any implementation through this contract.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from ppl_bnn.errors import UserError
from ppl_bnn.models.sites import latent_sites


@runtime_checkable
class Posterior(Protocol):
    """A distribution over a network's random weights whose draws have numbers."""

    @property
    def sites(self) -> Sequence[str]:
        """Names of the random weights, as the network has them (``fc1.weight``)."""
        ...

    def draw(self, index: int, *, seed: int = 0) -> Mapping[str, Tensor]:
        """Draw number `index`, {site: [*shape]}: the same for the same (seed, index), in any order, on any rank.

        It has the values of all `sites`, and of all latents of a posterior `WithLatents`, in their support.
        It has the posterior's device and dtype, and leaves torch's global generator alone. A posterior with stored
        draws may ignore `seed`.
        """
        ...


@runtime_checkable
class StoredDraws(Posterior, Protocol):
    """A posterior whose draws end: samples of MCMC, members of an ensemble."""

    @property
    def num_draws(self) -> int:
        """Number of draws; asking for more is refused."""
        ...


@runtime_checkable
class Chains(StoredDraws, Protocol):
    """Stored draws that come from several chains or members."""

    def chain(self, index: int) -> int:
        """The chain that draw number `index` belongs to, from 0."""
        ...


@runtime_checkable
class Factorized(Posterior, Protocol):
    """Independent Normal weights. A posterior with correlated weights must not offer `loc_scale`.

    Needed by the methods layerwise and moments, by signal-to-noise ratios and by pruning.
    """

    def loc_scale(self, site: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each weight of a site, [*shape]; both exactly 0 where it was pruned."""
        ...


@runtime_checkable
class Symmetric(Factorized, Protocol):
    """A factorized posterior that tells which noise a draw is made of. Needed by antithetic draws."""

    def noise(self, index: int, *, seed: int = 0) -> Iterable[tuple[str, Tensor]]:
        """The standard normal numbers of each site, in order: draw = loc + scale * noise."""
        ...


@runtime_checkable
class WithLatents(Posterior, Protocol):
    """A posterior that has other global latent sites beside the weights: a noise scale, a temperature, a hyper-prior.

    They are never pruned, and take no part in signal-to-noise ratios.
    """

    @property
    def latents(self) -> Sequence[str]:
        """Names of these sites, none of which is among `sites`; may be empty."""
        ...

    def draw_latents(self, index: int, *, seed: int = 0, sign: float = 1.0) -> Mapping[str, Tensor]:
        """The latents alone of draw number `index`, {site: [*shape]}, each in its support.

        Args:
            sign: -1 for the mirror image, which antithetic draws need. A posterior that has none refuses it.
        """
        ...


@runtime_checkable
class WithLocalLatents(Posterior, Protocol):
    """A posterior that may have latents of each example, inside the data plate, such as a VAE's encoder."""

    def draw_local(self, index: int, x: Tensor, *, seed: int = 0) -> Mapping[str, Tensor]:
        """The local latents of the examples x [n, ...] in draw number `index`, {site: [n, ...]}; may be empty.

        They belong to the same draw as `draw` with this index and seed. Their noise depends on an example's position
        in `x`: pass all examples at once, or another seed for each batch.
        """
        ...


@runtime_checkable
class WithDensity(Posterior, Protocol):
    """A posterior whose density can be computed. Needed by importance sampling (leave-one-out cross-validation)."""

    def log_prob(self, draw: Mapping[str, Tensor]) -> Tensor:
        """log q(draw) in nats, a float64 scalar: of weights and latents."""
        ...


@runtime_checkable
class Prunable(Factorized, Protocol):
    """A factorized posterior whose weights can be fixed at zero."""

    def pruned(self, keep: Mapping[str, Tensor]) -> "Prunable":
        """A copy whose weights outside `keep`, {site: bool [*shape]}, are 0 in every draw."""
        ...


Capability = TypeVar("Capability", bound=Posterior)

# What a message calls a capability: the method or attribute that a posterior lacks.
_NAMES: dict[type, str] = {
    Factorized: "loc_scale", Symmetric: "noise", WithDensity: "log_prob", Prunable: "pruned", Chains: "chain",
    WithLatents: "draw_latents", WithLocalLatents: "draw_local",
}  # fmt: skip


def offered(posterior: Posterior, capability: type[Capability], needed_by: str, instead: str) -> Capability:
    """Return the posterior as one that has the capability.

    Raises:
        UserError: it lacks the capability; the message says what needs it, and what to do instead.
    """
    if isinstance(posterior, capability):
        return posterior
    lacking = next(base for base in reversed(capability.__mro__) if base in _NAMES and not isinstance(posterior, base))
    raise UserError(
        f"{needed_by} needs a posterior with {_NAMES[lacking]}; {type(posterior).__name__} has none: {instead}"
    )


def check_num_draws(posterior: Posterior, num_samples: int) -> None:
    """Raise UserError where a posterior with stored draws has fewer than `num_samples`."""
    if isinstance(posterior, StoredDraws) and num_samples > posterior.num_draws:
        raise UserError(
            f"num_samples is {num_samples}, and {type(posterior).__name__} has {posterior.num_draws} stored draws: "
            f"take at most {posterior.num_draws}"
        )


@torch.no_grad()
def signed_draw(posterior: Posterior, index: int, *, seed: int = 0, sign: float = 1.0) -> dict[str, Tensor]:
    """Draw number `index` of weights and latents, {site: [*shape]}; with sign -1 its mirror image.

    Raises:
        UserError: a mirror image of a posterior without noise.
    """
    if sign == 1:
        return dict(posterior.draw(index, seed=seed))
    mirrored = offered(posterior, Symmetric, "a mirror image", "use sampling independent")
    noise = mirrored.noise(index, seed=seed)
    found = {site: torch.addcmul(*mirrored.loc_scale(site), sign * values) for site, values in noise}
    if isinstance(posterior, WithLatents):
        found |= posterior.draw_latents(index, seed=seed, sign=sign)
    return found


def latents_of(posterior: Posterior) -> list[str]:
    """Names of a posterior's global latents, if it has any."""
    return list(posterior.latents) if isinstance(posterior, WithLatents) else []


def median_latents(model: Callable[..., object], posterior: object, *args: object) -> dict[str, Tensor]:
    """The posterior medians of the sites that are no weights, {site: [*shape]}, each in its site's support.

    A median is halfway between a draw and its mirror image in unconstrained space. That holds for each element whose
    posterior there is symmetric, such as a Normal. A posterior without `draw_latents` has none.

    Raises:
        UserError: the posterior has such sites, and its draws have no mirror image.
    """
    if not (isinstance(posterior, WithLatents) and posterior.latents):
        return {}
    draw, image = (posterior.draw_latents(0, sign=sign) for sign in (1.0, -1.0))
    found = {}
    for name, site in latent_sites(model, *args).items():
        if name in draw:
            to_support = biject_to(site["fn"].support)
            found[name] = to_support((to_support.inv(draw[name]) + to_support.inv(image[name])) / 2)
    return found


def is_pruned(posterior: Posterior) -> bool:
    """Whether some weight is exactly 0 in every draw, as far as the posterior tells."""
    if not isinstance(posterior, Factorized):
        return False
    return any(bool(((loc == 0) & (scale == 0)).any()) for loc, scale in map(posterior.loc_scale, posterior.sites))


def parameters_of(posterior: Posterior) -> dict[str, Tensor]:
    """The posterior's parameters and buffers by name, if it is a module; otherwise none."""
    if not isinstance(posterior, nn.Module):
        return {}
    return dict([*posterior.named_parameters(), *posterior.named_buffers()])
