"""Which parameters of a network become random."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ppl_bnn.errors import UserError, some
from ppl_bnn.models.priors import Prior, unused_pattern

Select: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, Tensor], bool]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def selected(net: nn.Module, prior: Prior, select: Select | None, *, bayesian_bias: bool = False) -> list[str]:
    """Names of the parameters that become random, in the network's order; arguments as of `bayesian`.

    A parameter that several modules share has the name of the first.

    Raises:
        UserError: none is selected; a pattern or type matches none, or only frozen ones.
    """
    parameters = dict(net.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if select is None:
        found = trainable_weights(net)
        if isinstance(prior, Mapping):
            found |= {name for name in trainable if prior.get(name) is not None}
    else:
        found = _asked_for(net, select, parameters, trainable)
    if isinstance(prior, Mapping):
        _check_priors(prior, parameters, trainable)
        found = {name for name in found if not _is_left_out(prior, name, asked=select is not None)}
    if bayesian_bias:
        biases = {name for name in trainable if _is_bias_of(name, found)}
        found |= {name for name in biases if not (isinstance(prior, Mapping) and _is_left_out(prior, name, asked=True))}
    names = [name for name in trainable if name in found]
    if not names:
        frozen = "" if trainable else ", for all of it is frozen"
        raise UserError(
            f"{type(net).__name__} has no parameter to make random{frozen}; by default these are the trainable ones of "
            f"two or more dimensions outside of normalization layers; it has {some(parameters, 6)}"
        )
    return names


def trainable_weights(net: nn.Module) -> set[str]:
    """Names of the trainable parameters of two or more dimensions outside of normalization layers."""
    return {name for name, one in net.named_parameters() if one.requires_grad and _is_weight(net, name, one)}


def _asked_for(net: nn.Module, select: Any, parameters: Mapping[str, Tensor], trainable: list[str]) -> set[str]:
    if callable(select) and not isinstance(select, type):
        return {name for name in trainable if select(name, parameters[name])}
    found: set[str] = set()
    for one in [select] if isinstance(select, str | type) else select:
        if isinstance(one, str):
            matches = [name for name in parameters if fnmatchcase(name, one)]
            what = f"the pattern {one!r} of select"
        elif isinstance(one, type) and issubclass(one, nn.Module):
            matches = [name for name in parameters if _is_of_type(net, name, parameters[name], one)]
            what = f"select={one.__name__}"
        else:
            raise UserError(
                f"select must be patterns of names, module types, or a function of (site, parameter); got {one!r:.60}"
            )
        if not matches:
            raise UserError(f"{what} matches no parameter; the network has {some(parameters, 6)}")
        if not set(matches) & set(trainable):
            raise UserError(f"{what} matches only frozen parameters, {some(matches, 6)}: unfreeze them first")
        found |= set(matches) & set(trainable)
    return found


def _check_priors(prior: Mapping[str, Any], parameters: Mapping[str, Tensor], trainable: list[str]) -> None:
    if (pattern := unused_pattern(prior, parameters)) is not None:
        raise UserError(f"the prior's pattern {pattern!r} matches no parameter; the network has {some(parameters, 6)}")
    for pattern, value in prior.items():
        matches = [name for name in parameters if fnmatchcase(name, pattern)]
        if value is not None and not set(matches) & set(trainable):
            raise UserError(
                f"the prior's pattern {pattern!r} matches only frozen parameters, {some(matches, 6)}: unfreeze them "
                "(requires_grad_(True)) before the conversion, or leave the pattern out"
            )


def _is_left_out(prior: Mapping[str, Any], name: str, *, asked: bool) -> bool:
    values = [value for pattern, value in prior.items() if fnmatchcase(name, pattern)]
    # What was asked for by name, and no pattern matches, is refused where its prior is made.
    return values[0] is None if values else not asked


def _owner(net: nn.Module, name: str) -> nn.Module:
    return net.get_submodule(name.rpartition(".")[0])


def _is_weight(net: nn.Module, name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not isinstance(_owner(net, name), _NORMS)


def _is_of_type(net: nn.Module, name: str, parameter: Tensor, kind: type[nn.Module]) -> bool:
    owner = _owner(net, name)
    return isinstance(owner, kind) and (parameter.dim() > 1 or isinstance(owner, _NORMS))


def _is_bias_of(name: str, found: set[str]) -> bool:
    # bias, in_proj_bias, bias_ih_l0; beside weight, in_proj_weight, weight_ih_l0.
    owner, dot, last = name.rpartition(".")
    return "bias" in last and f"{owner}{dot}{last.replace('bias', 'weight')}" in found
