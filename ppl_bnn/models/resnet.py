"""The study's ResNet-18 for small images: a stem and four blocks, each with a projection shortcut."""

import torch.nn.functional as F
from torch import Tensor, nn

from ppl_bnn.models.vgg import padding_to_32

BLOCKS = ((64, 1), (128, 2), (256, 2), (512, 2))


def resnet18(image_shape: tuple[int, int, int] = (3, 32, 32), num_outputs: int = 10) -> nn.Sequential:
    """Build ResNet-18 for images [C, 32, 32] or [C, 28, 28]. Images of 28x28 are padded with zeros.

    With 3 channels and 10 outputs it has 4,912,458 parameters, and 9,814,026 when Bayesian. As in the study, it has one
    block for each width; He et al. (2016) have two.

    Raises:
        UserError: images of another size.
    """
    layers = padding_to_32(image_shape)
    layers["stem"] = nn.Conv2d(image_shape[0], 64, 3, padding="same")
    layers["norm"] = nn.BatchNorm2d(64)
    layers["relu"] = nn.ReLU(inplace=True)
    channels = 64
    for at, (width, stride) in enumerate(BLOCKS, start=1):
        layers[f"block{at}"] = Block(channels, width, stride)
        channels = width
    layers["pool"] = nn.AvgPool2d(4)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_outputs)
    return nn.Sequential(layers)


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x)))) + shortcut(x))). The shortcut is a 1x1 convolution in every block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        inner = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(inner) + self.shortcut(x)), inplace=True)
