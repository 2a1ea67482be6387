"""Likelihoods of counts 0, 1, 2, ...: Poisson and NegativeBinomial, whose outputs are the logarithm of the mean."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from ppl_bnn.models.likelihoods.base import Likelihood
from ppl_bnn.models.likelihoods.numbers import NoiseScale, ScaleOf, independent, one_number

# Above it double precision does not hold every count, and the Normal's quantiles are off by 1e-8 standard deviations.
_NORMAL_FROM = 2.0**52


class Poisson(Likelihood):
    """y is D counts, Poisson(exp(outputs)) each and independent: outputs [N, D] are the logarithms of the rates.

    For D = 1 y is [N]. The log density is exact for any finite output. A mean that overflows is refused by `predict`.
    """

    def distribution(self, outputs: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(y | log rates [N, D])."""
        return independent(LogPoisson(one_number(outputs)))


class NegativeBinomial(Likelihood):
    """y is D counts with mean m = exp(outputs) and variance m + overdispersion m^2, independent; outputs are [N, D].

    This is the form NB2 of regressions (Cameron and Trivedi 1998, sec. 3.3): a Poisson whose rate is m times a Gamma
    variable of mean 1 and variance `overdispersion`. In torch's terms total_count = 1 / overdispersion and
    logits = log m + log overdispersion. At an overdispersion of 0 it would be `Poisson`.

    Args:
        overdispersion: a positive number (or [D]), ``"learnt"`` (the default), ``"predicted"`` (outputs are [N, 2 D],
            and overdispersion = softplus of the second half), or a Pyro distribution, its prior (the latent site
            ``overdispersion``). As `NoiseScale`.
        start: where a learnt overdispersion starts.
    """

    def __init__(self, overdispersion: ScaleOf = "learnt", *, start: float = 1.0) -> None:
        super().__init__()
        self.noise = NoiseScale(overdispersion, start, site="overdispersion")

    def latents(self) -> dict[str, Tensor]:
        """The site ``overdispersion``, where it has a prior."""
        return self.noise.latents()

    def distribution(self, outputs: Tensor, overdispersion: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        """p(y | log means [N, D]), or [N, 2 D] for a predicted overdispersion."""
        log_mean, overdispersion = self.noise.split(outputs, overdispersion)
        return independent(LogNegativeBinomial(log_mean, overdispersion))


class _LogCounts(TorchDistribution):
    """Counts with the mean exp(log_mean): neither a large nor a small one leaves the floating-point numbers.

    Densities are computed in double precision: terms as large as the count times its logarithm cancel.
    """

    support = constraints.nonnegative_integer

    def __init__(self, *parameters: Tensor, validate_args: bool | None = None) -> None:
        self._parameters = torch.broadcast_tensors(*parameters)
        for name, value in zip(self.arg_constraints, self._parameters, strict=True):
            setattr(self, name, value)
        super().__init__(self._parameters[0].shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Any = None) -> "_LogCounts":
        """The same counts in another batch shape."""
        return type(self)(*(value.expand(batch_shape) for value in self._parameters), validate_args=False)

    def _expanded(self, sample_shape: Sequence[int]) -> list[Tensor]:
        return [value.detach().double().expand((*sample_shape, *self.batch_shape)) for value in self._parameters]

    def _double(self, value: Tensor) -> list[Tensor]:
        if self._validate_args:
            self._validate_sample(value)
        return [part.double() for part in (value, *self._parameters)]


class LogPoisson(_LogCounts):
    """Poisson(exp(log_rate))."""

    arg_constraints: ClassVar = {"log_rate": constraints.real}
    log_rate: Tensor

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(log_rate, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The rate."""
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        """The rate."""
        return self.log_rate.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """y log rate - rate - log y!, nats."""
        y, log_rate = self._double(value)
        return (y * log_rate - log_rate.exp() - (y + 1).lgamma()).to(self.log_rate.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts in floating point."""
        (log_rate,) = self._expanded(sample_shape)
        return _poisson(log_rate.exp()).to(self.log_rate.dtype)


class LogNegativeBinomial(_LogCounts):
    """Counts with mean exp(log_mean) and variance mean + overdispersion mean^2."""

    arg_constraints: ClassVar = {"log_mean": constraints.real, "overdispersion": constraints.positive}
    log_mean: Tensor
    overdispersion: Tensor

    def __init__(self, log_mean: Tensor, overdispersion: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(log_mean, overdispersion, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """exp(log_mean)."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """mean + overdispersion mean^2."""
        return self.mean + self.overdispersion * self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """log Gamma(y + r) - log Gamma(r) - log y! + r log(1 - p) + y log p, r = 1 / overdispersion, nats."""
        y, log_mean, overdispersion = self._double(value)
        count, logits = 1 / overdispersion, log_mean + overdispersion.log()
        choose = (y + count).lgamma() - count.lgamma() - (y + 1).lgamma()
        logs = count * torch.nn.functional.logsigmoid(-logits) + y * torch.nn.functional.logsigmoid(logits)
        return (choose + logs).to(self.log_mean.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts in floating point."""
        log_mean, overdispersion = self._expanded(sample_shape)
        gamma = dist.Gamma(1 / overdispersion, 1 / overdispersion, validate_args=False).sample()
        return _poisson(log_mean.exp() * gamma).to(self.log_mean.dtype)


def _poisson(rate: Tensor) -> Tensor:
    """Poisson counts of rates in double precision; torch's own are 64-bit integers inside."""
    large = rate > _NORMAL_FROM
    counts = torch.poisson(rate.masked_fill(large, 0))
    return torch.where(large, rate + rate.sqrt() * torch.randn_like(rate), counts) if large.any() else counts
