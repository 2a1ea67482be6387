"""Likelihoods of real numbers, Normal and StudentT, with a scale that is fixed, learnt, random or predicted."""

import math
from typing import Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_bnn.errors import UserError
from ppl_bnn.models.likelihoods.base import Likelihood
from ppl_bnn.models.sites import element_support

# Below it a variance underflows in single precision.
SMALLEST = 1e-6

ScaleOf: TypeAlias = float | str | Tensor | TorchDistribution


class NoiseScale(nn.Module):
    """The scale of a likelihood of numbers, in one of four forms.

    Args:
        scale: a positive number or tensor: fixed. ``"learnt"``: a point estimate, trained from `start`.
            ``"predicted"``: the second half of the network's output columns, through softplus. A Pyro distribution over
            positive numbers: a random variable with this prior, the latent site `site`.
        start: where a learnt scale starts.
        site: the name of the latent site.
    """

    value: Tensor

    def __init__(self, scale: ScaleOf, start: float = 1.0, *, site: str = "noise_scale") -> None:
        super().__init__()
        self.kind, self.site = "fixed", site
        name = "scale" if site == "noise_scale" else site
        self.prior: Any = None
        if isinstance(scale, str):
            if scale not in ("learnt", "predicted"):
                raise UserError(
                    f"{name} must be a positive number, 'learnt', 'predicted' or a Pyro distribution, got {scale!r}"
                )
            self.kind = scale
            if scale == "learnt":
                self.unconstrained = nn.Parameter(torch.tensor(_inverse_softplus(_positive(start, "start"))))
        elif isinstance(scale, torch.distributions.Distribution):
            if not _positive_support(scale):
                raise UserError(
                    f"the prior of {site} needs positive support, such as LogNormal or HalfNormal; "
                    f"{type(scale).__name__} has {scale.support}"
                )
            self.kind, self.prior = "latent", scale
        else:
            value = torch.as_tensor(scale, dtype=None if isinstance(scale, Tensor) else torch.get_default_dtype())
            if not bool((value > 0).all()) or not bool(value.isfinite().all()):
                raise UserError(f"{name} must be positive and finite, got {scale}")
            self.register_buffer("value", value.clone(), persistent=False)

    def latents(self) -> dict[str, Tensor]:
        """The latent site, where the scale is random."""
        return {self.site: pyro.sample(self.site, self.prior)} if self.kind == "latent" else {}

    def split(self, outputs: Tensor, noise_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """loc [N, ...] and scale, which broadcasts to it, from outputs [N, *]."""
        if self.kind == "predicted":
            if outputs.dim() != 2 or outputs.shape[1] % 2:
                raise UserError(
                    f"{self.site} 'predicted' needs two output columns for each number, [N, 2 D]: the means (counts: "
                    f"their logarithms) and the unconstrained scales; the network gives {list(outputs.shape)}"
                )
            loc, unconstrained = outputs.chunk(2, 1)
            return one_number(loc), F.softplus(one_number(unconstrained)) + SMALLEST
        loc = one_number(outputs)
        if self.kind == "latent":
            if noise_scale is None:
                raise UserError(f"the posterior has no draws of {self.site!r}: build the guide of the whole Model")
            return loc, noise_scale.to(loc)
        scale = F.softplus(self.unconstrained) + SMALLEST if self.kind == "learnt" else self.value
        return loc, scale.to(loc)


class Normal(Likelihood):
    """y is D real numbers, Normal(loc, scale) each and independent: outputs [N, D] are loc.

    For D = 1 y is [N].

    Args:
        scale: standard deviation of the noise (`NoiseScale`): a positive number (or [D]), ``"learnt"`` (the default),
            ``"predicted"`` (heteroskedastic: outputs are [N, 2 D], and scale = softplus of the second half), or a Pyro
            distribution, its prior (the latent site ``noise_scale``).
        start: where a learnt scale starts, in units of y.
    """

    def __init__(self, scale: ScaleOf = "learnt", *, start: float = 1.0) -> None:
        super().__init__()
        self.noise = NoiseScale(scale, start)

    def latents(self) -> dict[str, Tensor]:
        """The site ``noise_scale``, where the scale has a prior."""
        return self.noise.latents()

    def distribution(self, outputs: Tensor, noise_scale: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        """p(y | outputs [N, D]), or [N, 2 D] for a predicted scale."""
        loc, scale = self.noise.split(outputs, noise_scale)
        return independent(dist.Normal(loc, scale))


class StudentT(Likelihood):
    """y is D real numbers, loc + scale t, t of Student's distribution with `df` degrees of freedom: outputs are loc.

    Its tails are heavier than the Normal's: outliers move loc less. The variance of y is scale^2 df / (df - 2). For
    D = 1 y is [N].

    Args:
        df: degrees of freedom, above 2, so that y has a variance.
        scale, start: as of `Normal`; the scale is no standard deviation here.
    """

    def __init__(self, df: float = 4.0, scale: ScaleOf = "learnt", *, start: float = 1.0) -> None:
        super().__init__()
        if not (isinstance(df, int | float) and math.isfinite(df) and df > 2):
            raise UserError(
                f"df must be above 2, or y has no variance, and finite, got {df!r}; use Normal for infinity"
            )
        self.df = float(df)
        self.noise = NoiseScale(scale, start)

    def latents(self) -> dict[str, Tensor]:
        """The site ``noise_scale``, where the scale has a prior."""
        return self.noise.latents()

    def distribution(self, outputs: Tensor, noise_scale: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        """p(y | outputs [N, D]), or [N, 2 D] for a predicted scale."""
        loc, scale = self.noise.split(outputs, noise_scale)
        return independent(dist.StudentT(self.df, loc, scale))


def independent(each: TorchDistribution) -> TorchDistribution:
    """Elementwise distributions as one with batch shape [N]."""
    return each.to_event(len(each.batch_shape) - 1)


def one_number(outputs: Tensor) -> Tensor:
    """[N, 1] as [N]: one number an example; anything else as it is."""
    return outputs.squeeze(1) if outputs.dim() == 2 and outputs.shape[1] == 1 else outputs


def _positive(value: float, name: str) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > SMALLEST):
        raise UserError(f"{name} must be above {SMALLEST} and finite, got {value!r}")
    return float(value)


def _positive_support(prior: torch.distributions.Distribution) -> bool:
    support = element_support(prior)
    low = getattr(support, "lower_bound", None)
    return low is not None and float(low) >= 0 and support is not constraints.nonnegative_integer


def _inverse_softplus(value: float) -> float:
    value -= SMALLEST
    return value + math.log(-math.expm1(-value))
