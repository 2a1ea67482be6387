"""The named architectures, each written once in plain torch. `bayesian` makes the Bayesian form of one."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.conversion import bayesian
from ppl_bnn.models.priors import Prior
from ppl_bnn.models.resnet import resnet18
from ppl_bnn.models.vgg import vgg16
from ppl_bnn.registry import lookup


def build(
    name: str,
    *,
    image_shape: tuple[int, ...] | None = None,
    num_outputs: int | None = None,
    prior: Prior | None = None,
    deterministic: bool = False,
    bayesian_bias: bool = False,
) -> nn.Module:
    """Build a named network: Bayesian with `prior`, or its deterministic twin.

    Args:
        name: of `NETWORKS`, or the import path of a function of image_shape: ``my_package.nets:build``. One that has a
            parameter num_outputs gets it too.
        image_shape: shape of one input: channels, height and width of an image. The default is (1, 28, 28) for bnn-fc,
            bnn-conv and lenet, and (3, 32, 32) for vgg16 and resnet18, which take images of 28x28 too. ``mlp`` takes
            any shape, (D,) for a table's row.
        num_outputs: number of outputs of ``mlp``; 10 unless given. The image networks have 10.

    Raises:
        UserError: an unknown name, inputs that do not fit, or a prior that does not fit.
    """
    make = lookup(NETWORKS, name, what="the network")
    try:
        takes_outputs = num_outputs is not None and "num_outputs" in inspect.signature(make).parameters
        given: dict[str, Any] = {"num_outputs": num_outputs} if takes_outputs else {}
        net = make(**given) if image_shape is None else make(image_shape, **given)
    except ValueError as error:
        advice = "" if image_shape is None or len(image_shape) == 3 else "; mlp takes inputs of any shape"
        raise UserError(f"{name} {error}{advice}") from None
    return net if deterministic else bayesian(net, prior, bayesian_bias=bayesian_bias)


def bnn_fc(image_shape: tuple[int, int, int] = (1, 28, 28)) -> nn.Sequential:
    """Build the study's BNN-FC: 784-256-256-10 with ReLU, 538,122 parameters when Bayesian."""
    _only_digits(image_shape)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 256),
            relu1=nn.ReLU(),
            fc2=nn.Linear(256, 256),
            relu2=nn.ReLU(),
            fc3=nn.Linear(256, 10),
        )
    )


def bnn_conv(image_shape: tuple[int, int, int] = (1, 28, 28)) -> nn.Sequential:
    """Build the study's BNN-Conv: two 5x5 convolutions of 256 channels and a dense layer (3,802,122 parameters)."""
    _only_digits(image_shape)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 256, 5, padding="same"),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(256, 256, 5),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(25600, 10),
        )
    )


def lenet(image_shape: tuple[int, int, int] = (1, 28, 28)) -> nn.Sequential:
    """Build Caffe's LeNet-5, the network of the pruning literature: 431,080 parameters, 861,580 when Bayesian."""
    _only_digits(image_shape)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


def mlp(input_shape: tuple[int, ...] = (1, 28, 28), num_outputs: int = 10) -> nn.Sequential:
    """Build a multilayer perceptron of two hidden layers of 50 units with ReLU, for inputs of any shape, flattened."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(input_shape), 50),
            relu1=nn.ReLU(),
            fc2=nn.Linear(50, 50),
            relu2=nn.ReLU(),
            fc3=nn.Linear(50, num_outputs),
        )
    )


def _only_digits(image_shape: tuple[int, int, int]) -> None:
    if tuple(image_shape) != (1, 28, 28):
        raise UserError(f"takes images of shape [1, 28, 28], got {list(image_shape)}")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "bnn-fc": bnn_fc,
    "bnn-conv": bnn_conv,
    "lenet": lenet,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "mlp": mlp,
}
