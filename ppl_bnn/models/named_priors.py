"""Priors by name, with parameters of their own: learnt, hierarchical, of another network. Each fits `bayesian`.

A learnt prior is empirical Bayes: its scale is a parameter of the network, at the maximum of the ELBO. A hierarchical
prior has the scale as a latent site beside the weights, ``fc1.weight_scale``, with a hyper-prior:

    weight | scale ~ Normal(0, scale),    scale ~ hyper-prior.

The weights' KL is the closed form given the drawn scale. Both are centred: the weights' sites hold the weights, so
prediction, pruning and export need not know of the prior.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ppl_bnn.errors import UserError
from ppl_bnn.models.priors import SitePrior, prior_text
from ppl_bnn.models.sites import element_support

Per = Literal["layer", "input", "unit", "weight"]


def learnt_normal(scale: float = 0.1, *, per: Per | Literal["network"] = "layer") -> SitePrior:
    """Normal(0, scale) whose scale is trained with the network, from this value on.

    Args:
        scale: > 0.
        per: one scale for each ``layer``, for the whole ``network``, for each ``input`` of a layer (MacKay's automatic
            relevance determination), each output ``unit`` or each ``weight``.

    Raises:
        UserError: a scale that is not positive, or an unknown `per`.
    """
    _check_positive("scale", scale)
    if per == "network":
        return dist.Normal(0.0, torch.tensor(float(scale), requires_grad=True))
    _check_per(per)
    return lambda site, shape: dist.Normal(0.0, torch.full(_scale_shape(per, shape), float(scale), requires_grad=True))


def hierarchical(hyper_prior: float | TorchDistribution = 1.0, *, per: Per = "layer") -> "Hierarchical":
    """Normal(0, scale) with a scale of its own for each layer, which has a hyper-prior.

    Args:
        hyper_prior: of the scale, over the positive numbers: HalfCauchy, LogNormal, Gamma, ...; a number is the scale
            of a HalfCauchy (Gelman 2006).
        per: what has one scale: a ``layer``, an ``input``, an output ``unit`` or a ``weight``.

    Raises:
        UserError: a hyper-prior that is not over the positive numbers, or an unknown `per`.
    """
    return Hierarchical(
        hyper_prior if isinstance(hyper_prior, TorchDistributionMixin) else _half_cauchy(hyper_prior), per
    )


def ard(hyper_prior: float | TorchDistribution = 1.0) -> "Hierarchical":
    """Automatic relevance determination: Normal(0, scale) with a scale for each input of a layer (Neal 1996).

    The scale of an input that the outputs do not depend on becomes small. In a convolution an input is a channel. The
    site ``fc1.weight_scale`` has the shape [1, in] or [1, in, 1, 1]; a random bias has one scale. Arguments as for
    `hierarchical`.
    """
    return hierarchical(hyper_prior, per="input")


def horseshoe(scale: float = 1.0, slab: float | None = None, *, per: Per = "weight") -> "Horseshoe":
    """The horseshoe: Normal(0, tau lambda), tau ~ HalfCauchy(scale) of a layer and lambda ~ HalfCauchy(1) of a weight.

    Most weights shrink to 0 with tau, and the few that matter escape by their lambda (Carvalho, Polson and Scott 2010).
    The sites are ``fc1.weight_global_scale`` [] and ``fc1.weight_local_scale``.

    Args:
        scale: of tau. With p0 relevant weights of p, noise sigma and n data, about p0 / (p - p0) sigma / sqrt(n)
            (Piironen and Vehtari 2017).
        slab: the scale c that no weight's prior exceeds, by lambda' = c lambda / sqrt(c^2 + tau^2 lambda^2): the
            regularized horseshoe (Piironen and Vehtari 2017, eq. 2.8).
        per: what has one lambda: a ``weight``, an ``input`` or an output ``unit``.

    Raises:
        UserError: a scale or slab that is not positive, or an unknown `per`.
    """
    return Horseshoe(scale, slab, per)


def pretrained_prior(
    source: nn.Module | Mapping[str, Tensor], scale: float
) -> Callable[[str, Size], TorchDistribution]:
    """Normal(w, scale) around the weights w of a trained network: the prior of a network that continues from there.

    Args:
        source: the deterministic network, or its ``state_dict``; a copy of its values is taken. It names its weights
            as the Bayesian network names its sites.
        scale: > 0, of every weight.

    Raises:
        UserError: a scale that is not positive; when the prior meets a network, a site that the source lacks, or has
            in another shape.
    """
    _check_positive("scale", scale)
    state = source.state_dict() if isinstance(source, nn.Module) else source
    values = {name: value.detach().clone() for name, value in state.items()}

    def prior(site: str, shape: Size) -> TorchDistribution:
        found = list(values[site].shape) if site in values else "none"
        if found != list(shape):
            raise UserError(f"the pretrained prior needs weights of shape {list(shape)} for site {site!r}, got {found}")
        return dist.Normal(values[site], scale)

    return prior


@dataclass(frozen=True, eq=False)
class Hierarchical:
    """See `hierarchical`."""

    hyper_prior: TorchDistribution
    per: Per

    def __post_init__(self) -> None:
        _check_per(self.per)
        support = element_support(self.hyper_prior)
        if support not in (constraints.positive, constraints.nonnegative) or self.hyper_prior.shape():
            raise UserError(
                f"a hyper-prior of a scale is one distribution over the positive numbers, got {self.hyper_prior} "
                f"of shape {list(self.hyper_prior.shape())}: HalfCauchy(1.), say"
            )

    @property
    def text(self) -> str:
        """The prior in words."""
        return f"hierarchical({prior_text(self.hyper_prior)}, per={self.per})"

    def __call__(self, site: str, shape: Size) -> TorchDistribution:
        scale = _scale(f"{site}_scale", self.hyper_prior, self.per, shape)
        # A check of its values would wait for the device in each forward pass.
        return dist.Normal(0.0, scale, validate_args=False)


@dataclass(frozen=True)
class Horseshoe:
    """See `horseshoe`."""

    scale: float
    slab: float | None
    per: Per

    def __post_init__(self) -> None:
        _check_per(self.per)
        _check_positive("scale", self.scale)
        if self.slab is not None:
            _check_positive("slab", self.slab)

    @property
    def text(self) -> str:
        """The prior in words."""
        slab = "none" if self.slab is None else f"{self.slab:.6g}"
        return f"horseshoe(scale={self.scale:.6g}, slab={slab}, per={self.per})"

    def __call__(self, site: str, shape: Size) -> TorchDistribution:
        scale = _scale(f"{site}_global_scale", _half_cauchy(self.scale), "layer", shape)
        scale = scale * _scale(f"{site}_local_scale", _half_cauchy(1.0), self.per, shape)
        if self.slab is not None:
            scale = scale * (1 + (scale / self.slab).square()).rsqrt()
        return dist.Normal(0.0, scale, validate_args=False)


def _scale(name: str, hyper_prior: Any, per: str, shape: Size) -> Tensor:
    """The drawn scale of the weights of `shape`, with as many dimensions."""
    own = _scale_shape(per, shape)
    drawn: Tensor = pyro.sample(name, hyper_prior.expand(own).to_event(len(own)))
    return drawn.view(*drawn.shape, *[1] * (len(shape) - len(own)))


def _half_cauchy(scale: float) -> TorchDistribution:
    _check_positive("scale", scale)
    return dist.HalfCauchy(float(scale), validate_args=False)  # type: ignore[no-any-return]


def _scale_shape(per: str, shape: Size) -> Size:
    """What broadcasts to a weight's `shape`, [out, in, ...], with one number for each part."""
    if per == "weight":
        return shape
    if per == "layer" or len(shape) < 2:
        return Size()
    kept = 1 if per == "input" else 0
    return Size([size if dim == kept else 1 for dim, size in enumerate(shape)])


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be positive and finite, got {value}")


def _check_per(per: str) -> None:
    if per not in ("layer", "input", "unit", "weight"):
        raise UserError(f"per must be one of layer, input, unit, weight; got {per!r}")
