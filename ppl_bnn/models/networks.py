"""The named architectures, each written once in plain torch. `bayesian` makes the Bayesian form of one."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ppl_bnn.errors import UserError
from ppl_bnn.models.conversion import bayesian
from ppl_bnn.models.priors import Prior
from ppl_bnn.models.random_network import random_networks
from ppl_bnn.models.resnet import resnet18
from ppl_bnn.models.vgg import vgg16
from ppl_bnn.registry import check_options, lookup, parameters_of


def build(
    name: str,
    *,
    image_shape: Any = None,
    num_outputs: int | None = None,
    options: Mapping[str, Any] | None = None,
    prior: Prior | str | None = None,
    deterministic: bool = False,
    bayesian_bias: bool = False,
) -> nn.Module:
    """Build a named network: Bayesian with `prior`, or its deterministic twin.

    Args:
        name: of `NETWORKS`, or the import path of a function or class of your own: ``my_package.nets:Net``. Its first
            parameter is the shape of one input, unless `options` name that parameter or its default is a number, a text
            or the like. It gets num_outputs too if it has such a parameter. A network that it made with `bayesian` is
            used as it is.
        image_shape: shape of one input: channels, height and width of an image; a tuple or dict of shapes where a
            network takes several. The default is (1, 28, 28) for bnn-fc, bnn-conv and lenet, and (3, 32, 32) for vgg16
            and resnet18. ``lenet`` takes images of 16 pixels or more, vgg16 and resnet18 of 28 or 32. ``mlp`` takes any
            shape, (D,) for a table's row.
        num_outputs: number of outputs; 10 unless given. bnn-fc and bnn-conv always have 10.
        options: further keyword arguments of that function or class.

    Raises:
        UserError: an unknown name or option, inputs or a prior that do not fit, a function that fails or returns no
            network, or a prior beside a network that is Bayesian already.
    """
    make = lookup(NETWORKS, name, what="the network")
    check_options(make, options or {}, name=name, what="model.options")
    net = _made(name, make, image_shape, num_outputs, dict(options or {}))
    if not any(True for _ in random_networks(net)):
        return net if deterministic else bayesian(net, prior, bayesian_bias=bayesian_bias)
    if deterministic or prior is not None or bayesian_bias:
        raise UserError(
            f"{name} returns a network that is Bayesian already, with priors of its own: leave out model.prior, "
            "model.prior_from, model.bayesian_bias and model.deterministic"
        )
    return net


def _made(
    name: str, make: Callable[..., Any], shape: Any, num_outputs: int | None, options: dict[str, Any]
) -> nn.Module:  # fmt: skip
    known = parameters_of(make)
    if num_outputs is not None and "num_outputs" in known:
        options.setdefault("num_outputs", num_outputs)
    positional = [shape] if shape is not None and _takes_shape(known, options) else []
    try:
        net = make(*positional, **options)
    except UserError as error:
        one = isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)
        advice = "; mlp takes inputs of any shape" if one and len(shape) != 3 else ""
        raise UserError(f"{name} {error}{advice}") from None
    except Exception as error:
        # What goes wrong in the user's own code is the user's to mend.
        given = ", ".join([*map(str, positional), *(f"{key}={value!r}" for key, value in options.items())])
        raise UserError(f"the network {name}({given}) cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise UserError(f"the network {name} must be a torch.nn.Module or return one, got {net!r:.60}")
    return net


def _takes_shape(known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> bool:
    first = next(iter(known.values()), None)
    if first is None or first.name in options or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return False
    return first.default in (first.empty, None) or isinstance(first.default, tuple | list | dict)


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


def lenet(image_shape: tuple[int, int, int] = (1, 28, 28), num_outputs: int = 10) -> nn.Sequential:
    """Build Caffe's LeNet-5, the network of the pruning literature, for images [C, H, W] of 16 pixels or more.

    For digits [1, 28, 28] it has 431,080 parameters, 861,580 when Bayesian.
    """
    if len(image_shape) != 3 or min(image_shape[1:]) < 16:
        raise UserError(f"takes images of shape [C, H, W] of at least 16 pixels, got {list(image_shape)}")
    channels, height, width = image_shape
    # Two convolutions take 4 pixels each, and two poolings halve what is left.
    height, width = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * height * width, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, num_outputs),
        )
    )


def mlp(input_shape: tuple[int, ...] = (1, 28, 28), num_outputs: int = 10) -> nn.Sequential:
    """Build a multilayer perceptron of two hidden layers of 50 units with ReLU, for inputs of any shape, flattened."""
    if not all(isinstance(size, int) for size in input_shape):
        raise UserError(f"takes one tensor, got several of the shapes {input_shape}: give a network of your own")
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
