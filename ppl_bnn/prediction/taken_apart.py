"""A distribution as the tensors that it is made of, and one like it of other tensors."""

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ppl_bnn.errors import UserError
from ppl_bnn.models.priors import elementwise

Build = Callable[[list[Tensor]], TorchDistribution]
# Of parameters that are written in several ways, the one that a distribution is made again from.
_PREFERRED = {
    "probs": "logits", "gate": "gate_logits", "covariance_matrix": "scale_tril", "precision_matrix": "scale_tril",
}  # fmt: skip


def taken_apart(fn: Distribution, site: str) -> tuple[list[Tensor], Build]:
    """A distribution's parameters, [n, ...] each, and how one like it is made of others.

    Arguments that are no tensors (a number of trials, say) are the same for all examples. `check_alike` tells whether
    the distribution can be made again in this way.

    Raises:
        UserError: there are no such parameters; the message names the site.
    """
    if isinstance(fn, dist.Independent):
        tensors, build = taken_apart(fn.base_dist, site)
        return tensors, lambda new: build(new).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return taken_apart(fn.base_dist.expand(fn.batch_shape), site)
    if isinstance(fn, dist.MaskedDistribution):
        tensors, build = taken_apart(fn.base_dist, site)
        mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
        return [*tensors, mask], lambda new: build(new[:-1]).mask(new[-1])
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        weights, of_weights = taken_apart(fn.mixture_distribution, site)
        parts, of_parts = taken_apart(fn.component_distribution, site)
        cut = len(weights)
        return [*weights, *parts], lambda new: dist.MixtureSameFamily(of_weights(new[:cut]), of_parts(new[cut:]))
    return _parameters(fn, site)


def check_alike(make: Callable[[], TorchDistribution], fn: TorchDistribution, site: str) -> None:
    """Raise UserError unless a distribution that is made of the parameters of `fn` has its densities."""
    try:
        made, values = make(), fn.sample()
        same = torch.allclose(made.log_prob(values), fn.log_prob(values), rtol=1e-3, atol=1e-3, equal_nan=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        same = False
    if not same:
        raise _unreadable(fn, site)


def _parameters(fn: Distribution, site: str) -> tuple[list[Tensor], Build]:
    family = type(fn)
    taken = [name for name in inspect.signature(family.__init__).parameters if name not in ("self", "validate_args")]  # type: ignore[misc]
    found: dict[str, Any] = {name: getattr(fn, name, None) for name in taken}
    held = [name for name in taken if name in fn.arg_constraints and isinstance(found[name], Tensor)]
    own = [name for name in held if _PREFERRED.get(name) not in held]
    if not own:
        raise _unreadable(fn, site)
    tensors = []
    for name in own:
        value, constraint = found[name], fn.arg_constraints[name]
        events = 0 if constraints.is_dependent(constraint) else constraint.event_dim
        tensors.append(value.expand(Size((*fn.batch_shape, *value.shape[value.dim() - events :]))))
    constants: dict[str, Any] = {
        name: value for name, value in found.items() if name not in held and isinstance(value, int | float)
    }
    # Checked when the model made it.
    return tensors, lambda new: family(**dict(zip(own, new, strict=True)), **constants, validate_args=False)  # type: ignore[no-any-return]


def _unreadable(fn: Distribution, site: str) -> UserError:
    family = type(elementwise(fn, masks=True)).__name__
    return UserError(
        f"site {site!r} has a {family}, whose parameters cannot be read: predict takes distributions that are made of "
        "tensors, such as Normal or Poisson"
    )
