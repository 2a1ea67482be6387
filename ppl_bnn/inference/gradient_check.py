"""What back-propagation would reach from the loss: all that should be trained, and nothing that would not be."""

from collections.abc import Iterator
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inference.elbo import auxiliary_kl, site_kl
from ppl_bnn.models.random_network import random_sites


def check_gradients(model: nn.Module, guide_sites: dict[str, dict], trace: Trace, known: list[Tensor]) -> None:
    """Every tensor that the loss has a gradient for must be one that is trained, and there must be one."""
    kl: Tensor | float = 0.0
    log_likelihood: Tensor | float = 0.0
    for name, site in guide_sites.items():
        if not site_is_subsample(site) and not site["is_observed"]:
            other = trace.nodes.get(name)
            kl = kl + (site_kl(site, other["fn"]) if other else auxiliary_kl(site))
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site):
            log_likelihood = log_likelihood + site["fn"].log_prob(site["value"]).sum()
    _check_reached(model, trace, log_likelihood)
    loss = kl - log_likelihood
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise UserError("nothing is left to train: every parameter of model and guide is frozen (requires_grad False)")
    trained = {id(tensor) for tensor in known}
    for leaf in _leaves(loss):
        if id(leaf) not in trained:
            raise UserError(
                f"a tensor of shape {list(leaf.shape)} that requires a gradient takes part in the loss and is no "
                "parameter of model or guide, so it would not be trained: make it an nn.Parameter of the model or a "
                "pyro.param, or detach it"
            )


def _check_reached(model: nn.Module, trace: Trace, log_likelihood: Tensor | float) -> None:
    """Every random parameter that its posterior could learn must take part in the likelihood."""
    reached: set[Any] = set(_functions(log_likelihood))
    recomputed = any(type(function).__name__ == "CheckpointFunctionBackward" for function in reached)
    reached |= {id(function.variable) for function in reached if hasattr(function, "variable")}
    for name in random_sites(model):
        site = trace.nodes.get(name)
        value = site["value"] if site else None
        if value is not None and value.requires_grad and not {value.grad_fn, id(value)} & reached:
            why = "or uses it without gradients (torch.no_grad): leave it out by `select`"
            if recomputed:
                why = "or uses it in a part under torch.utils.checkpoint: pass that use_reentrant=False"
            raise UserError(
                f"the data would not train the random parameter {name!r}: the forward pass in training mode does not "
                f"use it, {why}, or freeze its parameters in the guide"
            )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that back-propagation from `loss` gives a gradient to."""
    return (function.variable for function in _functions(loss) if hasattr(function, "variable"))


def _functions(value: Tensor | float) -> Iterator[Any]:
    """The functions that back-propagation from a value runs."""
    todo, done = [getattr(value, "grad_fn", None)], set()
    while todo:
        function = todo.pop()
        if function is None or function in done:
            continue
        done.add(function)
        yield function
        todo += [after for after, _ in function.next_functions]
