"""Priors that every forward pass computes anew: those with learnt parameters, and functions with Pyro statements.

A prior that never changes is a distribution, computed once. These two are not:

* A distribution with a tensor that requires a gradient, ``Normal(0, nn.Parameter(torch.tensor(0.1)))``. The module that
  has the random parameter gets a copy of that tensor as a parameter of its own, in unconstrained space (the logarithm
  of a scale), and `fit` trains it: empirical Bayes.
* A function of (site, shape) with ``pyro.sample`` or ``pyro.param`` statements: hyper-priors, or parameters in Pyro's
  store. The function runs in each forward pass, so the KL of the weights is the one given the drawn hyper-parameters.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints, transform_to

from ppl_bnn.errors import UserError
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.priors import (
    EvaluatedPrior,
    Prior,
    arguments_of,
    elementwise,
    fitted,
    map_tensors,
    number_text,
    prior_named,
    prior_text,
)
from ppl_bnn.models.random_network import site_prefix

# Of one network's priors: the tensor a parameter starts from, the parameter, and its first name in the network. Priors
# with one tensor share it.
Shared = dict[tuple[int, str], tuple[Tensor, nn.Parameter, str]]


def parameter_prior(net: nn.Module, name: str, prior: Prior, shared: Shared) -> TorchDistribution | EvaluatedPrior:
    """The prior of a network's parameter, with its device and dtype; learnt tensors go to the module that has it.

    Args:
        name: of the parameter, ``fc1.weight``; it is the site, too.
        shared: the learnt parameters of the network's other priors, to which new ones are added.

    Raises:
        UserError: the prior does not fit the site, or a tensor of it that requires a gradient cannot be learnt.
    """
    like, site = net.get_parameter(name), name
    found: Any = prior_named(prior, site)
    while callable(found) and not isinstance(found, TorchDistributionMixin):
        with _noted() as notes:
            result = found(site, like.shape)
        if notes.texts:
            fitted(result, site, like.shape)
            return _OfStatements(found, site, like, notes, result)
        found = result
    whole = fitted(found, site, like.shape)
    if learnt := _learnt_arguments(whole, site):
        return _WithLearnt(net, site, elementwise(whole), learnt, like, shared)
    return map_tensors(copy.deepcopy(whole), lambda tensor: tensor.to(like))


class _WithLearnt(EvaluatedPrior):
    """A distribution some of whose arguments are parameters of the network."""

    def __init__(
        self, net: nn.Module, site: str, prior: Any, learnt: Mapping[str, Tensor], like: Tensor, shared: Shared
    ) -> None:
        owner, dot, attribute = site.rpartition(".")
        self.site, self.event_shape, self.latents = site, like.shape, {}
        # The arguments that stay, beside the values that the learnt ones start from.
        start = type(prior)(**{name: getattr(prior, name).detach().clone() for name in arguments_of(prior)})
        self.start: Any = _converted(start, like)
        self.learnt: dict[str, str] = {}
        for name, tensor in learnt.items():
            constraint = prior.arg_constraints[name]
            own = f"{attribute}_prior_{'' if constraint is constraints.real else 'unconstrained_'}{name}"
            key = id(tensor), str(constraint)
            if key not in shared:
                start = transform_to(constraint).inv(tensor.detach().to(like, copy=True))
                shared[key] = tensor, nn.Parameter(start), f"{owner}{dot}{own}"
            net.get_submodule(owner).register_parameter(own, shared[key][1])
            self.learnt[name] = shared[key][2]
        words = [
            f"{name}={'learnt' if name in learnt else _text(getattr(prior, name))}" for name in arguments_of(prior)
        ]
        self.text = f"{type(prior).__name__}({', '.join(words)})"

    def __call__(self, net: Any) -> TorchDistribution:
        values = {name: getattr(self.start, name) for name in arguments_of(self.start)}
        for name, path in self.learnt.items():
            values[name] = transform_to(self.start.arg_constraints[name])(net.get_parameter(path))
        return fitted(type(self.start)(**values, validate_args=False), self.site, self.event_shape)


class _OfStatements(EvaluatedPrior):
    """A function of (site, shape) with Pyro statements, which are named by the site's place in the whole model."""

    def __init__(
        self,
        function: Callable[[str, Size], object],
        site: str,
        like: Tensor,
        notes: "_Notes",
        result: Any,
    ) -> None:
        self.function, self.site, self.event_shape = function, site, like.shape
        self.latents = notes.latents
        # It tells the parameter's device and dtype, wherever the network goes.
        self.like = like.detach().new_empty(0)
        own: str | None = getattr(function, "text", None)
        self.text = own or f"{type(elementwise(result)).__name__} given {', '.join(notes.texts)}"

    def __call__(self, net: Any) -> TorchDistribution:
        prefix = site_prefix(net)
        with _Statements(prefix, self.like, net._pyro_context):
            result: Any = _converted(self.function(self.site, self.event_shape), self.like)
        # Pyro's Predictive puts many draws of the hyper-parameters in front.
        batch = result.shape()[: -len(self.event_shape)] if isinstance(result, TorchDistributionMixin) else Size()
        found = fitted(result, self.site, self.event_shape, batch=batch)
        found.given = tuple(prefix + name for name in self.latents)  # type: ignore[attr-defined]
        return found


