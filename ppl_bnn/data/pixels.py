"""Pixels as networks take them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError


def normalize(mean: float | Sequence[float], std: float | Sequence[float]) -> Callable[[Any], Any]:
    """A function of a batch of pixels [B, C, ...]: uint8 becomes 0..1, then (x - mean) / std for each channel.

    Pass it as ``as_examples(..., transform=normalize(mean, std))``: it runs on the model's device.

    Args:
        mean, std: a number, or one for each of the C channels, on the scale 0..1; std > 0.

    Raises:
        UserError: numbers that are not finite, a std that is not positive, or another number of channels.
    """
    means, stds = (torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (mean, std))
    if not (means.isfinite().all() and stds.isfinite().all() and (stds > 0).all()):
        raise UserError(f"mean must be finite and std positive and finite, got mean={mean!r:.60} and std={std!r:.60}")
    return _Normalize(means, stds)


class _Normalize:
    """A function that worker processes can be sent."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std
        self._there: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Pixels [B, C, ...] in uint8 or floating point -> [B, C, ...] in floating point."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise UserError(f"normalize takes one tensor of pixels [B, C, ...], got {getattr(x, 'shape', type(x))}")
        channels = {len(self.mean), len(self.std)} - {1}
        if channels - {x.shape[1]}:
            raise UserError(f"normalize has numbers for {max(channels)} channels, and x is [B, {x.shape[1]}, ...]")
        factor = 255.0 if x.dtype == torch.uint8 else 1.0
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        if self._there is None or self._there[0].device != x.device or self._there[0].dtype != dtype:
            self._there = (self.mean.to(x.device, dtype), self.std.to(x.device, dtype))
        mean, std = (part.view(-1, *[1] * (x.dim() - 2)) for part in self._there)
        return (x.to(dtype) / factor - mean) / std
