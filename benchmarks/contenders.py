"""The training steps that benchmarks/train_step.py compares: deterministic, ours, and those of other packages.

Each function takes a deterministic torch network, images [N, C, H, W] or rows [N, features], labels [N] and the memory
layout. It returns a training step of that network, or of its Bayesian form, in one framework.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ppl_bnn import Classifier, MeanFieldNormal, TrainingStep, bayesian
from ppl_bnn.guides import ESTIMATORS

NUM_DATA = 50_000


class Contender(NamedTuple):
    """A training step, and the bytes of its parameters and optimizer state."""

    step: Callable[[], object]
    held: Callable[[], int]


def deterministic(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build the deterministic step in plain torch."""
    return _with_adam(net.parameters(), lambda: F.cross_entropy(net(x), y))


def compiled(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build the deterministic step, whose network runs through torch.compile."""
    net.compile()
    return deterministic(net, x, y, layout)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build a step without Pyro: a chain of layers with mean-field Normal weights, and the KL to Normal(0, 1)."""
    layers = list(net.children())
    unconstrained = {layer: torch.full_like(layer.weight, -9.0) for layer in layers if isinstance(layer, nn.Linear)}

    def loss() -> Tensor:
        h, kl = x, x.new_zeros(())
        for layer in layers:
            if isinstance(layer, nn.Linear):
                loc, scale = layer.weight, F.softplus(unconstrained[layer])
                h = F.linear(h, loc + scale * torch.randn_like(loc), layer.bias)
                kl = kl + (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum()
            else:
                h = layer(h)
        return F.cross_entropy(h, y) + kl / NUM_DATA

    return _with_adam([*net.parameters(), *(scale.requires_grad_() for scale in unconstrained.values())], loss)


def ours(
    net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, name: str, mode: str = "eager"
) -> Contender:
    """Build the step of `ppl_bnn.fit`: an estimator with Adam, or ``ivon``: the plain estimator with that optimizer.

    Args:
        mode: ``eager``, ``compiled`` (the network, with the plain estimator) or ``graph`` (replayed as a CUDA graph).
    """
    ivon = name == "ivon"
    model = Classifier(bayesian(net), NUM_DATA)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.0063 if ivon else 1.2e-4)
    model.to(memory_format=layout)
    guide.to(memory_format=layout)
    step = TrainingStep(
        model, guide, x, y, num_data=NUM_DATA, optimizer="ivon" if ivon else "adam", lr=0.01 if ivon else 1e-4,
        estimator="plain" if ivon else name, compile=mode == "compiled", cuda_graph=mode == "graph",
    )  # fmt: skip
    return Contender(partial(step, x, y), partial(_bytes, step.optimizer))


def ivon_opt(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build a step of IVON's reference implementation (Shen et al. 2024). It draws every parameter of the network."""
    import ivon

    optimizer = ivon.IVON(net.parameters(), lr=0.01, ess=NUM_DATA)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return Contender(step, partial(_bytes, optimizer))


def bayesian_torch(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, kind: str) -> Contender:
    """Build a step with the layers of bayesian-torch, whose biases are random too, and the loss of its examples."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -9.0}
    dnn_to_bnn(net, {**settings, "type": kind, "moped_enable": False, "moped_delta": 0.5})
    net.to(x.device, memory_format=layout)
    return _with_adam(net.parameters(), lambda: F.cross_entropy(net(x), y) + get_kl_loss(net) / len(x))


def tyxe_flipout(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Build a step of TyXe's `fit` in its flipout context. Batch norm is not random; biases must be for its flipout."""
    import tyxe

    normal = pyro.distributions.Normal(0.0, 1.0)
    prior = tyxe.priors.IIDPrior(normal, expose_all=False, hide_module_types=(nn.BatchNorm2d,))
    likelihood = tyxe.likelihoods.Categorical(NUM_DATA)
    loc = tyxe.guides.PretrainedInitializer.from_net(net)
    bnn = tyxe.VariationalBNN(net, prior, likelihood, partial(tyxe_guide(), init_loc_fn=loc, init_scale=1.2e-4))
    optimizer = pyro.optim.Adam({"lr": 1e-4, "fused": True})
    parameters: dict = {"params": {}, "constraints": {}}

    def step() -> None:
        with pyro.get_param_store().scope(parameters), tyxe.poutine.flipout():
            bnn.fit([(x, y)], optimizer, num_epochs=1)

    return Contender(step, lambda: sum(map(_bytes, optimizer.optim_objs.values())))


def tyxe_guide() -> Any:
    """Return TyXe's Normal guide, made to work with Pyro 1.9."""
    import tyxe

    class Guide(tyxe.guides.AutoNormal):
        # TyXe 0.0.2 reads these with pyro.util.deep_getattr, which Pyro 1.9 no longer has.
        def get_loc(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.loc")(self)

        def get_scale(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.scale")(self)

    return Guide


def tensorflow_probability(
    net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, flipout: bool
) -> Contender:
    """Build a step of the same network in Keras, with flipout layers or Keras's own, as a tf.function.

    It is not compiled by XLA, because jit_compile=True doubles the CPU time of a flipout step.
    """
    # If torch.compile's parts are loaded after TensorFlow, the process dies (torch 2.14, TensorFlow 2.21).
    import torch._dynamo

    # Otherwise TensorFlow reports at its import that it found no GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tensorflow_probability as tfp
    import tf_keras as keras

    from keras_twin import in_keras

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.set_visible_devices([], "GPU")  # torch's steps do not run there either
    convolution, dense = keras.layers.Conv2D, keras.layers.Dense
    if flipout:
        initial = keras.initializers.RandomNormal(-9.0, 0.1)
        settings = {
            "kernel_posterior_fn": tfp.layers.default_mean_field_normal_fn(untransformed_scale_initializer=initial),
            "kernel_divergence_fn": lambda q, p, _: tfp.distributions.kl_divergence(q, p) / NUM_DATA,
        }
        convolution = partial(tfp.layers.Convolution2DFlipout, **settings)
        dense = partial(tfp.layers.DenseFlipout, **settings)
    inputs = keras.Input(x.movedim(1, -1).shape[1:])
    with warnings.catch_warnings():
        # The layers of TensorFlow Probability 0.25 call deprecated functions of Keras.
        warnings.simplefilter("ignore", UserWarning)
        model = keras.Model(inputs, in_keras(net, inputs, convolution, dense))
    optimizer = keras.optimizers.Adam(1e-4)
    images, labels = tf.constant(x.movedim(1, -1).numpy()), tf.constant(y.numpy())

    @tf.function
    def update() -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            nll = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(nll) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def held() -> int:
        variables = [*model.trainable_variables, *optimizer.variables]
        return sum(variable.shape.num_elements() * variable.dtype.size for variable in variables)

    # Reading the loss makes sure that the step has ended.
    return Contender(lambda: update().numpy(), held)


# The first that fits the network is its base: cnn, or mlp where all layers are Linear.
CONTENDERS: dict[str, Callable[..., Contender]] = {
    "cnn": deterministic,
    "mlp": deterministic,
    "hand": by_hand,
    **{name: partial(ours, name=name) for name in (*ESTIMATORS, "ivon")},
    "compiled": compiled,
    "plain-compiled": partial(ours, name="plain", mode="compiled"),
    "ivon-opt": ivon_opt,
    "bayesian-torch flipout": partial(bayesian_torch, kind="Flipout"),
    "bayesian-torch reparam": partial(bayesian_torch, kind="Reparameterization"),
    "tyxe": tyxe_flipout,
    "tfp cnn": partial(tensorflow_probability, flipout=False),
    "tfp": partial(tensorflow_probability, flipout=True),
}
# {first word of a contender: (module that it needs, what pip installs)}
PACKAGES = {
    "ivon-opt": ("ivon", "ivon-opt"),
    "bayesian-torch": ("bayesian_torch", "bayesian-torch"),
    "tyxe": ("tyxe", "tyxe==0.0.2"),
    "tfp": ("tensorflow_probability", "tensorflow-probability tf-keras"),
}


def package(name: str) -> str | None:
    """Return the key in `PACKAGES` of a contender's package, or None for our own and plain torch."""
    first = name.partition(" ")[0]
    return first if first in PACKAGES else None


def why_absent(name: str, device: torch.device, precision: str) -> str | None:
    """Return why a contender cannot run here, as far as this is known beforehand."""
    if name.startswith("tfp") and (device.type != "cpu" or precision != "float32"):
        return "is for float32 on a CPU"
    if (key := package(name)) and find_spec(PACKAGES[key][0]) is None:
        return f"not installed; pip install {PACKAGES[key][1]}"
    return None


def _with_adam(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Contender:
    optimizer = Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Contender(step, partial(_bytes, optimizer))


def _bytes(held: object) -> int:
    """Return the bytes of an optimizer's parameters and state, or of the tensors in nested lists and dicts."""
    if isinstance(held, Optimizer):
        return _bytes(held.param_groups) + _bytes(held.state)
    if isinstance(held, Tensor):
        return held.nbytes
    parts: Iterable = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(map(_bytes, parts))
