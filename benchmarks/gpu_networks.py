"""The networks of benchmarks/gpu.py, and the wait for the device."""

import torch
from torch import nn

from gpu_cells import Plan
from ppl_bnn import build


def network(plan: Plan, name: str, image_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Build a deterministic network of the library by name, or a tiny one with the same kinds of layers at toy size."""
    if not plan.toy:
        return build(name, image_shape=image_shape, deterministic=True)
    channels, side, _ = image_shape
    convolution = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(side // 4)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(64, 10))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
