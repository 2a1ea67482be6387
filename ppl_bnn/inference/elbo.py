"""The KL-scaled ELBO, in nats per datum, and the schedules of its KL weight."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import Categorical, Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.listeners import heard
from ppl_bnn.models.param_store import given_parameter, own_parameters
from ppl_bnn.models.priors import elementwise


@dataclass(frozen=True)
class Terms:
    """The parts of one evaluation, in nats per datum: loss = nll + kl_weight * kl."""

    loss: float
    nll: float
    kl: float


class KLScaledELBO(ELBO):
    """loss = -(1/N) sum_i E_q[log p(y_i | x_i, w)] + kl_weight KL(q || p) / N, in nats per datum.

    At kl_weight 1 it is Pyro's own loss divided by N = num_data (Blundell et al. 2015, eq. 1). The KL is divided
    by the number of training data, never by the batch or the number of weights, so the loss does not depend on the
    batch size. It is a loss for `pyro.infer.SVI`, too; `terms` holds the parts of the last evaluation.

    The KL is analytic, or to about 1e-6 (Student-t, scale mixture), where one is registered. Elsewhere the entropy is,
    and the prior's expected log density is estimated without bias by one fresh draw of the guide's distribution. No
    log-probability of a weight is computed beside that.

    Correct when the guide is mean-field (its sites are independent of each other), its distributions are
    reparameterized, and only observed sites lie inside the data plate. A guide may also draw auxiliary sites
    (``infer={"is_auxiliary": True}``) and make the model's sites of them, as Pyro's autoguides do: they count as in
    Pyro's `TraceMeanField_ELBO`, and then the guide need not be mean-field.

    Args:
        num_data: N, the number of training data.
        kl_weight: > 0; may be set anew between steps, by a schedule.
        num_particles: Monte Carlo samples of the likelihood term in a step.
    """

    def __init__(self, num_data: int, *, kl_weight: float = 1.0, num_particles: int = 1) -> None:
        super().__init__(num_particles=num_particles)
        if num_data < 1:
            raise UserError(f"num_data must be at least 1, got {num_data}")
        if num_particles < 1:
            raise UserError(f"num_particles must be at least 1, got {num_particles}")
        self.num_data = num_data
        self.kl_weight = kl_weight
        self._last: list[Tensor] | Terms = Terms(math.nan, math.nan, math.nan)

    @property
    def terms(self) -> Terms:
        """The parts of the last evaluation; reading them waits for a device to have computed them."""
        if isinstance(self._last, list):
            self._last = Terms(*torch.stack(self._last).tolist())
        return self._last

    def differentiable_loss(self, model: Callable, guide: Callable, *args: object, **kwargs: object) -> Tensor:
        """The loss as a tensor to differentiate.

        Raises:
            UserError: the guide samples a site that the model has not, or one whose distribution has neither an
                entropy nor a log-probability; or Pyro's parameter store holds another tensor under the name of a
                module's parameter, which `pyro.infer.SVI` would then train instead of it.
        """
        # Only `pyro.infer.SVI`, or who else looks for parameters in messages, takes them from the store.
        with _StoreCheck() if heard("param") else nullcontext():
            return self._weighted(model, guide, args, kwargs, self.kl_weight, 1.0)

    def terms_and_grads(
        self, model: Callable, guide: Callable, *args: object, kl_weight: float, likelihood_weight: float = 1.0
    ) -> Terms:
        """The parts of the loss; its gradients are added to the parameters'.

        Args:
            kl_weight: in place of the ELBO's own, for this evaluation.
            likelihood_weight: multiplies the likelihood term. On a rank with n of a global batch's B examples it is
                n * size / B: the mean over the ranks is then the global batch's loss, with its KL once.
        """
        self._weighted(model, guide, args, {}, kl_weight, likelihood_weight).backward()
        return self.terms

    def _weighted(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, kl_weight: float, likelihood_weight: float
    ) -> Tensor:
        log_likelihood: Tensor | float = 0.0
        kl: Tensor | float = 0.0
        for particle in range(self.num_particles):
            with GuideSites() as sampled:
                guide(*args, **kwargs)
            with _Model(sampled.sites, with_kl=particle == 0) as run:
                model(*args, **kwargs)
            log_likelihood = log_likelihood + run.log_likelihood / self.num_particles
            if particle == 0:
                kl = sum(run.all_kl().values())
        nll, kl = -likelihood_weight * log_likelihood / self.num_data, kl / self.num_data
        loss = torch.as_tensor(nll + kl_weight * kl)
        # As numbers they are wanted after back-propagation: read here, a device would stand still before it.
        self._last = [t.detach().to(loss) if isinstance(t, Tensor) else loss.new_full((), t) for t in (loss, nll, kl)]
        return loss

    def loss(self, model: Callable, guide: Callable, *args: object, **kwargs: object) -> float:
        """The loss as a number."""
        with torch.no_grad():
            self.differentiable_loss(model, guide, *args, **kwargs)
        return self.terms.loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: object, **kwargs: object) -> float:
        """The loss as a number; its gradients are added to the parameters'."""
        self.differentiable_loss(model, guide, *args, **kwargs).backward()
        return self.terms.loss

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        # Pyro's base class wants it; a step does without traces, whose bookkeeping a small network would feel.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace


