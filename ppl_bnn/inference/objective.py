"""What a training's step differentiates: the KL-scaled ELBO, without Pyro's messages where these make no difference."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Protocol, Self

from torch import Tensor, nn

from ppl_bnn.distributed import Communicator, GradientBuckets
from ppl_bnn.distributed.buckets import Computed
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.guides.estimators import Estimator, Flipout, GroupedFlips, LocalReparameterization
from ppl_bnn.guides.flat import FlatNormal
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.direct import DirectELBO, Numbers, why_not_direct
from ppl_bnn.inference.door import Training
from ppl_bnn.inference.elbo import KLScaledELBO
from ppl_bnn.inference.example_weights import weighting
from ppl_bnn.inference.log import BatchAccuracy
from ppl_bnn.inference.settings import TrainSettings
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

    def gradients(
        self, x: Inputs, y: Tensor, *, kl_weight: Any, likelihood_weight: float = 1.0, weights: Tensor | None = None
    ) -> Numbers:
        """The parts of the loss on a batch; its gradients are added to the parameters', or are in `flat`."""
        ...

    def completed(self, found: Numbers, kl_weight: Any) -> Numbers:
        """The parts of the loss once the ranks have averaged their gradients."""
        ...


class ThroughPyro:
    """`KLScaledELBO` of any model and guide, with the estimator among Pyro's handlers."""

    flat: FlatNormal | None = None

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: KLScaledELBO, estimator: object) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self._handlers = estimator, BatchAccuracy()
        self._scopes = ExitStack()

    def __enter__(self) -> Self:
        for handler in self._handlers:
            self._scopes.enter_context(handler)  # type: ignore[arg-type]
        return self

    def __exit__(self, *error: object) -> None:
        self._scopes.__exit__(*error)  # type: ignore[arg-type]

    def gradients(
        self, x: Inputs, y: Tensor, *, kl_weight: float, likelihood_weight: float = 1.0, weights: Tensor | None = None
    ) -> Numbers:
        """See `Objective`."""
        with weighting(weights):
            terms = self.elbo.terms_and_grads(
                self.model, self.guide, x, y, kl_weight=kl_weight, likelihood_weight=likelihood_weight
            )
        return Numbers(terms.loss, terms.nll, terms.kl, self._handlers[1].correct)

    def completed(self, found: Numbers, kl_weight: Any) -> Numbers:
        """See `Objective`."""
        return found


def objective_for(trained: Training, settings: TrainSettings, num_data: int, ranks: Communicator) -> Objective:
    """The objective of a training, as fast as its model and guide allow."""
    model, guide = trained.model, trained.guide
    estimator = lookup(ESTIMATORS, settings.estimator)()
    if isinstance(estimator, Estimator):
        estimator.plain_sites = trained.plain_sites
        if trained.plain_sites and ranks.is_main:
            log.info("%s: the plain draw for %s", settings.estimator, ", ".join(sorted(trained.plain_sites)))
    of_ours = settings.estimator == "plain" or type(estimator) in (Flipout, GroupedFlips, LocalReparameterization)
    why = "" if of_ours else "the estimator is a handler of Pyro"
    why = why or why_not_direct(
        model, guide, num_particles=settings.num_particles, params=trained.params, observed=trained.observed
    )
    if why:
        if ranks.is_main:
            log.info("steps run through Pyro: %s", why)
        elbo = KLScaledELBO(num_data, num_particles=settings.num_particles)
        return ThroughPyro(model, guide, elbo, estimator)
    of_weights = estimator if isinstance(estimator, Estimator) else None
    if settings.compile and of_weights is not None and ranks.is_main:
        log.info("compile leaves out the network: the estimator %s computes its layers", settings.estimator)
    return DirectELBO(
        model, guide, num_data, of_weights,  # type: ignore[arg-type]
        gathers=ranks.size == 1, compiles=settings.compile,
    )  # fmt: skip


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
