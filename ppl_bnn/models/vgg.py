"""The study's VGG-16 for small images: ten 3x3 convolutions in five stages, and one dense layer."""

from collections import OrderedDict

from torch import nn

from ppl_bnn.errors import UserError

WIDTHS = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


def vgg16(image_shape: tuple[int, int, int] = (3, 32, 32), num_outputs: int = 10) -> nn.Sequential:
    """Build VGG-16 for images [C, 32, 32] or [C, 28, 28]. Images of 28x28 are padded with zeros.

    Each stage has two convolutions (3x3, 'same') with batch norm and ReLU, and a 2x2 max pool. A dense layer takes the
    remaining 512 features. With 3 channels and 10 outputs it has 9,421,898 parameters, and 18,829,066 when Bayesian.

    Raises:
        UserError: images of another size.
    """
    layers = padding_to_32(image_shape)
    channels = image_shape[0]
    for stage, widths in enumerate(WIDTHS, start=1):
        for at, width in enumerate(widths, start=1):
            layers[f"conv{stage}_{at}"] = nn.Conv2d(channels, width, 3, padding="same")
            layers[f"norm{stage}_{at}"] = nn.BatchNorm2d(width)
            layers[f"relu{stage}_{at}"] = nn.ReLU(inplace=True)
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_outputs)
    return nn.Sequential(layers)


def padding_to_32(image_shape: tuple[int, int, int]) -> OrderedDict[str, nn.Module]:
    """Return no layer for images of 32x32, and a layer of zero padding for 28x28.

    Raises:
        UserError: images of another size.
    """
    size = image_shape[1:]
    if size not in ((32, 32), (28, 28)):
        raise UserError(f"takes images of shape [C, 32, 32] or [C, 28, 28], got {list(image_shape)}")
    return OrderedDict() if size == (32, 32) else OrderedDict(pad=nn.ZeroPad2d(2))
