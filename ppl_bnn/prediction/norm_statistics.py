"""Batch norm by a draw's own statistics: of training inputs under its weights, not averages over training's draws."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, call, count


def own_statistics(module: nn.Module, x: Inputs) -> Callable[..., None]:
    """A function that sets `module`'s batch norm to the statistics of x [K, ...] under the weights it has when called.

    Called again with the same arguments, whatever names the weights, it sets those of the first time without a look at
    x. Batch norm in front of which nothing is random has those of x from the start.

    In training, a batch is normalized by its own statistics: what a draw of the weights does to a layer's mean and
    scale is gone in the next batch norm. The running averages are those over many draws, and leave it in. Each draw's
    own statistics take it out again (Maddox et al. 2019, algorithm 1), for one forward pass of x a draw.

    Raises:
        UserError: the module has no batch norm with running statistics, or x has fewer than 2 examples.
    """
    norms = batch_norms(module)
    if count(x) < 2:
        raise UserError(f"batch norm's statistics need at least 2 examples, got {count(x)}")
    for layer in norms:
        # The running statistics become those of the last pass.
        layer.momentum = 1.0
    statistics = [layer.get_buffer(name) for layer in norms for name in ("running_mean", "running_var")]
    known: dict[tuple[Hashable, ...], list[Tensor]] = {}

    def measure() -> None:
        for layer in norms:
            layer.train()
        with torch.inference_mode():
            call(module, x)
        for layer in norms:
            layer.eval()

    def normalize(*weights: Hashable) -> None:
        if weights not in known:
            measure()
            known[weights] = [value.clone() for value in statistics]
        for value, of_weights in zip(statistics, known[weights], strict=True):
            value.copy_(of_weights)

    measure()
    return normalize


def batch_norms(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    """The batch norm layers that have running statistics; UserError where there is none."""
    found = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    found = [layer for layer in found if layer.track_running_stats]
    if not found:
        raise UserError(
            "the network has no batch norm with running statistics, so a draw has none of its own; "
            "leave out norm_inputs (predict.norm_images)"
        )
    return found