@torch.no_grad()
def kl_by_site(model: Callable, guide: Callable, *args: object) -> dict[str, float]:
    """KL(q || p) of each of the guide's sites, in nats; `args` are arguments the model runs with (one example).

    Where the prior has no closed form it is the objective's estimate from one draw of each weight. An auxiliary site
    has the expected log density of its draws, in nats, and the sites made of it have the rest.
    """
    with evaluating(model), poutine.block(), own_parameters():
        with GuideSites() as sampled:
            guide(*args)
        with _Model(sampled.sites) as run:
            model(*args)
    return {name: float(kl) for name, kl in run.all_kl().items()}


class GuideSites(Messenger):
    """Remembers the guide's sites, {name: message}, subsamples of plates among them.

    Where a site is an auxiliary site's draw as it is (``AutoNormal`` of a real-valued site), it is remembered as if it
    were sampled from that site's distribution, whose KL may have a closed form.
    """

    def __enter__(self) -> "GuideSites":
        self.sites: dict[str, dict] = {}
        self._auxiliary: dict[int, str] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        if isinstance(fn, Delta) and (source := self._auxiliary.pop(id(fn.v), None)):
            msg = {**msg, "fn": self.sites.pop(source)["fn"]}
        self.sites[msg["name"]] = msg
        if msg["infer"].get("is_auxiliary"):
            self._auxiliary[id(msg["value"])] = msg["name"]


class Replay(Messenger):
    """Gives a model the values of `GuideSites`."""

    def __init__(self, sites: dict[str, dict]) -> None:
        super().__init__()
        self.sites = sites

    def __enter__(self) -> Self:
        self.with_grad = torch.is_grad_enabled()
        return super().__enter__()

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.sites and not msg["is_observed"]:
            sampled = self.sites[msg["name"]]
            if self.with_grad and sampled["value"].requires_grad and not torch.is_grad_enabled():
                raise UserError(
                    f"the model uses {msg['name']!r} without gradients (torch.no_grad, or torch.utils.checkpoint with "
                    "use_reentrant=True), so the data would not train its posterior; call that part with gradients, or "
                    "freeze the site's parameters in the guide"
                )
            msg["value"], msg["infer"], msg["done"] = sampled["value"], sampled["infer"], True


