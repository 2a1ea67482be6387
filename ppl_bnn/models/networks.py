"""The architectures, each written once in plain torch: `bayesian` makes the BNN, as it stands it is the CNN."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from ppl_bnn.models.layers import bayesian
from ppl_bnn.models.priors import Prior


def build(
    name: str, *, prior: Prior | None = None, deterministic: bool = False, bayesian_bias: bool = False
) -> nn.Module:
    """Build a named network for images [N, 1, 28, 28]: Bayesian with `prior`, or its deterministic twin.

    Raises:
        ValueError: an unknown name, or a prior that does not fit.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; the networks are {', '.join(NETWORKS)}")
    net = NETWORKS[name]()
    return net if deterministic else bayesian(net, prior, bayesian_bias=bayesian_bias)


def bnn_fc() -> nn.Sequential:
    """784-256-256-10 with ReLU: the study's BNN-FC (538,122 parameters when Bayesian)."""
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


def bnn_conv() -> nn.Sequential:
    """Two 5x5 convolutions of 256 channels and a dense layer: the study's BNN-Conv (3,802,122 parameters)."""
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {"bnn-fc": bnn_fc, "bnn-conv": bnn_conv}
