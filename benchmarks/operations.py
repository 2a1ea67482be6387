"""Counts the multiply-adds of a training step from the shapes of a network's layers."""

import math

import torch
from torch import Tensor, nn

from ppl_bnn.guides import GroupedFlips


def operations(net: nn.Module, image_shape: tuple[int, ...], batch: int) -> list[list[str]]:
    """Return a table: multiply-adds of an image, and of drawing the weights, which happens once a step."""
    forward, training, weights = multiply_adds(net, torch.rand(2, *image_shape))
    groups = math.ceil(batch / math.ceil(batch / GroupedFlips().groups))
    # Passes of every layer, and multiply-adds a weight: one for the draw, and one for each flip of it.
    costs = {"deterministic": (1, 0), "plain": (1, 1), "groups": (1, groups), "flipout": (2, 1)}
    table = [["step", "forward", "training", "x deterministic", "drawing weights", "of it an image"]]
    for name, (passes, draws) in costs.items():
        a_step = (f"{draws * weights:,}", f"{draws * weights / batch:,.0f}")
        table.append([name, f"{passes * forward:,}", f"{passes * training:,}", f"{passes:.2f}", *a_step])
    return table


def multiply_adds(net: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Return an image's multiply-adds in Linear and Conv2d layers, forward and in training, and the number of weights.

    The gradient of the weights takes as many as a forward pass, and so does the gradient of the input. The layer that
    sees the images needs no gradient of its input. `x` holds at least 2 images.
    """
    forward, training, weights = 0, 0, 0

    def count(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal forward, training, weights
        # An output element takes one product for each weight of a row: inputs of a group times kernel area.
        products = output[0].numel() * layer.weight[0].numel()
        forward += products
        training += products * (3 if inputs[0].requires_grad else 2)
        weights += layer.weight.numel()

    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    net(x)
    return forward, training, weights