class _Model(Replay):
    """Gives the model the guide's values; adds up the log likelihood of all the data and each site's KL, in nats."""

    def __init__(self, sites: dict[str, dict], *, with_kl: bool = True) -> None:
        super().__init__(sites)
        self.with_kl = with_kl

    def __enter__(self) -> Self:
        self.log_likelihood: Tensor | float = 0.0
        self.kl: dict[str, Tensor] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"]:
            self.log_likelihood = self.log_likelihood + _log_likelihood(msg)
        elif self.with_kl and msg["name"] in self.sites:
            self.kl[msg["name"]] = site_kl(self.sites[msg["name"]], msg["fn"])

    def all_kl(self) -> dict[str, Tensor]:
        """The KL of the model's sites, and the guide's auxiliary sites, in nats."""
        others = {
            name: site for name, site in self.sites.items() if name not in self.kl and not site_is_subsample(site)
        }
        return self.kl | {name: auxiliary_kl(site) for name, site in others.items()}


class _StoreCheck(Messenger):
    """Refuses a module's parameter whose name stands for another tensor in Pyro's store."""

    def _pyro_post_param(self, msg: dict) -> None:
        own = given_parameter(msg)
        if own is not None and msg["value"] is not own:
            raise UserError(
                f"Pyro's parameter store holds another tensor than the module's under {msg['name']!r}, so the module "
                "would not be trained: call pyro.clear_param_store() first"
            )


def _log_likelihood(site: dict) -> Tensor:
    # `scale` is the plate's num_data / batch.
    p, value, scale, mask = site["fn"], site["value"], site["scale"], site["mask"]
    matrix = isinstance(p, Categorical) and p.logits.dim() == 2 and value.dim() == 1
    if matrix and mask is None and not isinstance(scale, Tensor):
        # What log_prob gathers and the sum over the batch, in one operation.
        return F.nll_loss(p.logits, value, reduction="sum") * -scale
    return scale_and_mask(p.log_prob(value), scale, mask).sum()  # type: ignore[no-any-return]


def site_kl(sampled: dict, prior: Distribution) -> Tensor:
    """KL(q || p), in nats, of a site of the guide as `GuideSites` remembers it."""
    kl = _kl(sampled["fn"], prior, sampled)
    return scale_and_mask(kl, sampled["scale"], sampled["mask"]).sum()  # type: ignore[no-any-return]


def auxiliary_kl(sampled: dict) -> Tensor:
    """What an auxiliary site of the guide adds to the KL: the expected log density of its draws, in nats."""
    if not sampled["infer"].get("is_auxiliary"):
        raise UserError(f"the guide samples {sampled['name']!r}, which is no latent site of the model")
    value = _expected_log_prob(sampled["fn"], sampled["value"], sampled["name"])
    return scale_and_mask(value, sampled["scale"], sampled["mask"]).sum()  # type: ignore[no-any-return]


def _kl(q: Distribution, p: Distribution, sampled: dict) -> Tensor:
    if isinstance(q, Delta):
        # Pyro's own leaves out the density, which is that of a change of variables.
        return q.log_density - p.log_prob(q.v)  # type: ignore[no-any-return]
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        # The entropy has a closed form where the KL has none: only the prior's part is left to chance.
        keep = getattr(q, "keep", None)
        if keep is None:
            draw = sampled["value"]
            try:
                own, draw = -q.entropy(), q.rsample()
            except NotImplementedError:
                own = _expected_log_prob(q, draw, sampled["name"])
            prior = p.log_prob(draw)
            # Where one has a batch (a plate) and the other an event, broadcasting would count one of them many times.
            return own - prior if own.shape == prior.shape else own.sum() - prior.sum()
        # A pruned weight is fixed at zero, whatever its prior.
        return -q.entropy() - (elementwise(p).log_prob(q.rsample()) * keep).sum()


def _expected_log_prob(q: Distribution, draw: Tensor, name: str) -> Tensor:
    try:
        return -q.entropy()
    except NotImplementedError:
        pass
    try:
        return q.log_prob(draw)  # type: ignore[no-any-return,no-untyped-call]
    except NotImplementedError:
        raise UserError(
            f"the guide samples {name!r} from a {type(q).__name__}, which has neither an entropy nor a log_prob: "
            "its KL cannot be computed; use another distribution"
        ) from None
