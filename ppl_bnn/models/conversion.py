"""`bayesian`: a copy of a torch network whose parameters are random."""

import copy
from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ppl_bnn.errors import UserError
from ppl_bnn.models.evaluated_priors import Shared, parameter_prior
from ppl_bnn.models.prior_parsing import parse_prior
from ppl_bnn.models.priors import Prior, check_patterns_used
from ppl_bnn.models.random_network import make_random, random_networks
from ppl_bnn.models.selection import Select, selected


def bayesian(
    net: nn.Module, prior: Prior | str | None = None, *, select: Select | None = None, bayesian_bias: bool = False
) -> nn.Module:
    """Return a copy of a torch network whose parameters are random, with a prior.

    The copy is of the same class (a subclass of it), with the same modules, parameters, ``state_dict`` keys and hooks;
    `net` itself is not touched. Called, it samples its random parameters as Pyro sites, named by their path
    (``fc1.weight``), and runs the network's own forward pass with them, whatever that does with them. So any kind of
    layer will do: convolutions, embeddings, recurrent and attention layers, a parameter of the network's own. A weight
    that is used twice, or shared by two modules (one site, named by the first), has one draw.

    By default every trainable parameter of two or more dimensions is random, outside of normalization layers: weights,
    but no biases. Everything else stays a point estimate. What is frozen (``requires_grad=False``) stays frozen, before
    and after the conversion, and a module in evaluation mode stays in evaluation mode. The copy's parameters hold the
    values from before; a part of it that is called alone, outside of the whole network's call, has these.

    Activation checkpointing (``torch.utils.checkpoint``) of parts of the network sees the same draw in the
    recomputation.

    Args:
        net: any torch network.
        prior: see `ppl_bnn.models.priors`, or the text of one as settings have it, ``"normal(0, 0.1)"``; the default is
            Normal(0, 1) for every random parameter. Tensors in it that require a gradient are learnt: the copy has
            parameters of its own that start from them. A mapping selects by itself: what no pattern of it matches, or
            one with the value None, stays a point estimate; a parameter's full name in it selects biases and
            normalization parameters too.
        select: which parameters are random instead of the default's: a pattern of names (``"head.*"``) or several,
            module types (``nn.Linear``: their parameters of two or more dimensions; of a normalization layer all), or a
            function of (site, parameter) that returns whether.
        bayesian_bias: make the biases beside random weights random too.

    Raises:
        UserError: nothing is selected, a pattern matches nothing, or only frozen parameters; a network that is random
            already, that Pyro made (a `PyroModule`), that is compiled, whose parameters have no shape yet (a lazy
            layer), or that cannot be copied; a hook on a parameter; a complex parameter, or one with sparse gradients;
            a prior that does not fit.
    """
    prior = dist.Normal(0.0, 1.0) if prior is None else prior
    if isinstance(prior, str):
        prior = parse_prior(prior)
    elif isinstance(prior, Mapping):
        prior = {name: parse_prior(own) if isinstance(own, str) else own for name, own in prior.items()}
    _check(net)
    names = selected(net, prior, select, bayesian_bias=bayesian_bias)
    _check_selected(net, names)
    net = _copy(net)
    _draw_as_before(net, names)
    shared: Shared = {}
    make_random(net, {name: parameter_prior(net, name, prior, shared) for name in names})
    check_patterns_used(prior, names)
    return net


def _check(net: nn.Module) -> None:
    for path, _ in random_networks(net):
        raise UserError(
            f"{path or type(net).__name__!r} has random parameters already: convert the whole network once, with a "
            "mapping of priors or `select` for its parts"
        )
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            raise UserError(
                f"{path or 'the network'!r} is compiled ({type(module).__name__}), and its forward pass may keep the "
                "parameters it was compiled with: convert the network as it was before"
            )
        if isinstance(module, PyroModule) and module._parameters:
            raise UserError(
                f"{path or 'the network'!r} is a PyroModule, which tells Pyro of its parameters itself: give it priors "
                "by PyroSample, or write it as a torch module"
            )
    for path, parameter in net.named_parameters():
        if is_lazy(parameter):
            raise UserError(f"parameter {path!r} has no shape yet: run the network once on an input, then convert it")
        # A copy of a parameter has none of its hooks.
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"parameter {path!r} has a hook, which conversion would drop; register it afterwards")


def _check_selected(net: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        layer, parameter = net.get_submodule(name.rpartition(".")[0]), net.get_parameter(name)
        if not parameter.is_floating_point():
            raise UserError(f"parameter {name!r} is {parameter.dtype}; random ones are real: leave it out by `select`")
        if getattr(layer, "sparse", False):
            raise UserError(f"{type(layer).__name__} has sparse gradients, and a draw of {name!r} none: sparse=False")


def _copy(net: nn.Module) -> nn.Module:
    # A weight that hooks make of other parameters (weight_norm) is an attribute with a gradient, which has no copy.
    computed = {
        id(value): value.detach().clone()
        for module in net.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        return copy.deepcopy(net, computed)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{type(net).__name__} cannot be copied: {error}") from error


def _draw_as_before(net: nn.Module, names: Sequence[str]) -> None:
    # Version 0.1.0 drew a layer's initial values here. With the same draws a seed gives the same training.
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for path in layers:
        layer = net.get_submodule(path)
        if type(layer) in (nn.Linear, nn.Conv2d):
            for value in layer.parameters():
                torch.rand(value.shape)
