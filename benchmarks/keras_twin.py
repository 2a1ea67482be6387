"""Builds the Keras twin of a torch network."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tf_keras import layers
from torch import nn

from ppl_bnn.models.resnet import Block


def in_keras(layer: nn.Module, x: Any, convolution: Callable, dense: Callable) -> Any:
    """Apply the Keras twin of a torch layer to a symbolic [N, H, W, C] tensor."""
    apply = partial(in_keras, convolution=convolution, dense=dense)
    match layer:
        case nn.Sequential():
            for child in layer:
                x = apply(child, x)
            return x
        case Block():
            inner = layers.ReLU()(apply(layer.norm1, apply(layer.conv1, x)))
            sum_ = layers.add([apply(layer.conv2, inner), apply(layer.shortcut, x)])
            return layers.ReLU()(apply(layer.norm2, sum_))
        case nn.Conv2d():
            # With a stride, "same" pads other sides than torch: a shift of one pixel, and the same work.
            return convolution(layer.out_channels, layer.kernel_size, strides=layer.stride, padding="same")(x)
        case nn.BatchNorm2d():
            return layers.BatchNormalization(momentum=0.9, epsilon=layer.eps)(x)
        case nn.Linear():
            return dense(layer.out_features)(x)
        case nn.MaxPool2d():
            return layers.MaxPooling2D(layer.kernel_size)(x)
        case nn.AvgPool2d():
            return layers.AveragePooling2D(layer.kernel_size)(x)
        case nn.ReLU():
            return layers.ReLU()(x)
        case nn.Flatten():
            return layers.Flatten()(x)
    raise ValueError(f"no Keras twin is written for {type(layer).__name__}")
