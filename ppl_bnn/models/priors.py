"""Priors over network weights: what they may be, how they are written, how they meet a site.

A prior is given in one of three forms, from the shortest to the fullest:

* one distribution for every weight: ``Normal(0, 1)``;
* a mapping from site-name patterns to distributions or functions: ``{"fc1.*": Normal(0, 0.05), "*": Normal(0, 1)}``
  (the first pattern that matches wins; what none matches, or one with the value None, stays a point estimate);
* a function of (site name, shape) that returns a distribution, such as those of `ppl_bnn.models.named_priors`.

A prior may have parameters of its own, learnt or with a hyper-prior: see `ppl_bnn.models.evaluated_priors`.
"""

import copy
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeAlias, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistribution, TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import Normal, constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from ppl_bnn.errors import UserError
from ppl_bnn.models.sites import element_support

SitePrior: TypeAlias = TorchDistributionMixin | Callable[[str, Size], Any]
Prior: TypeAlias = SitePrior | Mapping[str, SitePrior | None]


class EvaluatedPrior(ABC):
    """The prior of a random parameter that each forward pass computes anew.

    Attributes:
        event_shape: the parameter's shape.
        latents: {name: shape} of the sites of its hyper-parameters.
        text: the prior in words; equal texts are equal priors, whatever they have learnt.
    """

    event_shape: Size
    latents: Mapping[str, Size]
    text: str

    @abstractmethod
    def __call__(self, net: Any) -> TorchDistribution:
        """The distribution in this forward pass of `net`. Its attribute `given` names the hyper-parameters, if any."""


def prior_named(prior: Prior, site: str) -> SitePrior:
    """What a prior in any of its forms says of one site.

    Raises:
        UserError: no pattern of a mapping matches the site.
    """
    if not isinstance(prior, Mapping):
        return prior
    matches = [value for pattern, value in prior.items() if fnmatchcase(site, pattern)]
    if not matches:
        raise UserError(
            f"no prior for site {site!r}: its name matches none of the patterns {sorted(prior)}; "
            "add a pattern for it, or '*' for all the rest"
        )
    return matches[0]


def fitted(found: object, site: str, shape: Size, *, batch: Size = Size()) -> TorchDistribution:  # noqa: B008
    """Return a site's prior with `shape` as its event shape, nothing left to broadcast.

    Args:
        batch: shape of the batch, if the prior has one: hyper-parameters of many draws at once.

    Raises:
        UserError: it is no distribution; it does not broadcast to `shape`; or its support leaves out some real numbers,
            which a Normal guide would visit.
    """
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(f"the prior of site {site!r} must be a Pyro distribution, got {type(found).__name__}")
    events = found.event_dim
    try:
        # Broadcast, not expanded: a scalar prior's constants (a log-gamma, say) are then computed once, not per weight.
        base = _Broadcast(found, found.batch_shape).expand(batch + shape[: len(shape) - events])
    except ValueError:
        base = None
    if base is None or (*base.batch_shape, *base.event_shape) != (*batch, *shape):
        raise UserError(
            f"the prior of site {site!r} has shape {list(found.shape())}, which does not fit {list(shape)}: "
            "give a scalar distribution or one of the weight's shape"
        )
    support = element_support(base)
    if support is not constraints.real:
        raise UserError(
            f"the prior of site {site!r} is {type(found).__name__}, whose support is {support}; "
            "the Normal guide needs a prior over all real numbers"
        )
    return base.to_event(len(shape) - events)


class _Broadcast(ExpandedDistribution):
    """A distribution repeated to a batch shape, which Pyro's own `expand` would change in place."""

    def expand(self, batch_shape: Size, _instance: None = None) -> "_Broadcast":
        new = copy.copy(self)
        ExpandedDistribution.expand(new, batch_shape)
        return new


def check_patterns_used(prior: Prior, sites: list[str]) -> None:
    """Raise UserError for a pattern of a mapping prior, without the value None, that no site matches."""
    asked = [pattern for pattern, value in prior.items() if value is not None] if isinstance(prior, Mapping) else []
    if (pattern := unused_pattern(asked, sites)) is not None:
        raise UserError(f"the prior's pattern {pattern!r} matches no site; the sites are {sites}")


def unused_pattern(patterns: Iterable[str], sites: Collection[str]) -> str | None:
    """The first of some patterns of site names that no site matches, or None."""
    return next((one for one in patterns if not any(fnmatchcase(site, one) for site in sites)), None)


