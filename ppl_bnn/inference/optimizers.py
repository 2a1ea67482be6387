"""The one torch optimizer over all parameters (Pyro's default of one a tensor is slow): which, and what stops it."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inference.ivon import IVON
from ppl_bnn.inputs import Inputs
from ppl_bnn.models.random_network import point_parameters
from ppl_bnn.registry import lookup

# Keras's constants, with which the study was run: torch's own are alpha 0.99 and eps 1e-8.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, alpha=0.9, eps=1e-7),
    "ivon": IVON,
}


def build_optimizer(
    name: str,
    model: nn.Module,
    guide: nn.Module,
    params: Iterable[Tensor] = (),
    *,
    lr: float,
    scale_lr_factor: float = 1.0,
    beta2: float = 0.99999,
    kl_per_datum: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimizer over the model's point estimates and the guide's parameters.

    Args:
        name: of `OPTIMIZERS`, or the import path of a torch optimizer, which is called with groups of parameters.
        params: the unconstrained values of ``pyro.param`` statements, trained like point estimates.
        scale_lr_factor: the guide's scales learn at this times `lr` (not ivon's).
        beta2: decay of IVON's curvature.
        kl_per_datum: IVON's: kl_weight / num_data of the loss whose gradients it is given.

    Raises:
        UserError: ivon, and a guide that has no pairs of loc and unconstrained scale, or only one of a pair frozen.
    """
    named = dict(guide.named_parameters())
    scales = [value for key, value in named.items() if key.startswith("unconstrained_scale.")]
    rest = [value for key, value in named.items() if not key.startswith("unconstrained_scale.")]
    if name == "ivon":
        pairs = [
            (value, named.get(f"unconstrained_scale.{key[4:]}")) for key, value in named.items() if key[:4] == "loc."
        ]
        if not pairs or len(named) != 2 * len(pairs):
            raise UserError("ivon learns a mean-field guide's loc and scale; this guide has none: use adam")
        if half := [key for key in named if key[:4] == "loc." and _half_frozen(named, key[4:])]:
            raise UserError(
                f"ivon learns loc and scale together, and one alone of {half[0][4:]!r} is frozen: "
                "freeze both or neither"
            )
        points = [*point_parameters(model).values(), *params]
        optimizer: torch.optim.Optimizer = IVON(
            pairs,  # type: ignore[arg-type]
            points,
            lr=lr,
            beta2=beta2,
            kl_per_datum=kl_per_datum,
        )
    else:
        # A guide that holds the model has the model's parameters, too.
        groups = [{"params": list(dict.fromkeys([*point_parameters(model).values(), *rest, *params])), "lr": lr}]
        if scales:
            groups.append({"params": scales, "lr": lr * scale_lr_factor})
        optimizer = lookup(OPTIMIZERS, name, what="optimizer")(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _half_frozen(named: Mapping[str, Tensor], site: str) -> bool:
    return named[f"loc.{site}"].requires_grad != named[f"unconstrained_scale.{site}"].requires_grad


def set_lr(
    optimizer: torch.optim.Optimizer, schedule: str, progress: float, *, warmup: float = 0.0, factor: float = 1.0
) -> None:
    """Set every group's learning rate for a point of training, `progress` in [0, 1], to `factor` times the schedule's.

    It rises in a line over the first `warmup` of training.
    """
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    if progress < warmup:
        factor *= progress / warmup
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def first_gone_bad(model: nn.Module, guide: nn.Module, x: Inputs, *labels: Tensor) -> str:
    """Name what is not finite: a parameter, a layer's output, or a gradient.

    Model and guide are called with (x, *labels), the inputs [B, ...] first.

    For a step whose gradients are still in place. Gradients are looked through from the output to the input, the way
    they go bad.
    """
    named = [*((f"{key} of the guide", value) for key, value in guide.named_parameters())]
    named += point_parameters(model).items()
    own = {id(value) for _, value in named}
    named += [(key, value) for key, value in pyro.get_param_store().named_parameters() if id(value) not in own]
    for name, value in named:
        if not torch.isfinite(value).all():
            return f"the parameter {name} is not finite"
    if layer := _first_bad_output(model, guide, x, *labels):
        return f"the output of layer {layer} is the first that is not finite"
    for name, value in reversed(named):
        if value.grad is not None and not torch.isfinite(value.grad).all():
            return f"the gradient of {name} is the first that is not finite"
    return "every parameter and gradient is finite"


def _first_bad_output(model: nn.Module, guide: nn.Module, *args: Any) -> str | None:
    found: list[str] = []

    def record(path: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(path)

        return hook

    layers = [(path, module) for path, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(record(path)) for path, module in layers]
    try:
        # In training mode, where it happened: batch norm's statistics of a step that failed do not matter any more.
        with torch.no_grad(), poutine.block():
            poutine.replay(model, trace=poutine.trace(guide).get_trace(*args))(*args)
    except (RuntimeError, ValueError):
        # The layer before the one that failed is what counts.
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
