"""What the estimators share: they know the posterior of each weight that the model uses."""

from typing import Self

from pyro.poutine.messenger import Messenger

from ppl_bnn.guides.normal import FactorizedNormal


class KnowsPosteriors(Messenger):
    """Pyro handler: remembers, for the step, which distribution of the guide a site's value was drawn from.

    Attributes:
        posterior: the guide's distribution of each site; a site that has none, one that was conditioned or drawn from
            its prior, is absent.
    """

    posterior: dict[str, FactorizedNormal]

    def __enter__(self) -> Self:
        self.posterior = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        # The model's own sample of the site carries the guide's `infer`, if its value was replayed from there.
        self.posterior.pop(msg["name"], None)
        if "posterior" in msg["infer"]:
            self.posterior[msg["name"]] = msg["infer"]["posterior"]
