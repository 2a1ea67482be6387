"""Random augmentation of training images, on whole batches of tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_flip(x: Tensor, *, padding: int = 4) -> Tensor:
    """Shift each image of a batch [B, C, H, W] by up to `padding` pixels, and mirror it with probability 1/2.

    Zeros fill the border. This is the usual augmentation of CIFAR-10 (He et al. 2016, section 4.2). It is drawn for
    each image from torch's generator.
    """
    batch, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), device=x.device)
    rows = torch.arange(height, device=x.device) + top
    columns = torch.arange(width, device=x.device).expand(batch, width)
    mirrored = torch.rand(batch, 1, device=x.device) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns) + left
    examples = torch.arange(batch, device=x.device).view(-1, 1, 1)
    # Index tensors on both sides of a slice put the sliced dimension, the channels, last.
    return padded[examples, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "crop_flip": crop_flip}
