"""One run of a model with the values of a draw: what it is called with, and which sites are left over."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior, WithLatents, parameters_of
from ppl_bnn.inputs import Inputs, call, count, lead
from ppl_bnn.models.evaluating import evaluating, forked_random, seed_random
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.models.model import Model
from ppl_bnn.models.param_store import own_parameters

ADVICE = "build the guide of this network: MeanFieldNormal(model, x[:1], y[:1]), and predict with the whole model"


@dataclass(frozen=True)
class Target:
    """What is predicted: the outputs of a network, and the distribution of y that they are parameters of.

    Attributes:
        net: the network, [N, ...] -> outputs [N, *]; of a user's own Pyro model, the model.
        likelihood: p(y | outputs).
        outputs: of draw 0, for n <= 2 examples.
        latents: what the likelihood takes beside outputs in draw 0.
        site: the observed site of a user's own Pyro model, whose distribution the outputs are parameters of.
    """

    net: nn.Module
    likelihood: Likelihood
    outputs: Tensor
    latents: dict[str, Tensor]
    site: str | None = None


def given_latents(likelihood: Likelihood, draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a likelihood takes beside outputs, its random variables as they are in a draw of the posterior."""
    with poutine.block(), torch.no_grad(), GivenSites(draw):
        return likelihood.latents()


def drawn_latents(posterior: Posterior, index: int, sign: float = 1.0, *, seed: int) -> Mapping[str, Tensor]:
    """The sites of a draw that are no weights; of a posterior without `draw_latents`, all of its sites.

    Mirror images are of posteriors with noise, which have all they have beside weights from `draw_latents`.
    """
    if isinstance(posterior, WithLatents):
        return posterior.draw_latents(index, seed=seed, sign=sign)
    return posterior.draw(index, seed=seed) if sign == 1 else {}


def latents_of_draw(
    likelihood: Likelihood, posterior: Posterior, draw: int, *, seed: int, sampling: str = "independent"
) -> dict[str, Tensor]:
    """What a likelihood takes beside outputs in a draw of a predictive, by the draw's number."""
    return given_latents(likelihood, drawn_latents(posterior, *of_number(draw, sampling), seed=seed))


def of_number(draw: int, sampling: str) -> tuple[int, float]:
    """The posterior's draw and sign behind draw number `draw`: antithetic draws 2k and 2k + 1 are mirror images."""
    return (draw // 2, (-1.0) ** draw) if sampling == "antithetic" else (draw, 1.0)


def run_with(
    model: Callable[..., Any], draw: Mapping[str, Tensor], x: Inputs, given: tuple[Any, ...], *, seed: int | None = None
) -> tuple[Any, "GivenSites"]:
    """Run the model with a draw's values, in evaluation mode; return what it returns, and its sites.

    Args:
        x: tells the device, whose random state is as it was afterwards.
        given: what the model is called with.
        seed: of random sites that have no value.
    """
    sites = GivenSites(draw)
    with evaluating(model), forked_random(lead(x)), poutine.block(), own_parameters(), sites:
        if seed is not None:
            seed_random(seed, lead(x))
        if isinstance(model, nn.Module) and not isinstance(model, Model | Function) and len(given) == 1:
            return call(model, x), sites
        return model(*given), sites


def parameter_of(model: object, posterior: object) -> Tensor:
    """A parameter of the model or the posterior in floating point, which tells device and dtype of inputs."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    more = parameters_of(posterior).values() if isinstance(posterior, Posterior) else ()
    return next((value for value in chain(parameters, more) if value.is_floating_point()), torch.empty(0))


def takes_y(model: Callable[..., Any]) -> bool:
    """Whether a model can be called with a second argument."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def arguments(model: Callable[..., Any], x: Inputs, y: object) -> tuple[Any, ...]:
    """What a model is called with: x, and the first of y where it cannot do without (``def model(x, y)``)."""
    needed = required(model)
    # A network's several inputs take several arguments, none of which is y.
    network = isinstance(model, nn.Module) and not isinstance(model, Model)
    if len(needed) < 2 or (network and not isinstance(x, Tensor)):
        return (x,)
    if y is None:
        raise UserError(f"the model cannot run without {needed[1]!r}: give it a default of None to predict without y")
    return x, torch.as_tensor(y)[: count(x)]


def required(model: Callable[..., Any]) -> list[str]:
    """Names of the positional arguments that a model cannot be called without; none where that cannot be told."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [one.name for one in found if one.default is one.empty and one.kind in kinds]


class Function(nn.Module):
    """A Pyro function as a module without parameters of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object) -> Any:
        """What the function returns."""
        return self.function(*args)


class GivenSites(Messenger):
    """Gives random sites their drawn values. By Pyro, which sees the sites of any network, not of our layers alone.

    Sites in a plate that have no value are `observable`: what the model says about y.
    """

    def __init__(self, draw: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.draw, self.given = draw, set[str]()
        self.lacking: list[str] = []
        self.observable: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"] or (name not in self.draw and msg["cond_indep_stack"]):
            self.observable[name] = msg
            return
        if name not in self.draw:
            self.lacking.append(name)
            return
        shape, value = msg["fn"].shape(), self.draw[name]
        if value.shape != shape:
            raise UserError(
                f"site {name!r} is {list(shape)} in the network and {list(value.shape)} in the posterior; {ADVICE}"
            )
        self.given.add(name)
        msg["value"], msg["is_observed"] = value, True
