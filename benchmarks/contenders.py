"""The steps that benchmarks/train_step.py compares: the deterministic network's, ours and other packages'.

Each function takes a deterministic torch network, images [N, C, H, W] or rows [N, features], labels [N] and the memory
layout, and gives a training step of that network, or of its Bayesian twin, in one framework.
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

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference.log import BatchAccuracy
from ppl_bnn.inference.optimizers import build_optimizer, descend

NUM_DATA = 50_000


class Contender(NamedTuple):
    """A training step, and the bytes of all that it learns and remembers from one step to the next."""

    step: Callable[[], object]
    held: Callable[[], int]


def deterministic(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Plain torch."""
    return _with_adam(net.parameters(), lambda: F.cross_entropy(net(x), y))


def by_hand(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """Mean-field Normal weights in a chain of layers, without Pyro: a draw of each, and the KL to Normal(0, 1)."""
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


def ours(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, name: str) -> Contender:
    """The step of `ppl_bnn.fit`: an estimator and Adam, or ``ivon``: the plain one and that optimizer."""
    ivon = name == "ivon"
    model = Classifier(bayesian(net), NUM_DATA)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.0063 if ivon else 1.2e-4)
    model.to(memory_format=layout)
    guide.to(memory_format=layout)
    optimizer = build_optimizer("ivon" if ivon else "adam", model, guide, lr=0.01 if ivon else 1e-4)
    elbo = KLScaledELBO(NUM_DATA)
    handlers = ESTIMATORS["plain" if ivon else name](), BatchAccuracy()
    # A parameter store of its own: the contenders' parameters have the same names.
    parameters: dict = {"params": {}, "constraints": {}}

    def step() -> None:
        optimizer.param_groups[0]["kl_per_datum"] = elbo.kl_weight / NUM_DATA
        with pyro.get_param_store().scope(parameters), handlers[0], handlers[1]:
            elbo.loss_and_grads(model, guide, x, y)
            descend(optimizer)

    return Contender(step, partial(_bytes, optimizer))


def ivon_opt(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """IVON's own implementation (Shen et al. 2024), which draws every parameter of the deterministic network."""
    import ivon

    optimizer = ivon.IVON(net.parameters(), lr=0.01, ess=NUM_DATA)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return Contender(step, partial(_bytes, optimizer))


def bayesian_torch(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, kind: str) -> Contender:
    """The layers of bayesian-torch, whose biases are random too, and the loss of its examples."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -9.0}
    dnn_to_bnn(net, {**settings, "type": kind, "moped_enable": False, "moped_delta": 0.5})
    net.to(x.device, memory_format=layout)
    return _with_adam(net.parameters(), lambda: F.cross_entropy(net(x), y) + get_kl_loss(net) / len(x))


def tyxe_flipout(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """TyXe's own `fit` in its flipout context; batch norm is no part of the prior, biases must be, for its flipout."""
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
    """TyXe's Normal guide, for Pyro 1.9."""
    import tyxe

    class Guide(tyxe.guides.AutoNormal):
        # TyXe 0.0.2 reads these by pyro.util.deep_getattr, which Pyro 1.9 no longer has.
        def get_loc(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.loc")(self)

        def get_scale(self, site_name: str) -> Tensor:
            return attrgetter(f"{site_name}.scale")(self)

    return Guide


def tensorflow_probability(
    net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, flipout: bool
) -> Contender:
    """The same network in Keras, with TensorFlow Probability's flipout layers or Keras's own, as a tf.function.

    Compiled by XLA (jit_compile=True) a flipout step takes twice the CPU time, so it is not.
    """
    # Loaded after TensorFlow, what torch.compile needs ends the process (torch 2.14, TensorFlow 2.21).
    import torch._dynamo

    # TensorFlow would report at its import that it found no GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tensorflow_probability as tfp
    import tf_keras as keras

    from keras_twin import in_keras

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.set_visible_devices([], "GPU")  # where torch's steps are not either
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
        # The layers of TensorFlow Probability 0.25 call Keras in a way that it calls deprecated.
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

    # The loss is read, so that the step has ended when it returns.
    return Contender(lambda: update().numpy(), held)


# The first that fits the network is its base: cnn, or mlp where all layers are Linear.
CONTENDERS: dict[str, Callable[..., Contender]] = {
    "cnn": deterministic,
    "mlp": deterministic,
    "hand": by_hand,
    **{name: partial(ours, name=name) for name in (*ESTIMATORS, "ivon")},
    "ivon-opt": ivon_opt,
    "bayesian-torch flipout": partial(bayesian_torch, kind="Flipout"),
    "bayesian-torch reparam": partial(bayesian_torch, kind="Reparameterization"),
    "tyxe": tyxe_flipout,
    "tfp cnn": partial(tensorflow_probability, flipout=False),
    "tfp": partial(tensorflow_probability, flipout=True),
}
# A contender's first word -> the module it needs, and what pip is to install for it.
PACKAGES = {
    "ivon-opt": ("ivon", "ivon-opt"),
    "bayesian-torch": ("bayesian_torch", "bayesian-torch"),
    "tyxe": ("tyxe", "tyxe==0.0.2"),
    "tfp": ("tensorflow_probability", "tensorflow-probability tf-keras"),
}


def package(name: str) -> str | None:
    """The key in `PACKAGES` of the package that a contender is from, None for our own and plain torch."""
    first = name.partition(" ")[0]
    return first if first in PACKAGES else None


def why_absent(name: str, device: torch.device, precision: str) -> str | None:
    """Why a contender cannot run here, as far as can be told beforehand."""
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
    """Bytes of an optimizer's parameters and state, or of the tensors in nested lists and dicts."""
    if isinstance(held, Optimizer):
        return _bytes(held.param_groups) + _bytes(held.state)
    if isinstance(held, Tensor):
        return held.nbytes
    parts: Iterable = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(map(_bytes, parts))
