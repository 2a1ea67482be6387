"""`bayesian`: a copy of a torch network whose Linear and Conv2d weights are random."""

import copy
from collections import OrderedDict
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluated_priors import Shared
from ppl_bnn.models.layers import BayesianConv2d, BayesianLinear, ConstantIfFrozen
from ppl_bnn.models.priors import Prior, check_patterns_used

_BAYESIAN: dict[type[nn.Module], type[BayesianLinear] | type[BayesianConv2d]] = {
    nn.Linear: BayesianLinear,
    nn.Conv2d: BayesianConv2d,
}
# Layers that are matrix products too. To leave them deterministic without a word would not be what was asked for.
_REFUSED = (nn.Linear, nn.modules.conv._ConvNd, RNNBase, RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def bayesian(net: nn.Module, prior: Prior | None = None, *, bayesian_bias: bool = False) -> nn.Module:
    """Return a copy of a torch network whose Linear and Conv2d weights are random, with a prior.

    Sites are named by module path (``fc1.weight``). Everything else stays a point estimate: biases, normalization
    layers, embeddings, and every ``nn.Parameter`` of the network's own classes. So does a layer whose weight is frozen
    (``requires_grad=False``). What is frozen stays frozen, before and after the conversion, and a layer in evaluation
    mode stays in evaluation mode.

    The copy has the same layer objects everywhere the network has them, in Python lists and dicts too, and keeps their
    hooks.

    Activation checkpointing (``torch.utils.checkpoint``) computes a layer a second time, without the posterior's draw.
    It cannot be seen here: the first training step refuses it.

    Args:
        net: any network with ``nn.Linear`` or ``nn.Conv2d`` layers.
        prior: see `ppl_bnn.models.priors`; the default is Normal(0, 1) for every weight. Tensors in it that require a
            gradient are learnt: the copy has parameters of its own that start from them.
        bayesian_bias: give the biases of those layers the prior too (a site named ``fc1.bias``).

    Raises:
        UserError: no such layer; a layer that has weights and cannot be converted (a convolution of another kind, a
            recurrent or an attention layer, a subclass of Linear); a layer or a random weight that is shared; a weight
            that other parameters make (``spectral_norm``, ``weight_norm``); a hook on a parameter; a prior that does
            not fit.
    """
    prior = dist.Normal(0.0, 1.0) if prior is None else prior
    random = _random_parameters(net, bayesian_bias)
    if not random:
        raise UserError(f"{type(net).__name__} has no nn.Linear or nn.Conv2d layer with a weight to train")
    try:
        net = copy.deepcopy(net)
    except RuntimeError as error:
        raise UserError(f"{type(net).__name__} cannot be copied: {error}") from error
    layers = {net.get_submodule(path) for path in random}
    # Children first: a parent gives its children their names.
    for module in reversed(list(net.modules())):
        _change_class(module, becomes_random=module in layers)
    shared: Shared = {}
    for path, names in random.items():
        layer = net.get_submodule(path)
        # Version 0.1.0 drew a layer's initial values here. With the same draws a seed gives the same training.
        for value in layer.parameters():
            torch.rand(value.shape)
        for name in names:
            layer.make_random(name, prior, path, shared)  # type: ignore[operator]
    check_patterns_used(prior, [f"{path}.{name}" if path else name for path, names in random.items() for name in names])
    return net


def _random_parameters(net: nn.Module, bayesian_bias: bool) -> dict[str, list[str]]:
    """{path of a layer: names of its parameters that become random}; UserError for what conversion would change."""
    _check_tensor_hooks(net)
    random: dict[str, list[str]] = {}
    seen: dict[int, str] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        if seen.setdefault(id(module), path) != path:
            raise UserError(
                f"{path!r} is the same module as {seen[id(module)]!r}; a shared layer cannot be made Bayesian"
            )
        if type(module) in _BAYESIAN:
            _check_layer(path, module)
            if module.weight.requires_grad:
                with_bias = bayesian_bias and module.bias is not None and module.bias.requires_grad
                random[path] = ["weight", "bias"] if with_bias else ["weight"]
        elif isinstance(module, _REFUSED):
            raise UserError(
                f"layer {path!r} is a {type(module).__name__}, which cannot be made Bayesian; "
                "nn.Linear and nn.Conv2d can, and a layer that is frozen stays as it is"
            )
    _check_tied(net, {f"{path}.{name}".lstrip(".") for path, names in random.items() for name in names})
    return random


def _check_layer(path: str, layer: nn.Module) -> None:
    if layer._parameters.get("weight") is None:
        raise UserError(
            f"the weight of layer {path!r} is computed from other parameters (spectral_norm, weight_norm or pruning "
            "of torch.nn.utils), so it cannot be made random; remove that first"
        )
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise UserError(f"layer {path!r} has padding_mode {layer.padding_mode!r}; a Bayesian Conv2d pads with zeros")


def _check_tied(net: nn.Module, random: set[str]) -> None:
    paths: dict[int, list[str]] = {}
    for path, parameter in net.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    for first, *others in paths.values():
        if others and not random.isdisjoint([first, *others]):
            raise UserError(f"{others[0]!r} is the same parameter as {first!r}; tied weights cannot be made Bayesian")


def _check_tensor_hooks(net: nn.Module) -> None:
    # A copy of a parameter has none of its hooks.
    for path, parameter in net.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"parameter {path!r} has a hook, which conversion would drop; register it afterwards")


def _change_class(module: nn.Module, *, becomes_random: bool) -> None:
    # The object stays, so that lists, hooks and attributes that hold it hold the converted layer.
    plain = type(module)
    to_pyro_module_(module, recurse=False)
    module.__class__ = _BAYESIAN[plain] if becomes_random else _pyro_class(plain)  # type: ignore[arg-type]


@cache
def _pyro_class(plain: type[nn.Module]) -> type[nn.Module]:
    class Converted(ConstantIfFrozen, PyroModule[plain]):  # type: ignore[misc,valid-type]
        def __reduce__(self) -> tuple[Any, ...]:
            return _new, (plain,), self.__getstate__()

    class ConvertedSequential(Converted):
        def __getitem__(self, at: Any) -> nn.Module:
            # A slice of Pyro's own kind would rename the sites of the layers in it.
            if isinstance(at, slice):
                return plain(OrderedDict(list(self._modules.items())[at]))
            return nn.Sequential.__getitem__(self, at)  # type: ignore[arg-type]

    found = ConvertedSequential if issubclass(plain, nn.Sequential) else Converted
    found.__name__ = found.__qualname__ = f"Pyro{plain.__name__}"
    return found


def _new(plain: type[nn.Module]) -> nn.Module:
    """An empty object to copy or unpickle into."""
    found: type[nn.Module] = _pyro_class(plain)  # type: ignore[arg-type]
    return found.__new__(found)
