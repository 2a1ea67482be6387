"""The KL-scaled ELBO of the usual model, computed without Pyro's messages: what the steps of most trainings are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ppl_bnn.guides import MeanFieldNormal
from ppl_bnn.guides.estimators import Estimator
from ppl_bnn.guides.flat import FlatNormal, has_flat_kl
from ppl_bnn.guides.normal import seeds, standard_normal
from ppl_bnn.inference.elbo import site_kl
from ppl_bnn.inputs import Inputs
from ppl_bnn.models.drawn import as_drawn
from ppl_bnn.models.model import Model
from ppl_bnn.models.priors import EvaluatedPrior
from ppl_bnn.models.random_network import given, random_networks, random_sites, site_prefix
from ppl_bnn.native.flat import MOST_COPIES


def why_not_direct(
    model: nn.Module, guide: nn.Module, *, num_particles: int, params: Mapping[str, Tensor], observed: Sequence[str]
) -> str:
    """Why a training's steps need Pyro, in words; empty where they do not.

    Args:
        num_particles: draws a step.
        params: the values of ``pyro.param`` statements.
        observed: the model's observed sites.
    """
    if _PYRO_STACK:
        return f"the handler {type(_PYRO_STACK[-1]).__name__} is active"
    if not isinstance(model, Model) or type(model).forward is not Model.forward or _changed(model):
        return f"the model is a {type(model).__name__} with a forward pass of its own"
    if type(guide) is not MeanFieldNormal or _changed(guide):
        return f"the guide is a {type(guide).__name__}"
    if guide.latents:
        return f"{guide.latents[0]!r} is random, and no weight"
    if model.likelihood.latents():
        return "the likelihood has random variables"
    if list(observed) != ["y"]:
        return f"the model observes the sites {list(observed)}"
    if guide.is_masked:
        return "the guide is pruned"
    if guide.sites != list(random_sites(model)):
        return "sites of the guide are no parameters of a bayesian network"
    if any(is_parametrized(module) for module in guide.modules()):
        return "parameters of the guide are computed from others"
    own = [one for site in guide.sites for one in guide.parameters_of(site)]
    if len({id(one) for one in own}) < len(own):
        return "two sites of the guide share a parameter"
    if any(one._backward_hooks or one._post_accumulate_grad_hooks for one in own):
        return "a parameter of the guide has a hook on its gradient"
    if params:
        return f"the model has the pyro.param {next(iter(params))!r}"
    return "" if num_particles == 1 else "a step has several draws"


def _changed(module: nn.Module) -> bool:
    """Whether a call of the module is more than the forward pass of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Numbers(NamedTuple):
    """What a step says of itself: numbers, or tensors of one number on a device.

    Attributes:
        loss, nll, kl: nats per datum; loss = nll + kl_weight * kl.
        correct: the batch's right answers; NaN or None without class labels.
        squares: the sum of the squares of the gradients in flat buffers.
    """

    loss: Any
    nll: Any
    kl: Any
    correct: Any
    squares: Any = 0.0

    def plus(self, other: "Numbers") -> "Numbers":
        """These parts and those of another batch of the same step, before it is completed."""
        return Numbers(None, self.nll + other.nll, self.kl + other.kl, self.correct + other.correct)


@dataclass
class _Drawn:
    """A step's draw: its KL in flat buffers, the noise of other sites, and the share of the step that used it."""

    kl: Any
    noise: dict[str, Tensor]
    share: float = 0.0


