"""What the estimators share: they know the posterior of each weight, and see every function that uses one."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.guides.normal import FactorizedNormal
from ppl_bnn.models.drawn import Use
from ppl_bnn.models.evaluating import forked_random


class Uses(Messenger):
    """Pyro handler: notes which sites have a use that `Estimator` leaves to the plain draw.

    Run models of two different numbers of examples under it: a dimension of positions that happens to be as long as the
    examples then shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plain_sites: set[str] = set()

    def _pyro_bayes_function(self, msg: dict) -> None:
        use: Use = msg["args"][0]
        self.plain_sites |= set() if use.by_example else set(use.sites)


class Estimator(Messenger):
    """Pyro handler: computes what it can of a network's functions in its own way, and leaves the rest to the draws.

    It computes layers (`ppl_bnn.models.drawn.LAYERS`: linear maps and convolutions, whoever calls them), whose input
    has the examples in dimension 0, with a weight that the guide gave. Other uses of a weight, through a recurrent
    layer, say, or a matrix product, have the plain draw. A weight that is used in both ways has it in all of its uses,
    so that each example has one weight.

    A training step that no other handler listens to calls it without Pyro's messages: `start`, then `answer`.

    Attributes:
        posterior: the guide's distribution of each site in this forward pass; a site that has none, one that was
            conditioned or drawn from its prior, is absent.
        plain_sites: sites that have the plain draw wherever they are used (`fit` sets it, by a look at the network).
        takes_variance: whether `layer` takes a weight's variance and no draw of it.
        copies: number of draws that differ in signs which `layer` takes (`FactorizedNormal.copies`).
    """

    posterior: dict[str, FactorizedNormal]
    takes_variance: ClassVar[bool] = False
    copies = 1

    def __init__(self) -> None:
        super().__init__()
        self.plain_sites: Collection[str] = ()

    def __enter__(self) -> Self:
        self.start({})
        return super().__enter__()

    def start(self, posterior: Mapping[str, FactorizedNormal]) -> None:
        """Begin a forward pass with draws from these distributions, {site: distribution}."""
        self.posterior = dict(posterior)
        self._answered: set[str] = set()
        self._plain: set[str] = set()
        self._kept: dict[str, dict[Any, Tensor]] = {}

    def kept(self, site: str) -> dict[Any, Tensor]:
        """What the estimator has drawn for a site in this forward pass, which every use of the site shares."""
        return self._kept.setdefault(site, {})

    def _pyro_post_sample(self, msg: dict) -> None:
        # The model's own sample of the site carries the guide's `infer`, if its value was replayed from there.
        name = msg["name"]
        self.posterior.pop(name, None)
        self._kept.pop(name, None)
        self._answered.discard(name)
        self._plain.discard(name)
        if "posterior" in msg["infer"]:
            self.posterior[name] = msg["infer"]["posterior"]

    def _pyro_bayes_function(self, msg: dict) -> None:
        msg["value"], msg["done"] = self.answer(msg["args"][0]), True

    def answer(self, use: Use) -> Any:
        """What a function with random parameters gives.

        Raises:
            UserError: it uses a site that this forward pass gave each example a weight of its own of.
        """
        site = use.sites[0]
        if use.by_example and site in self.posterior and site not in self._plain and site not in self.plain_sites:
            self._answered.add(site)
            return self.layer(site, use)
        for site in use.sites:
            if site in self._answered and site in self.posterior:
                raise UserError(
                    f"the network uses {site!r} in a layer and then in another function, where "
                    f"{type(self).__name__} cannot give each example a weight of its own: use the estimator plain, or "
                    f"name the site in plain_sites"
                )
            self._plain.add(site)
        return self.plain_use(use)

    @abstractmethod
    def layer(self, site: str, use: Use) -> Tensor:
        """The outputs of a layer with the weight `site`."""

    def plain_use(self, use: Use) -> Any:
        """Another use of random parameters: torch's own function of the draws."""
        return use.plainly()


def kept_noise(kept: dict[Any, Tensor], name: Any, draw: Callable[[], Tensor]) -> Tensor:
    """The noise of this name in the forward pass: that of its first use.

    ``torch.utils.checkpoint`` runs a part of the network again from the same state of the generator. Noise that was
    drawn in that part is then drawn once more, so that what draws behind it (dropout) finds the generator as it was.
    """
    if name not in kept:
        kept[name] = draw()
    elif torch._C._current_graph_task_id() != -1:
        with forked_random(kept[name]):
            here = torch.equal(draw(), kept[name])
        if here:
            draw()
    return kept[name]
