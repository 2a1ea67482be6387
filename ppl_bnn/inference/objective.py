"""What a training's step differentiates: the KL-scaled ELBO, without Pyro's messages where these make no difference."""

import logging
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Protocol, Self

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppl_bnn.distributed import Communicator, GradientBuckets
from ppl_bnn.distributed.buckets import Computed
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.estimators import Estimator, Flipout, GroupedFlips, LocalReparameterization
from ppl_bnn.guides.flat import FlatNormal
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.checkpoint import random_state, set_random_state
from ppl_bnn.inference.direct import DirectELBO, Numbers, why_not_direct
from ppl_bnn.inference.door import Training
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.example_weights import weighting
from ppl_bnn.inference.log import BatchAccuracy
from ppl_bnn.inputs import Inputs
from ppl_bnn.registry import lookup

log = logging.getLogger(__name__)


class Objective(Protocol):
    """A loss to train by, entered for the time of the training.

    Attributes:
        flat: the sites whose gradients are in flat buffers; None without such.
    """

    flat: FlatNormal | None

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def add(
        self, x: Inputs, y: Tensor, *, kl_weight: Any, likelihood_weight: float = 1.0, weights: Tensor | None = None,
        share: float = 1.0,
    ) -> Numbers:  # fmt: skip
        """`share` of the parts of the loss on a batch; gradients are added to those of earlier batches of the step.

        All batches until `completed` have the same draw of the weights. Their shares add up to 1.
        """
        ...

    def completed(self, found: Numbers, kl_weight: Any) -> Numbers:
        """The parts of the loss once all batches of a step are added, and the ranks have averaged their gradients.

        Gradients of `flat` are then in its buffers.
        """
        ...


class ThroughPyro:
    """`KLScaledELBO` of any model and guide, with the estimator among Pyro's handlers."""

    flat: FlatNormal | None = None

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: KLScaledELBO, estimator: object) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self._accuracy, self._draws = BatchAccuracy(), _SameDraws()
        self._handlers: tuple[Any, ...] = estimator, self._accuracy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(
        self, x: Inputs, y: Tensor, *, kl_weight: float, likelihood_weight: float = 1.0,
        weights: Tensor | None = None, share: float = 1.0,
    ) -> Numbers:  # fmt: skip
        """See `Objective`."""
        self._draws.device = y.device
        # For this batch alone: what runs between steps, such as a prediction, must not meet them.
        with ExitStack() as scopes:
            for handler in (*self._handlers, weighting(weights), *([self._draws] if share < 1 else [])):
                scopes.enter_context(handler)
            terms = self.elbo.terms_and_grads(
                self.model, self.guide, x, y, kl_weight=kl_weight * share, likelihood_weight=likelihood_weight * share
            )
        return Numbers(terms.loss, terms.nll, terms.kl * share, self._accuracy.correct)

    def completed(self, found: Numbers, kl_weight: float) -> Numbers:
        """See `Objective`."""
        self._draws.forget()
        return found if found.loss is not None else found._replace(loss=found.nll + kl_weight * found.kl)


class _SameDraws(Messenger):
    """Pyro handler: sites outside of plates are drawn from the same random state in each batch of a step.

    What is drawn beside them, dropout's masks and the latents of examples, is each batch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self._states: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __enter__(self) -> Self:
        self._met: Counter[str] = Counter()
        self._after: dict[str, Tensor] | None = None
        return super().__enter__()

    def forget(self) -> None:
        """Begin another step."""
        self._states.clear()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["done"] or msg["is_observed"] or msg["cond_indep_stack"]:
            return
        name = msg["name"]
        self._met[name] += 1
        now = random_state(self.device)
        before = self._states.setdefault((name, self._met[name]), now)
        if before is not now:
            self._after = now
            set_random_state(before, self.device)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self._after is not None:
            set_random_state(self._after, self.device)
            self._after = None


def objective_for(
    trained: Training, estimator: str | Messenger, num_data: int, *, num_particles: int = 1, compile: bool = False,
    gathers: bool = True, tells: bool = True,
) -> Objective:  # fmt: skip
    """The objective of a training, as fast as its model and guide allow.

    Args:
        estimator: a name of `ESTIMATORS`, or an estimator.
        gathers: see `DirectELBO`: on one rank.
        tells: log what is not as fast, and why.
    """
    model, guide = trained.model, trained.guide
    handler: Any = lookup(ESTIMATORS, estimator, what="estimator")() if isinstance(estimator, str) else estimator
    of_weights = handler if isinstance(handler, Estimator) else None
    name = estimator if isinstance(estimator, str) else type(estimator).__name__
    if of_weights is not None:
        of_weights.plain_sites = trained.plain_sites
        if trained.plain_sites and tells:
            log.info("%s: the plain draw for %s", name, ", ".join(sorted(trained.plain_sites)))
    of_ours = estimator == "plain" or type(handler) in (Flipout, GroupedFlips, LocalReparameterization)
    why = "" if of_ours else "the estimator is a handler of Pyro"
    why = why or why_not_direct(
        model, guide, num_particles=num_particles, params=trained.params, observed=trained.observed
    )
    if why:
        if tells:
            log.info("steps run through Pyro: %s", why)
        return ThroughPyro(model, guide, KLScaledELBO(num_data, num_particles=num_particles), handler)
    if compile and of_weights is not None and tells:
        log.info("compile leaves out the network: the estimator %s computes its layers", name)
    return DirectELBO(model, guide, num_data, of_weights, gathers=gathers, compiles=compile)  # type: ignore[arg-type]


def gradient_buckets(
    model: nn.Module, guide: nn.Module, flat: FlatNormal | None, ranks: Communicator, *, bucket_mb: float,
    compression: str, params: Iterable[Tensor] = (),
) -> GradientBuckets:  # fmt: skip
    """How the ranks average gradients: those in flat buffers as they lie there, all others through copies.

    Args:
        params: trained tensors that no module holds.
    """
    if ranks.size == 1:
        return GradientBuckets([], ranks)
    computed = [
        Computed(leaves, draws, lambda sites=sites: flat.gradients(sites), gradients)  # type: ignore[misc, union-attr]
        for sites, leaves, draws, gradients in (flat.parts(bucket_mb * 2**20) if flat else ())
    ]
    there = {id(one) for one in (*flat.locs, *flat.unconstrained_scales)} if flat else set()
    order = [one for one in (*params, *data_parallel.forward_order(model, guide)) if id(one) not in there]
    return GradientBuckets(order, ranks, computed=computed, bucket_mb=bucket_mb, compression=compression)