class DirectELBO:
    """`KLScaledELBO` for a `Model` of random parameters alone under a mean-field guide, with one draw a step.

    Loss and gradients are those of `KLScaledELBO`, and on a CPU the noise is too. No message is sent: `why_not_direct`
    says for which models that makes no difference.

    Args:
        num_data: N, the number of training data.
        estimator: how the network's functions are computed; None is the plain draw.
        gathers: whether `completed` calls `flat.gradients`; False leaves it to `ppl_bnn.distributed.GradientBuckets`.
        compiles: whether the network's forward and backward pass run through torch.compile. With an estimator they do
            not: it computes each layer.

    Attributes:
        flat: the sites whose two parameters are trained, in flat buffers; None without such sites.
    """

    def __init__(
        self, model: Model, guide: MeanFieldNormal, num_data: int, estimator: Estimator | None = None, *,
        gathers: bool = True,
        compiles: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.guide, self.num_data, self.estimator = model, guide, num_data, estimator
        self.gathers, self.compiles = gathers, compiles and estimator is None
        self._priors = {
            site_prefix(net) + name: (net, random.prior)
            for _, net in random_networks(model)
            for name, random in net._random.items()
        }
        trained = [site for site in guide.sites if all(part.requires_grad for part in guide.parameters_of(site))]
        kinds = {(one.dtype, one.device) for site in trained for one in guide.parameters_of(site)}
        if len(kinds) > 1:
            trained = []
        in_layers = [
            site for site in trained
            if estimator is not None and site not in estimator.plain_sites and guide.parameters_of(site)[0].dim() > 1
        ]  # fmt: skip
        self.flat = None
        if trained:
            priors: dict[str, Any] = {site: self._priors[site][1] for site in trained}
            copies = 1 if estimator is None or estimator.copies > MOST_COPIES else estimator.copies
            self.flat = FlatNormal(
                guide, {site: prior if has_flat_kl(prior) else None for site, prior in priors.items()}, copies=copies,
                with_variance=in_layers if estimator is not None and estimator.takes_variance else (),
                flipped=in_layers if copies > 1 else (),
            )  # fmt: skip
        in_flat = self.flat.values if self.flat else {}
        self._aside = [site for site in guide.sites if site not in in_flat]
        self._with_kl = [site for site in guide.sites if self.flat is None or site not in self.flat.kl_sites]
        self._has_classes = True
        self._drawn: _Drawn | None = None
        self._given = None if self._aside else given(model, self._for_network(in_flat))

    def __enter__(self) -> Self:
        self._compiled = self.model.net._compiled_call_impl
        if self.compiles and self._compiled is None:
            self.model.net.compile()
        return self

    def __exit__(self, *error: object) -> None:
        self.model.net._compiled_call_impl = self._compiled

    def add(
        self, x: Inputs, y: Tensor, *, kl_weight: float | Tensor, likelihood_weight: float = 1.0,
        weights: Tensor | None = None, share: float = 1.0,
    ) -> Numbers:  # fmt: skip
        """`share` of the parts of the loss on a batch, on a CPU as numbers; batches until `completed` have one draw.

        Gradients are added to those of all parameters that are not in `flat`, whose are in its buffers once completed.

        Args:
            likelihood_weight: see `KLScaledELBO.terms_and_grads`.
            weights: of the examples, [B].
        """
        model, flat = self.model, self.flat
        # Taken out until the gradients are there: after an error there is no draw to go on with.
        drawn, self._drawn = self._drawn or self._draw(on_cpu=y.is_cpu), None
        drawn.share += share
        kl: Any = drawn.kl if share == 1 else drawn.kl * share
        if flat is not None:
            flat.kl_factor = (kl_weight if drawn.share == 1 else kl_weight * drawn.share) / self.num_data
        posterior = dict(flat.posterior) if flat else {}
        values = dict(flat.values) if flat else {}
        for site, noise in drawn.noise.items():
            q = posterior[site] = self.guide.distribution(site)
            values[site] = torch.addcmul(q.loc, q.scale, noise)
        if self.estimator is not None:
            self.estimator.start(posterior)
        # Nats of one datum, as `num_data / batch` scales the batch to all data, whose number divides the sum.
        factor = likelihood_weight * share / len(y)
        with self._given or given(model, self._for_network(values)):
            outputs = model.outputs(x)
            nll: Any = model.likelihood.nll(outputs, y, weights)
            roots, factors = [nll], [nll.new_full((), factor)]
            if self._with_kl:
                rest: Any = sum(self._kl(site, posterior, values) for site in self._with_kl)
                kl = kl + (rest.detach() if share == 1 else rest.detach() * share)
                if rest.requires_grad:
                    roots.append(rest)
                    factors.append(torch.as_tensor(kl_weight * share / self.num_data).to(rest))
            torch.autograd.backward(roots, factors)
        correct: Any = model.likelihood.correct(outputs.detach(), y) if self._has_classes else None
        self._has_classes = correct is not None
        nll = nll.detach() * factor
        if nll.is_cpu:
            nll, kl = float(nll), float(kl)
            correct = math.nan if correct is None else float(correct)
        else:
            correct = torch.full_like(nll, math.nan) if correct is None else correct
            kl = kl if isinstance(kl, Tensor) else torch.full_like(nll, kl)
        self._drawn = drawn
        return Numbers(None, nll, kl / self.num_data, correct)

    def _draw(self, *, on_cpu: bool) -> "_Drawn":
        # In the order in which the guide samples.
        of_sites = dict(zip(self.guide.sites, seeds(len(self.guide.sites)), strict=True)) if on_cpu else None
        kl = 0.0 if self.flat is None else self.flat.draw(of_sites)
        drawn = _Drawn(kl, {})
        for site in self._aside:
            loc = self.guide.parameters_of(site)[0]
            drawn.noise[site] = standard_normal(loc, seed=None if of_sites is None else of_sites[site])
        return drawn

    def completed(self, found: Numbers, kl_weight: float | Tensor) -> Numbers:
        """The parts of the loss when gradients are gathered: with loss, the whole kl, and squares.

        Args:
            found: the sum of what `add` found since the last call.
        """
        kl: Any = found.kl
        self._drawn = None
        squares: Any = 0.0
        if self.flat is not None:
            squares = self.flat.gradients() if self.gathers else self.flat.arithmetic.squares()
            kl = kl + self.flat.take_cross_entropy() / self.num_data
        # On a device one kernel in place of two.
        on_device = isinstance(kl, Tensor) and isinstance(kl_weight, Tensor)
        loss = torch.addcmul(found.nll, kl_weight, kl) if on_device else found.nll + kl_weight * kl  # type: ignore
        return Numbers(loss, found.nll, kl, found.correct, squares)

    def _for_network(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        estimator = self.estimator
        if estimator is None:
            return dict(values)
        return {
            site: as_drawn(value, site, None, answer=estimator.answer) if value.dim() > 1 else value
            for site, value in values.items()
        }

    def _kl(self, site: str, posterior: Mapping[str, Any], values: Mapping[str, Tensor]) -> Tensor:
        net, prior = self._priors[site]
        if isinstance(prior, EvaluatedPrior):
            prior = prior(net)
        # Anew: it remembers sums from step to step.
        q = self.guide.distribution(site)
        return site_kl({"fn": q, "value": values[site], "scale": 1.0, "mask": None, "name": site}, prior)
