"""A network with random parameters: the user's own modules, some of whose parameters each call draws anew.

The parameters stay where they are. During a call, and during its back-propagation, the draw stands in their place, so
the forward pass may use them however it likes: through layers, functions or tensor methods, once or several times.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from ppl_bnn.errors import UserError
from ppl_bnn.models.drawn import Drawn, as_drawn
from ppl_bnn.models.listeners import heard
from ppl_bnn.models.priors import EvaluatedPrior, map_tensors, prior_text


@dataclass
class RandomParameter:
    """One site: its prior, and every place that the network has the parameter in (several where weights are tied)."""

    prior: TorchDistribution | EvaluatedPrior
    places: list[tuple[nn.Module, str]]

    @property
    def point(self) -> nn.Parameter:
        """The parameter itself, which holds the value from before the conversion."""
        module, name = self.places[0]
        return module._parameters[name]  # type: ignore[return-value]


class RandomNetwork(PyroModule):
    """What `bayesian` adds to the class of a network. Called, it samples its random parameters as Pyro sites.

    A PyroModule for its place in a PyroModule of the user's own, which gives its sites their prefix. Attributes are
    those of the network's own class, without Pyro's messages.
    """

    # Class attributes, for an object that the network's own methods make of its class (a slice of a Sequential).
    _plain: type[nn.Module]
    _random: Mapping[str, RandomParameter] = {}
    _recurrent: Sequence[nn.RNNBase] = ()
    _given = False
    _estimated: Sequence[Drawn] = ()
    _kept: tuple[list[tuple[dict[str, Any], str, Any]], list[tuple[nn.RNNBase, dict[str, Any]]]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = partial(super(PyroModule, self).__call__, *args, **kwargs)
        if not self._random or self._given:
            if self._estimated:
                examples = _number_of_examples(args, kwargs)
                for value in self._estimated:
                    value.examples = examples
            return call()
        if torch._C._current_graph_task_id() != -1:
            raise UserError(
                f"the whole {type(self).__name__} runs again during back-propagation (torch.utils.checkpoint does "
                "this), where its weights are no longer the draw of the forward pass; checkpoint parts of it instead"
            )
        with self.__dict__["_pyro_context"]:
            drawn, many = self._sampled(args, kwargs)
        if many:
            # Pyro's Predictive with parallel=True, whose draws come all at once.
            return torch.stack([self._with(_at(drawn, s, self._random), call) for s in range(many)])
        return self._with(drawn, call)

    def _sampled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """The draws of the random parameters, and their number where it is not one; Pyro is told of the others."""
        prefix, context = site_prefix(self), self.__dict__["_pyro_context"]
        if heard("param"):
            for name, parameter in self.named_parameters():
                # Its store would set `requires_grad`.
                if parameter.requires_grad:
                    pyro.param(prefix + name, parameter)
        for_estimators, drawn, many = heard("bayes_function"), {}, 0
        examples = _number_of_examples(args, kwargs) if for_estimators else None
        for name, random in self._random.items():
            value = context.get(prefix + name)
            if value is None:
                prior: Any = random.prior
                if isinstance(prior, EvaluatedPrior):
                    prior = prior(self)
                value = pyro.sample(prefix + name, prior, infer={"is_parameter": True})
                shape = random.point.shape
                if value.shape != shape:
                    # Draws of a guide that has plates have dimensions of size 1 in front.
                    draws = value.numel() // max(1, shape.numel())
                    value = value.reshape(shape if draws == 1 else (draws, *shape))
                    many = many if draws == 1 else draws
                context.set(prefix + name, value)
            elif value.dim() > random.point.dim():
                many = len(value)
            drawn[name] = as_drawn(value, prefix + name, examples) if for_estimators and value.dim() > 1 else value
        return drawn, many

    def _with(self, values: Mapping[str, Tensor], call: Callable[[], Any]) -> Any:
        """Call with these values in place, and bring them back whenever back-propagation passes through the output."""
        self._put(values)
        try:
            output = call()
        finally:
            self._restore()
        if torch.is_grad_enabled():
            for tensor in (output,) if isinstance(output, Tensor) else tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    # What torch.utils.checkpoint computes a second time then sees the same draw.
                    tensor.register_hook(partial(self._put_again, values))
        return output

    def _put_again(self, values: Mapping[str, Tensor], gradient: Tensor) -> None:
        self._put(values)
        Variable._execution_engine.queue_callback(self._restore)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        self._restore()
        kept = []
        for name, value in values.items():
            for module, attribute in self._random[name].places:
                parameters = module.__dict__["_parameters"]
                kept.append((parameters, attribute, parameters[attribute]))
                parameters[attribute] = value
        flat = []
        for recurrent in self._recurrent:
            # It keeps its weights in a list too.
            flat.append((recurrent, {key: recurrent.__dict__[key] for key in _FLAT if key in recurrent.__dict__}))
            recurrent.__dict__["_flat_weights"] = [getattr(recurrent, name) for name in recurrent._flat_weights_names]
        self.__dict__["_kept"] = kept, flat

    def _restore(self) -> None:
        if self._kept is None:
            return
        kept, flat = self._kept
        for parameters, attribute, value in kept:
            parameters[attribute] = value
        for recurrent, values in flat:
            recurrent.__dict__.update(values)
        del self.__dict__["_kept"]

    def __getattr__(self, name: str) -> Any:
        return super(PyroModule, self).__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super(PyroModule, self).__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super(PyroModule, self).__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        self._restore()
        return _new, (type(self)._plain,), self.__getstate__()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for random in self._random.values():
            map_tensors(random.prior, fn)
        return super()._apply(fn, recurse)


# What a recurrent layer knows its weights by.
_FLAT = ("_flat_weights", "_flat_weight_refs")


@cache
def random_class(plain: Any) -> type[RandomNetwork]:
    """The class of a network with random parameters whose own class is `plain`."""
    kinds = type(RandomNetwork), type(plain)
    meta = kinds[0] if issubclass(kinds[0], kinds[1]) else type("Both", kinds, {})
    own: dict[str, Any] = {"__module__": plain.__module__, "__doc__": plain.__doc__, "_plain": plain}
    if issubclass(plain, nn.Sequential):
        own["__getitem__"] = _slice_of_plain
    return meta(f"Bayesian{plain.__name__}", (RandomNetwork, plain), own)  # type: ignore[no-any-return]


def _slice_of_plain(net: Any, at: Any) -> nn.Module:
    # A slice is made by the network's class, and is no random network: it has the layers that this network draws.
    if isinstance(at, slice):
        return net._plain(OrderedDict(list(net._modules.items())[at]))
    return net._plain.__getitem__(net, at)


def _new(plain: Any) -> nn.Module:
    """An empty object to copy or unpickle into."""
    found: type[nn.Module] = random_class(plain)
    return found.__new__(found)


def make_random(net: nn.Module, priors: Mapping[str, TorchDistribution | EvaluatedPrior]) -> None:
    """Turn a network, in place, into one with these random parameters, {path: prior}."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    random = {path: RandomParameter(prior, places[id(net.get_parameter(path))]) for path, prior in priors.items()}
    for one in random.values():
        # Its point is not trained: the guide's loc is.
        one.point.requires_grad_(False)
    net.__dict__.update({name: value for name, value in vars(PyroModule()).items() if name.startswith("_pyro")})
    net.__dict__["_random"] = random
    net.__dict__["_recurrent"] = [module for module in net.modules() if isinstance(module, nn.RNNBase)]
    kind: Any = type(net)
    net.__class__ = random_class(kind)


