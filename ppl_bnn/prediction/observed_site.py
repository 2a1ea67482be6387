"""Any observed site of a user's own Pyro model as something to predict: its distribution's parameters are the outputs.

A draw runs the whole model by Pyro with the posterior's values. The parameters of the site's distribution are laid out
as one tensor [N, K], so that ranks, tallies and results treat them like a network's outputs.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior, Symmetric, WithLocalLatents, offered
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.models.likelihoods.base import numbers
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.draws import Blocks
from ppl_bnn.prediction.running import GivenSites, Target, arguments, drawn_latents, takes_y

Build = Callable[[list[Tensor]], TorchDistribution]
# Of parameters that are written in several ways, the one that a distribution is made again from.
_PREFERRED = {"probs": "logits", "covariance_matrix": "scale_tril", "precision_matrix": "scale_tril"}


class SiteLikelihood(Likelihood):
    """The distribution of one site, whose parameters are outputs [N, K].

    Args:
        fn: the site's distribution for a few examples, with batch shape [n].
        name: the site.
    """

    def __init__(self, fn: TorchDistribution, name: str) -> None:
        super().__init__()
        tensors, self._build = _taken_apart(fn, name)
        self._shapes = [tensor.shape[1:] for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self.site, self.family = name, type(_inner(fn)).__name__

    def distribution(self, outputs: Tensor) -> TorchDistribution:  # type: ignore[override]
        """The site's distribution, of parameters [N, K]."""
        parts = outputs.split([shape.numel() for shape in self._shapes], 1)
        return self._build(
            [
                part.unflatten(1, shape).to(dtype) if shape else part.squeeze(1).to(dtype)
                for part, shape, dtype in zip(parts, self._shapes, self._dtypes, strict=True)
            ]
        )

    def observed(self, y: object, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """The observed values [N, ...]."""
        return numbers(y, outputs, self.distribution(outputs), f"{self.family} (site {self.site!r})")


class CategoricalSite(Categorical):
    """A site of class labels: outputs are its logits [N, C]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.site = name


def observed_site(
    model: Callable[..., Any], sites: Mapping[str, Mapping[str, Any]], site: str | None, few: Tensor
) -> Target:
    """What is predicted of a user's own Pyro model.

    Args:
        sites: the messages of its sites that have no posterior, by name.
        site: which one; not needed where there is one.
        few: the examples [n, ...] that the model ran with.

    Raises:
        UserError: no such site, or several and none named; a distribution that has no example in its first dimension,
            or whose parameters cannot be read.
    """
    names = ", ".join(map(repr, sites))
    if site is None and len(sites) > 1:
        raise UserError(f"the model has the observed sites {names}: choose one of them with site=")
    name = site or next(iter(sites))
    if name not in sites:
        raise UserError(f"the model has no observed site {name!r}; it has {names}")
    fn = _by_example(sites[name], name, len(few))
    likelihood: Likelihood = CategoricalSite(name) if _is_labels(fn) else SiteLikelihood(fn, name)
    outputs = _outputs(fn, name)
    likelihood.check(outputs)
    module = model if isinstance(model, nn.Module) else _Function(model)
    return Target(module, likelihood, outputs, {}, name)


def site_blocks(
    target: Target, posterior: Posterior, x: Tensor, y: object, *, seed: int, batch_size: int | None
) -> Blocks:
    """Blocks of one draw: the parameters [1, N, K] of the observed site, the model run with the posterior's values."""
    model, limit = target.net, batch_size or 200
    assert target.site is not None

    def parameters(index: int, sign: float) -> Tensor:
        weights = _values(posterior, index, seed, sign)
        local = posterior.draw_local(index, x, seed=seed) if isinstance(posterior, WithLocalLatents) else {}
        found = []
        for first in range(0, len(x), limit):
            rows = slice(first, first + limit)
            own = {name: value[rows] for name, value in local.items()}
            site = _run(model, {**weights, **own}, x[rows], y, rows, target.site, draw_seed(seed, index))
            found.append(_outputs(_by_example(site, str(target.site), len(x[rows])), str(target.site)))
        return torch.cat(found).unsqueeze(0)

    return Blocks(1, parameters)


def observed_values(target: Target, posterior: Posterior, x: Tensor, y: object, *, seed: int) -> object:
    """What the model observes at the site when it is given y: a part of y, say, or a function of it."""
    weights = dict(posterior.draw(0, seed=seed))
    if isinstance(posterior, WithLocalLatents):
        weights |= posterior.draw_local(0, x, seed=seed)
    site = _run(target.net, weights, x, y, slice(None), str(target.site), seed, with_y=True)
    return site["value"] if site["is_observed"] else y


def _run(
    model: nn.Module, values: Mapping[str, Tensor], x: Tensor, y: object, rows: slice, name: str, seed: int,
    *, with_y: bool = False,
) -> Mapping[str, Any]:  # fmt: skip
    some = None if y is None else torch.as_tensor(y)[rows]
    given = (x, some) if with_y and takes_y(model) else arguments(model, x, some)
    sites = GivenSites(values)
    with evaluating(model), forked_random(x), poutine.block(), own_parameters(), sites:
        torch.manual_seed(seed)
        model(*given)
    if name not in sites.observable:
        raise UserError(f"the model has no site {name!r} for these examples, and it had one for the first two")
    return sites.observable[name]


def _values(posterior: Posterior, index: int, seed: int, sign: float) -> dict[str, Tensor]:
    if sign == 1:
        return dict(posterior.draw(index, seed=seed))
    mirrored = offered(posterior, Symmetric, "a mirror image", "use sampling independent")
    noise = mirrored.noise(index, seed=seed)
    found = {site: torch.addcmul(*mirrored.loc_scale(site), sign * values) for site, values in noise}
    return found | dict(drawn_latents(posterior, index, seed, sign))


def _by_example(site: Mapping[str, Any], name: str, count: int) -> TorchDistribution:
    """The site's distribution with batch shape [n]: other batch dimensions are part of an example's y."""
    fn: TorchDistribution = site["fn"]
    if site["mask"] is not None:
        fn = fn.mask(site["mask"])
    if not fn.batch_shape or fn.batch_shape[0] != count:
        raise UserError(
            f"site {name!r} has batch shape {list(fn.batch_shape)} for {count} examples: its first dimension must be "
            "the examples, in a plate; make the others an event with to_event"
        )
    return fn.to_event(len(fn.batch_shape) - 1)


def _inner(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, dist.Independent | ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_labels(fn: TorchDistribution) -> bool:
    return isinstance(fn, torch.distributions.Categorical) and fn.logits.dim() == 2


def _outputs(fn: TorchDistribution, name: str) -> Tensor:
    """The parameters of a distribution with batch shape [n], [n, K]."""
    if _is_labels(fn):
        return fn.logits.float()  # type: ignore[no-any-return]
    tensors, _ = _taken_apart(fn, name)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1) for tensor in tensors], 1).to(
        dtype
    )


