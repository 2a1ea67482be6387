"""Latent sites that are no weights (a noise scale, a temperature, a hyper-prior's value) in the mean-field guide."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, Distribution, Normal, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, register_kl
from torch.distributions.constraints import Constraint

from ppl_bnn.errors import UserError
from ppl_bnn.models.sites import element_support, prior_median

# The unconstrained value's scale at the start: moderate on the scale of a logarithm or a logit.
INIT_SCALE = 0.1


@dataclass
class Latent:
    """A latent site: its value is transform(u), where u ~ Normal(loc, scale) is unconstrained (Kucukelbir et al. 2017).

    Attributes:
        site: its name.
        support: where its values lie.
        is_real: whether these are all real numbers, so that the value is u itself.
        event_dim: of its value.
        shape: of its value.
        plates: (name, size, dim) of each plate of the model that it lies in.
    """

    site: str
    support: Constraint
    is_real: bool
    event_dim: int
    shape: torch.Size
    plates: tuple[tuple[str, int | None, int], ...]

    @classmethod
    def of(cls, message: dict[str, Any]) -> "Latent":
        """The latent site of a model's message.

        Raises:
            UserError: its support has no transform to real numbers, as that of a discrete site.
        """
        site, fn = message["name"], message["fn"]
        try:
            biject_to(fn.support)
        except NotImplementedError:
            raise UserError(
                f"site {site!r} has support {fn.support}, and the mean-field Normal guide needs a continuous site that "
                "can be transformed to real numbers; sum a discrete site out, or, if it is the observed variable, pass "
                "its values too: MeanFieldNormal(model, x[:1], y[:1])"
            ) from None
        frames = [frame for frame in message["cond_indep_stack"] if frame.vectorized]
        # A plate without a size has -1.
        plates = tuple((frame.name, frame.size if frame.size >= 0 else None, frame.dim) for frame in frames)
        is_real = element_support(fn) is constraints.real
        return cls(site, copy.deepcopy(fn.support), is_real, fn.event_dim, message["value"].shape, plates)

    @property
    def transform(self) -> Transform:
        """From real numbers to the support."""
        return biject_to(self.support)

    def start(self, message: dict[str, Any], value: Tensor | None) -> Tensor:
        """The unconstrained loc of a `value` in the support; without one, of the prior's median.

        Raises:
            UserError: the value has another shape, or lies outside the support.
        """
        if value is None:
            return self.transform.inv(prior_median(message["fn"])).to(message["value"])
        if value.shape != self.shape:
            raise UserError(
                f"init_loc of site {self.site!r} has shape {list(value.shape)}, the site has {list(self.shape)}"
            )
        if not bool(self.support.check(value).all()):
            raise UserError(f"init_loc of site {self.site!r} has values outside its support, {self.support}")
        return self.transform.inv(value.detach().to(message["value"], copy=True))

    def sample(self, loc: Tensor, scale: Tensor, plates: dict[str, pyro.plate]) -> Tensor:
        """Pyro's statements of the site, as Pyro's `AutoNormal` has them: real-valued sites need no auxiliary site.

        Args:
            plates: of this run of the guide, by name; those that are missing are added.
        """
        with ExitStack() as stack:
            for name, size, dim in self.plates:
                stack.enter_context(plates.get(name) or plates.setdefault(name, pyro.plate(name, size, dim=dim)))
            q = self.distribution(loc, scale)
            if self.is_real:
                return pyro.sample(self.site, q)
            unconstrained = pyro.sample(f"{self.site}_unconstrained", q, infer={"is_auxiliary": True})
            transform = self.transform
            value = transform(unconstrained)
            density = transform.inv.log_abs_det_jacobian(value, unconstrained)
            log_density = sum_rightmost(density, density.dim() - value.dim() + self.event_dim)
            return pyro.sample(self.site, TransformedDraw(value, log_density=log_density, event_dim=self.event_dim))

    def distribution(self, loc: Tensor, scale: Tensor) -> TorchDistribution:
        """q of the unconstrained value, whose event may have another number of dimensions (a simplex has one less)."""
        # Of a value of no event dimensions each element is transformed by itself.
        return Normal(loc, scale, validate_args=False).to_event(self.event_dim + loc.dim() - len(self.shape))

    def log_prob(self, loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
        """log q(value) in nats, the transform's density included; a float64 scalar."""
        value, transform = value.double(), self.transform
        unconstrained = transform.inv(value)
        log_q = Normal(loc.double(), scale.double(), validate_args=False).log_prob(unconstrained).sum()
        return log_q - transform.log_abs_det_jacobian(unconstrained, value).sum()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the tensors of the support (an interval's bounds), as ``Module.to`` does."""
        _apply(self.support, function)


def check_plates(message: dict[str, Any]) -> None:
    """Raise UserError for a weight in a plate that is subsampled: each example would have weights of its own."""
    for frame in message["cond_indep_stack"]:
        if frame.vectorized and frame.full_size not in (None, frame.size):
            raise UserError(
                f"site {message['name']!r} lies in plate {frame.name!r} of size {frame.full_size}, so each example "
                "would have weights of its own: run the network outside the plate, and only the observation inside it"
            )


def parameter_name(site: str) -> str:
    """The name of a latent's parameters, in which a dot would mean a module: its own name may begin with a weight's."""
    return "latent/" + site.replace(".", "/")


class TransformedDraw(Delta):
    """The value that a transform makes of an auxiliary site's draw, with the log density of the transform, in nats.

    Pyro's KL of a Delta leaves the density out, and so does its `TraceMeanField_ELBO`; with this one it is right.
    """


@register_kl(TransformedDraw, Distribution)
def _kl(q: TransformedDraw, p: TorchDistribution) -> Tensor:
    return q.log_density - p.log_prob(q.v)


def _apply(constraint: Constraint, function: Callable[[Tensor], Tensor]) -> None:
    for name, value in vars(constraint).items():
        if isinstance(value, Tensor):
            setattr(constraint, name, function(value))
        elif isinstance(value, Constraint):
            _apply(value, function)