def site_prefix(net: Any) -> str:
    """What stands before a parameter's name in its site's: the path in a PyroModule around the network, if any."""
    return f"{net._pyro_name}." if net._pyro_name else ""


def random_networks(model: object) -> Iterator[tuple[str, RandomNetwork]]:
    """The networks with random parameters among a model's modules, with their paths."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, RandomNetwork) and module._random:
            yield path, module


def random_sites(model: object) -> dict[str, tuple[str, RandomParameter]]:
    """{site: (path of its parameter in the model, the parameter)} of all networks with random parameters in a model."""
    return {
        site_prefix(net) + name: (f"{path}.{name}".lstrip("."), random)
        for path, net in random_networks(model)
        for name, random in net._random.items()
    }


def random_ids(model: nn.Module) -> set[int]:
    """The identities of a model's random parameters, as `nn.Module` lists them outside of calls."""
    return {id(random.point) for _, random in random_sites(model).values()}


def point_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of a model's parameters that are not random."""
    hidden = random_ids(model)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in hidden}


def point_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` without its random parameters, which the posterior has."""
    hidden = random_ids(model)
    names = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in hidden}
    return {name: value for name, value in model.state_dict().items() if name not in names}


def load_points(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `point_state` gave; random parameters keep their points."""
    # With the versions of its modules, which some ask for.
    whole = model.state_dict()
    whole.update(state)
    model.load_state_dict(whole)


def priors_of(model: nn.Module) -> dict[str, str]:
    """The prior of each random parameter of a model, as text, by the parameter's path in the model."""
    return {path: prior_text(random.prior) for path, random in random_sites(model).values()}


class given:
    """Context manager: a model's random parameters are a draw's {site: [*shape]}, and calls sample nothing.

    It may be entered again and again. Values may be `Drawn`, whose estimator then computes what it can.
    """

    def __init__(self, model: nn.Module, draw: Mapping[str, Tensor]) -> None:
        self._nets = []
        for _, net in random_networks(model):
            values = {name: draw[site_prefix(net) + name] for name in net._random}
            self._nets.append((net, values, [value for value in values.values() if isinstance(value, Drawn)]))

    def __enter__(self) -> None:
        for net, values, estimated in self._nets:
            net._put(values)
            net.__dict__["_given"], net.__dict__["_estimated"] = True, estimated

    def __exit__(self, *error: object) -> None:
        for net, _, _ in self._nets:
            net._restore()
            net.__dict__.pop("_given", None)
            net.__dict__.pop("_estimated", None)


def _at(drawn: Mapping[str, Tensor], number: int, random: Mapping[str, RandomParameter]) -> dict[str, Tensor]:
    """Draw `number` of many at once; a parameter that has one draw keeps it."""
    return {name: value[number] if value.dim() > random[name].point.dim() else value for name, value in drawn.items()}


def _number_of_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    if args and isinstance(args[0], Tensor) and args[0].dim():
        return len(args[0])
    tensors = (value for value in chain(tree_leaves(args), tree_leaves(dict(kwargs))) if isinstance(value, Tensor))
    return next((len(value) for value in tensors if value.dim()), None)
