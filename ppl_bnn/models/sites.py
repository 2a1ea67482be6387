"""The latent sites of a Pyro model, found by one run that needs no draw of the weights."""

from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.nn.modules.module import register_module_forward_pre_hook

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.param_store import own_parameters

# Draws from a prior for its median: for a site of many elements fewer, so that they fit into memory.
_MOST_DRAWS, _MOST_NUMBERS, _FEWEST_DRAWS = 999, 1_000_000, 15


def latent_sites(model: Callable[..., object], *args: object, **kwargs: object) -> dict[str, dict]:
    """Pyro's message of each latent site, in the model's order: ``fn`` is its prior, ``value`` has its shape and dtype.

    Real-valued sites have the value 0 in this run. A prior's draw would overflow in a deep network: at Normal(0, 1) the
    outputs grow by the square root of each layer's width. Other continuous sites have their prior's median. Sites in a
    plate of which the run saw a part, the data plate, are left out: the observed variable, if its values were not
    passed, and latents of single examples. The run changes neither the model, nor the random state, nor Pyro's
    parameter store.

    Args:
        *args, **kwargs: what the model runs with; one example is enough.

    Raises:
        UserError: two sites have the same name.
    """
    return _found(_Run(), model, args, kwargs)


def given_sites(model: Callable[..., object], given: Mapping[str, Tensor], *args: object) -> dict[str, dict]:
    """The `latent_sites` of a model in which some sites have the given values, such as those of hyper-parameters."""
    return _found(_Run(given), model, args, {})


def log_prior(model: Callable[..., object], draw: Mapping[str, Tensor], *args: object) -> float:
    """log p(draw) in nats: the log density of all latent sites of a Pyro model at the values of a draw.

    A prior whose parameters are latents themselves (a hyper-prior) has those of the draw. The sum is taken in double
    precision.

    Args:
        *args: what the model runs with; one example is enough.
    """
    sites = given_sites(model, draw, *args)
    return sum(float(site["fn"].log_prob(draw[name].double()).sum()) for name, site in sites.items())


def random_parameters(sites: Mapping[str, dict]) -> list[str]:
    """Which of a model's `latent_sites` are the network's random weights; the others are latents.

    They are the random parameters of a `bayesian` network, and real-valued attributes of Pyro modules. In a model
    that has none, which samples its weights by hand, every real-valued site counts as one.
    """
    real = [name for name, site in sites.items() if element_support(site["fn"]) is constraints.real]
    return [name for name in real if sites[name]["infer"].get("is_parameter")] or real


def element_support(distribution: Distribution) -> constraints.Constraint | None:
    """The support of each single element of a distribution's event."""
    support = distribution.support
    return support.base_constraint if isinstance(support, constraints.independent) else support


def _of_examples(msg: dict) -> bool:
    """Whether a site is in a plate that the run saw a part of: it is what is observed, or local to an example."""
    return any((frame.full_size or frame.size) > frame.size for frame in msg["cond_indep_stack"])


def prior_median(prior: Distribution) -> Tensor:
    """The median of each element of a continuous distribution, estimated from its draws, of its shape.

    It is taken on the unconstrained scale (`biject_to`), so that it lies in the support even of a simplex. Where it is
    infinite there, the value is that of 0 on that scale. It depends on no random state.
    """
    transform, count = biject_to(prior.support), _MOST_NUMBERS // max(1, prior.shape().numel())  # type: ignore[attr-defined]
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        draws = transform.inv(prior.sample(torch.Size([min(max(count, _FEWEST_DRAWS), _MOST_DRAWS) | 1])))
        return transform(draws.median(0).values.nan_to_num(0.0, 0.0, 0.0))  # type: ignore[no-any-return]


def _found(
    run: "_Run", model: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[str, dict]:
    with (
        evaluating(model),
        forked_random(*args, *kwargs.values()),
        pyro.validation_enabled(False),
        poutine.block(),
        own_parameters(),
        run,
        register_module_forward_pre_hook(run.note_parameters),
    ):
        model(*args, **kwargs)
    for name in run.parameters & run.sites.keys():
        run.sites[name]["infer"] = run.sites[name]["infer"] | {"is_parameter": True}
    return {name: site for name, site in run.sites.items() if name in run.parameters or not _of_examples(site)}


class _Run(Messenger):
    """Pyro handler: notes latent sites, and puts given values in the place of draws, or what needs no draw."""

    def __init__(self, given: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.given = given or {}
        self.sites: dict[str, dict] = {}
        self.parameters: set[str] = set()

    def note_parameters(self, module: nn.Module, inputs: object) -> None:
        """Note the names of the random parameters of a module that is called, and of those inside it."""
        for part in module.modules():
            if isinstance(part, PyroModule):
                names = part.__dict__.get("_pyro_samples", ())
                self.parameters |= {f"{part._pyro_name}.{name}".lstrip(".") for name in names}

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name, support = msg["name"], element_support(msg["fn"])
        if name in self.given:
            msg["value"] = self.given[name].to(msg["value"])
        elif support is constraints.real:
            msg["value"] = torch.zeros_like(msg["value"])
        elif support is not None and not support.is_discrete:
            msg["value"] = _median_or_draw(msg)
        if msg["infer"].get("is_parameter"):
            self.parameters.add(name)
        if name in self.sites:
            raise UserError(f"the model samples site {name!r} twice; every site needs a name of its own")
        self.sites[name] = msg


def _median_or_draw(msg: dict) -> Tensor:
    try:
        return prior_median(msg["fn"]).to(msg["value"])
    except NotImplementedError:
        # No transform leads to this support; whoever needs one refuses the site by name.
        return msg["value"]  # type: ignore[no-any-return]
