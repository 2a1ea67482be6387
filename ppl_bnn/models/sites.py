"""The latent sites of a Pyro model, found by one run that needs no draw of the weights."""

from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution, constraints

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.param_store import own_parameters


def latent_sites(model: Callable[..., object], *args: object, **kwargs: object) -> dict[str, dict]:
    """Pyro's message of each latent site, in the model's order: ``fn`` is its prior, ``value`` has its shape and dtype.

    Real-valued sites have the value 0 in this run. A prior's draw would overflow in a deep network: at Normal(0, 1) the
    outputs grow by the square root of each layer's width. The run changes neither the model, nor the random state, nor
    Pyro's parameter store.

    Args:
        *args, **kwargs: what the model runs with; one example is enough.

    Raises:
        UserError: two sites have the same name.
    """
    handler = _Zeros()
    with (
        evaluating(model),
        forked_random(*args, *kwargs.values()),
        pyro.validation_enabled(False),
        poutine.block(),
        own_parameters(),
        handler,
    ):
        model(*args, **kwargs)
    return handler.sites


def element_support(distribution: Distribution) -> constraints.Constraint | None:
    """The support of each single element of a distribution's event."""
    support = distribution.support
    return support.base_constraint if isinstance(support, constraints.independent) else support


class _Zeros(Messenger):
    """Pyro handler: notes latent sites and puts zeros in the place of a real-valued draw."""

    def __enter__(self) -> "_Zeros":
        self.sites: dict[str, dict] = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if element_support(msg["fn"]) is constraints.real:
            msg["value"] = torch.zeros_like(msg["value"])
        if msg["name"] in self.sites:
            raise UserError(f"the model samples site {msg['name']!r} twice; every site needs a name of its own")
        self.sites[msg["name"]] = msg