def _taken_apart(fn: torch.distributions.Distribution, name: str) -> tuple[list[Tensor], Build]:
    """A distribution's parameters, [n, ...] each, and how one like it is made of others."""
    if isinstance(fn, dist.Independent):
        tensors, build = _taken_apart(fn.base_dist, name)
        return tensors, lambda new: build(new).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return _taken_apart(fn.base_dist.expand(fn.batch_shape), name)
    if isinstance(fn, dist.MaskedDistribution):
        tensors, build = _taken_apart(fn.base_dist, name)
        mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
        return [*tensors, mask], lambda new: build(new[:-1]).mask(new[-1])
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        weights, of_weights = _taken_apart(fn.mixture_distribution, name)
        parts, of_parts = _taken_apart(fn.component_distribution, name)
        cut = len(weights)
        return [*weights, *parts], lambda new: dist.MixtureSameFamily(of_weights(new[:cut]), of_parts(new[cut:]))
    return _parameters(fn, name)


def _parameters(fn: torch.distributions.Distribution, site: str) -> tuple[list[Tensor], Build]:
    family = type(fn)
    taken = inspect.signature(family.__init__).parameters  # type: ignore[misc]
    held = [name for name in fn.arg_constraints if name in taken and isinstance(getattr(fn, name, None), Tensor)]
    own: list[str] = []
    for name in held:
        other = _PREFERRED.get(name)
        if other is None or other not in held:
            own.append(name)
    if not own:
        raise UserError(
            f"site {site!r} has a {family.__name__}, whose parameters cannot be read: predict takes distributions "
            "that are made of tensors, such as Normal or Poisson"
        )
    tensors = []
    for name in own:
        value, constraint = getattr(fn, name), fn.arg_constraints[name]
        events = 0 if constraints.is_dependent(constraint) else constraint.event_dim
        batch = fn.batch_shape
        tensors.append(value.expand(Size((*batch, *value.shape[value.dim() - events :]))))
    # Checked when the model made it.
    return tensors, lambda new: family(**dict(zip(own, new, strict=True)), validate_args=False)  # type: ignore[no-any-return]


class _Function(nn.Module):
    """A Pyro function as a module without parameters of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object) -> Any:
        return self.function(*args)