class GaussianScaleMixture(TorchDistribution):
    """Scale mixture of two zero-mean Gaussians (Blundell et al. 2015, eq. 7).

    p(w) = weight Normal(w | 0, scale1) + (1 - weight) Normal(w | 0, scale2).

    Args:
        weight: probability of the first component, in (0, 1).
        scale1, scale2: standard deviations, positive; the usual choice is scale1 > scale2.

    The arguments broadcast together to the batch shape. `ppl_bnn.models.cross_entropy` has the KL from a Normal.
    """

    arg_constraints: ClassVar = {
        "weight": constraints.unit_interval,
        "scale1": constraints.positive,
        "scale2": constraints.positive,
    }
    support = constraints.real
    has_rsample = False

    def __init__(
        self,
        weight: float | Tensor,
        scale1: float | Tensor,
        scale2: float | Tensor,
        validate_args: bool | None = None,
    ) -> None:
        # Numbers take the default dtype, or that of the tensors beside them.
        self.weight, self.scale1, self.scale2 = broadcast_all(weight, scale1, scale2)
        super().__init__(self.weight.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: None = None) -> "GaussianScaleMixture":
        weight, scale1, scale2 = (value.expand(batch_shape) for value in (self.weight, self.scale1, self.scale2))
        return GaussianScaleMixture(weight, scale1, scale2, validate_args=False)

    def sample(self, sample_shape: Size | None = None) -> Tensor:
        shape = self._extended_shape(Size(sample_shape or ()))
        with torch.no_grad():
            first = torch.rand(shape, dtype=self.weight.dtype, device=self.weight.device) < self.weight
            scale = torch.where(first, self.scale1, self.scale2)
            return torch.randn(shape, dtype=scale.dtype, device=scale.device) * scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, in nats, of the broadcast shape of `value` and the batch."""
        square = value.square()
        first = self.weight.log() - self.scale1.log() - square / (2 * self.scale1.square())
        second = torch.log1p(-self.weight) - self.scale2.log() - square / (2 * self.scale2.square())
        return torch.logaddexp(first, second) - 0.5 * math.log(2 * math.pi)


def elementwise(prior: torch.distributions.Distribution, *, masks: bool = False) -> torch.distributions.Distribution:
    """The distribution of each single weight, which broadcasts to the site's shape.

    Args:
        masks: look inside masked distributions too.
    """
    kinds = (torch.distributions.Independent, ExpandedDistribution, *((dist.MaskedDistribution,) if masks else ()))
    while isinstance(prior, kinds):
        prior = prior.base_dist
    return prior


def varies(parameter: Tensor) -> bool:
    """Whether a distribution's parameter may differ between weights: it is not one number that is repeated."""
    # A distribution that was expanded repeats one number by strides of 0.
    return any(stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True) if size > 1)


def prior_text(prior: TorchDistribution | EvaluatedPrior) -> str:
    """A prior in words, such as ``Normal(loc=0, scale=0.1)``: equal texts are equal priors."""
    if isinstance(prior, EvaluatedPrior):
        return prior.text
    base: Any = elementwise(prior)
    values = {name: number_text(getattr(base, name)) for name in arguments_of(base)}
    return f"{type(base).__name__}({', '.join(f'{name}={value}' for name, value in values.items())})"


def arguments_of(distribution: TorchDistribution) -> list[str]:
    """The names of the arguments that a distribution was made with."""
    # Others are computed from them when they are asked for (a covariance); a log-normal has its base's.
    transformed = isinstance(distribution, torch.distributions.TransformedDistribution)
    return [name for name in distribution.arg_constraints if transformed or name in vars(distribution)]


def number_text(value: Tensor | float) -> str:
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.numel() == 1:
        return f"{tensor.item():.6g}"
    return f"{list(tensor.shape)} of checksum {zlib.crc32(tensor.contiguous().view(-1).numpy().tobytes()):08x}"


@register_kl(Normal, ExpandedDistribution)
def _kl_normal_expanded(q: Normal, p: ExpandedDistribution) -> Tensor:
    return kl_divergence(q, p.base_dist)


_Held = TypeVar("_Held", bound=TorchDistribution | EvaluatedPrior)


def map_tensors(distribution: _Held, function: Callable[[Tensor], Tensor]) -> _Held:
    """Apply `function` in place to every tensor of a prior, so that priors follow ``.to(device)``."""
    # The arguments were checked when it was made; a check of every weight at every step would cost more than the step.
    if isinstance(distribution, torch.distributions.Distribution):
        distribution._validate_args = False
    for name, value in list(vars(distribution).items()):
        if isinstance(value, Tensor):
            setattr(distribution, name, function(value))
        elif isinstance(value, torch.distributions.Distribution):
            map_tensors(value, function)
    return distribution
