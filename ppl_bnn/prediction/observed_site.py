"""Any observed site of a user's own Pyro model as something to predict: its distribution's parameters are the outputs.

A draw runs the whole model by Pyro with the posterior's values. The parameters of the site's distribution are laid out
as one tensor [N, K], so that ranks, tallies and results treat them like a network's outputs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior, WithLocalLatents, signed_draw
from ppl_bnn.inputs import Inputs, count, rows
from ppl_bnn.models.evaluating import forked_random, seed_random
from ppl_bnn.models.likelihoods import Bernoulli, Categorical, DrawStatistics, Likelihood
from ppl_bnn.models.likelihoods.base import numbers
from ppl_bnn.models.priors import elementwise
from ppl_bnn.native.normals import draw_seed
from ppl_bnn.prediction.draws import Blocks
from ppl_bnn.prediction.running import Function, Target, arguments, run_with, takes_y
from ppl_bnn.prediction.taken_apart import check_alike, taken_apart


class SiteLikelihood(Likelihood):
    """The distribution of one site, whose parameters are outputs [N, K].

    Args:
        fn: the site's distribution for a few examples, with batch shape [n].
        name: the site.
    """

    def __init__(self, fn: TorchDistribution, name: str) -> None:
        super().__init__()
        tensors, self._build = taken_apart(fn, name)
        self._shapes = [tensor.shape[1:] for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self.site, self.family = name, type(elementwise(fn, masks=True)).__name__
        support = fn.support
        each = support.base_constraint if isinstance(support, constraints.independent) else support
        self._bounded_by_example = any(isinstance(bound, Tensor) and bound.dim() for bound in vars(each).values())

    def distribution(self, outputs: Tensor) -> TorchDistribution:  # type: ignore[override]
        """The site's distribution, of parameters [N, K]."""
        parts = outputs.split([shape.numel() for shape in self._shapes], 1)
        return self._build(
            [
                part.unflatten(1, shape).to(dtype) if shape else part.squeeze(1).to(dtype)
                for part, shape, dtype in zip(parts, self._shapes, self._dtypes, strict=True)
            ]
        )

    def statistics(self, outputs: Tensor, y: Tensor | None = None) -> DrawStatistics:  # type: ignore[override]
        """As of any likelihood; y outside the bounds that a draw gives has the density 0 in that draw."""
        found = super().statistics(outputs, y)
        if found.log_likelihood is None or not self._bounded_by_example:
            return found
        inside = torch.stack([self.distribution(draw).support.check(y) for draw in outputs.cpu()])
        return replace(found, log_likelihood=found.log_likelihood.masked_fill(~inside, -math.inf))

    def observed(self, y: object, outputs: Tensor) -> Tensor:  # type: ignore[override]
        """The observed values [N, ...]."""
        return numbers(y, outputs, self.distribution(outputs), f"{self.family} (site {self.site!r})")


class CategoricalSite(Categorical):
    """A site of class labels: outputs are its logits [N, C], or [N, ..., C] of several labels an example."""

    def __init__(self, name: str, *, several: bool = False) -> None:
        super().__init__(class_dim=-1 if several else None)
        self.site = name


class BernoulliSite(Bernoulli):
    """A site of binary labels: outputs are its logits [N, ...]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.site = name


def observed_site(
    model: Callable[..., Any], sites: Mapping[str, Mapping[str, Any]], site: str | None, few: Inputs
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
    fn = _by_example(sites[name], name, count(few))
    likelihood, outputs = _likelihood(fn, name), _outputs(fn, name)
    with forked_random(outputs):
        seed_random(0, outputs)
        check_alike(lambda: likelihood.distribution(outputs), fn, name)
    likelihood.check(outputs)
    module = model if isinstance(model, nn.Module) else Function(model)
    return Target(module, likelihood, outputs, {}, name)


def site_blocks(
    target: Target, posterior: Posterior, x: Inputs, y: object, *, seed: int, batch_size: int | None,
    own_seed: int | None = None,
) -> Blocks:  # fmt: skip
    """Blocks of one draw: the parameters [1, N, K] of the observed site, the model run with the posterior's values.

    Args:
        own_seed: of what is drawn for each example; `seed` unless given.
    """
    own_seed = seed if own_seed is None else own_seed
    model, limit = target.net, batch_size or 200
    assert target.site is not None

    def parameters(index: int, sign: float) -> Tensor:
        weights = signed_draw(posterior, index, seed=seed, sign=sign)
        local = _local(posterior, index, x, own_seed)
        found = []
        for first in range(0, count(x), limit):
            part = slice(first, first + limit)
            own, some = {name: value[part] for name, value in local.items()}, rows(x, part)
            site = _run(model, {**weights, **own}, some, y, part, str(target.site), draw_seed(own_seed, index))
            found.append(_outputs(_by_example(site, str(target.site), count(some)), str(target.site)))
        return torch.cat(found).unsqueeze(0)

    return Blocks(1, parameters)


def observed_values(target: Target, posterior: Posterior, x: Inputs, y: object, *, seed: int) -> object:
    """What the model observes at the site when it is given y: a part of y, say, or a function of it."""
    weights = dict(posterior.draw(0, seed=seed))
    weights |= _local(posterior, 0, x, seed)
    site = _run(target.net, weights, x, y, slice(None), str(target.site), seed, with_y=True)
    return site["value"] if site["is_observed"] else y


def _local(posterior: Posterior, index: int, x: Inputs, seed: int) -> Mapping[str, Tensor]:
    """Latents of single examples; of several inputs there are none."""
    if isinstance(posterior, WithLocalLatents) and isinstance(x, Tensor):
        return posterior.draw_local(index, x, seed=seed)
    return {}


def _run(
    model: nn.Module, values: Mapping[str, Tensor], x: Inputs, y: object, part: slice, name: str, seed: int,
    *, with_y: bool = False,
) -> Mapping[str, Any]:  # fmt: skip
    some = None if y is None else torch.as_tensor(y)[part]
    given = (x, some) if with_y and takes_y(model) else arguments(model, x, some)
    _, sites = run_with(model, values, x, given, seed=seed)
    if name not in sites.observable:
        raise UserError(f"the model has no site {name!r} for these examples, and it had one for the first two")
    return sites.observable[name]


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


def _likelihood(fn: TorchDistribution, name: str) -> Likelihood:
    labels = _labels(fn)
    if labels is None:
        return SiteLikelihood(fn, name)
    if isinstance(labels, torch.distributions.Bernoulli):
        return BernoulliSite(name)
    return CategoricalSite(name, several=bool(fn.event_shape))


def _labels(fn: TorchDistribution) -> Any:
    """The Categorical or Bernoulli distribution of each label [n, ...], without a mask; None for another."""
    each = elementwise(fn)
    binary = isinstance(each, torch.distributions.Bernoulli)
    # `Bernoulli` has y [N] for outputs [N, 1].
    if not (isinstance(each, torch.distributions.Categorical) or (binary and fn.event_shape != (1,))):
        return None
    return each if each.batch_shape == fn.shape() else each.expand(fn.shape())  # type: ignore[attr-defined]


def _outputs(fn: TorchDistribution, name: str) -> Tensor:
    """The parameters of a distribution with batch shape [n], [n, K]; of labels the logits [n, ..., C] or [n, ...]."""
    if (labels := _labels(fn)) is not None:
        return labels.logits.to(torch.promote_types(labels.logits.dtype, torch.float32))  # type: ignore[no-any-return]
    tensors, _ = taken_apart(fn, name)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    flat = [tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1) for tensor in tensors]
    return torch.cat(flat, 1).to(dtype)