class _Statements(Messenger):
    """What a prior's statements meet first: their names, devices and dtypes become those of the parameter.

    A site that several priors sample (one scale for all of them) is sampled once in a forward pass.
    """

    def __init__(self, prefix: str, like: Tensor, context: Any) -> None:
        super().__init__()
        self.prefix, self.like, self.context = prefix, like, context

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        msg["name"] = self.prefix + msg["name"]
        known = self.context.get(msg["name"])
        if known is not None:
            msg["value"], msg["done"], msg["stop"] = known, True, True
        msg["fn"] = _converted(msg["fn"], self.like)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.context.set(msg["name"], msg["value"])

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        msg["name"] = self.prefix + msg["name"]
        msg["args"] = (msg["name"], *msg["args"][1:])


class _Notes(Messenger):
    """The sites that a function samples, and the text of each of its statements."""

    def __enter__(self) -> "_Notes":
        self.latents: dict[str, Size] = {}
        self.texts: list[str] = []
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.latents[msg["name"]] = msg["value"].shape
        self.texts.append(f"{msg['name']} ~ {prior_text(msg['fn'])}")

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        self.texts.append(f"pyro.param {msg['name']}")


@contextmanager
def _noted() -> Iterator[_Notes]:
    with own_parameters(), poutine.block(), _Notes() as notes:
        yield notes


def _learnt_arguments(prior: TorchDistribution, site: str) -> dict[str, Tensor]:
    """{argument: the tensor it is}, of the arguments that require a gradient."""
    base: Any = elementwise(prior)
    learnt = {name: getattr(base, name) for name in arguments_of(base)}
    found = {name: _leaf(value) for name, value in learnt.items() if isinstance(value, Tensor) and value.requires_grad}
    if not found and not _learns(prior):
        return {}
    for name, leaf in found.items():
        constraint = base.arg_constraints[name]
        if leaf is not None and not bool(constraint.check(leaf.detach()).all()):
            start = float(leaf.detach().min())
            raise UserError(
                f"the prior of site {site!r} has a learnt {name} that starts at {start:g}, outside its range "
                f"({constraint}): start it inside"
            )
    if not found or None in found.values() or base.event_dim:
        raise UserError(
            f"the prior of site {site!r} is a {type(base).__name__} with a tensor that is computed from a trainable "
            "one, which would be computed once: give it the parameter itself, as Normal(0., nn.Parameter(...)) does, "
            "or make the prior a function of (site, shape) that calls pyro.param"
        )
    return found  # type: ignore[return-value]


def _leaf(value: Tensor) -> Tensor | None:
    """The tensor that an argument is, seen through its repetition; None where it is computed from others."""
    node: Any = value.grad_fn
    if node is None:
        return value
    while type(node).__name__ == "ExpandBackward0":
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _text(value: Tensor) -> str:
    # A number beside a learnt tensor was repeated to its shape.
    first = value.flatten()[:1]
    return number_text(first if bool((value == first).all()) else value)


def _learns(distribution: Distribution) -> bool:
    values = vars(distribution).values()
    return any(value.requires_grad for value in values if isinstance(value, Tensor)) or any(
        _learns(value) for value in values if isinstance(value, Distribution)
    )


def _converted(found: Any, like: Tensor) -> Any:
    """A distribution with the device and dtype of `like`, as a copy; what is none is returned as it is."""
    if not isinstance(found, Distribution):
        return found
    new = copy.copy(found)
    new._validate_args = False
    for name, value in list(vars(found).items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(new, name, value.to(like))
        elif isinstance(value, Distribution):
            setattr(new, name, _converted(value, like))
    return new
