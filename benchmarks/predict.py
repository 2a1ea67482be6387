"""Times a predictive draw, ours and those of other packages, beside the fastest deterministic forward pass."""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from functools import cache, partial

import pyro
import torch
from torch import Tensor, nn

from contenders import NUM_DATA, package, tyxe_guide, why_absent
from ppl_bnn import Classifier, MeanFieldNormal, bayesian, build, predict, predictor
from ppl_bnn.native.memory import keep_freed_memory
from ppl_bnn.prediction.draws import coherent, default_batch, laid_out
from ppl_bnn.prediction.layerwise import layerwise
from ppl_bnn.prediction.plain import plain
from turns import in_turns

SHAPES = {"bnn-fc": (1, 28, 28), "bnn-conv": (1, 28, 28), "vgg16": (3, 32, 32), "resnet18": (3, 32, 32)}

_HELP = """
A contender averages the softmax of S draws over the images. Its ratio is the time of one draw to the time of one
forward pass of the deterministic network in torch, in the same batches. That pass has batch norm folded, and uses
channels_last if there are convolutions. In a round each contender runs once, in a new random order.

contenders:
  cnn             that forward pass, once: the base
  draws           our coherent draws, after the set-up
  layerwise       our draws of pre-activations, after the set-up
  predictor       ppl_bnn.predictor, made beforehand, as in a service that answers many requests
  predict         the public call ppl_bnn.predict, with its set-up and all its results
  bayesian-torch  the network converted by the package (Reparameterization), called once a draw, in the same batches
  tyxe            VariationalBNN.predict
  tfp             Keras with TensorFlow Probability's reparameterization layers, a tf.function called once a draw

examples:
  python benchmarks/predict.py --network bnn-fc --images 1 --draws 400
  python benchmarks/predict.py --network vgg16 --images 400 --contenders draws,bayesian-torch
  python benchmarks/predict.py --network bnn-fc --images 1 --draws 10,20,50,100,200,400,1000
"""


def main(arguments: list[str] | None = None) -> None:
    """Time the contenders named on the command line and print medians."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("--network", choices=list(SHAPES), default="bnn-fc", help="which network (default: bnn-fc)")
    add("--images", type=int, default=1, help="images to predict (default: 1)")
    add("--draws", default="1", help="number of draws, or several, separated by commas (default: 1)")
    add("--threads", type=int, default=2, help="CPU threads of torch and of TensorFlow (default: 2)")
    add("--rounds", type=int, default=7, help="timed runs of each contender, after one untimed run (default: 7)")
    add("--contenders", help="which to run, separated by commas (default: all that fit)")
    add("--markdown", action="store_true", help="print rows of a markdown table")
    options = parser.parse_args(arguments)
    dense = options.network == "bnn-fc"
    names = (
        options.contenders.split(",") if options.contenders else [n for n in CONTENDERS if dense or n != "layerwise"]
    )
    if unknown := set(names) - set(CONTENDERS):
        parser.error(f"unknown contender {min(unknown)!r}; they are {', '.join(CONTENDERS)}")
    if options.rounds < 2:
        parser.error(f"quartiles need at least 2 --rounds, got {options.rounds}")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    x = torch.rand(options.images, *SHAPES[options.network])
    runs: dict[str, Callable[[int], object]] = {}
    for name in names:
        if why := why_absent(name, x.device, "float32"):
            print(f"{name}: {why}", flush=True)
            continue
        try:
            runs[name] = CONTENDERS[name](build(options.network, deterministic=True).eval(), x)
            runs[name](1)
        except Exception as error:
            if package(name) is None:
                raise
            runs.pop(name, None)
            print(f"{name}: could not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    base = forward(build(options.network, deterministic=True).eval(), x)
    base(1)
    print(
        f"{options.network}, {options.images} images, torch {torch.__version__}, {options.threads} threads", flush=True
    )
    row = "| {} | {} | {} | {} | {} |" if options.markdown else "{:16}{:>7}{:>12}{:>12}{:>26}"
    print(row.format("contender", "draws", "ms", "x forward", "quartiles"))
    for draws in map(int, options.draws.split(",")):
        _compare(runs, base, draws, options.rounds, row)


def _compare(runs: dict[str, Callable], base: Callable, draws: int, rounds: int, row: str) -> None:
    every = {**runs, "cnn": base}
    # An untimed run makes what is made once for a number of draws.
    for run in every.values():
        run(draws)
    times = in_turns({name: partial(run, draws) for name, run in every.items()}, rounds)
    for name, own in times.items():
        ratios = [a / b / (1 if name == "cnn" else draws) for a, b in zip(own, times["cnn"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = f"{1000 * statistics.median(own):.2f}"
        print(row.format(name, draws, median, f"{middle:.2f}", f"{low:.2f}, {middle:.2f}, {high:.2f}"), flush=True)


def forward(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return the fastest known forward pass of the deterministic network. It runs once for any number of draws."""
    network = plain(net)
    parts = laid_out(network, x).split(default_batch(network, x))

    def run(draws: int) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network.net(part) for part in parts]).softmax(-1)

    return run


def ready(net: nn.Module, x: Tensor, *, method: Callable) -> Callable[[int], object]:
    """Return our draws, without the set-up."""
    random_net, guide = _ours(net, x)
    blocks = method(random_net, guide, x)

    def run(draws: int) -> Tensor:
        total = torch.zeros(())
        for first in range(0, draws, blocks.size):
            total = total + blocks.logits(first // blocks.size, 1.0)[: draws - first].softmax(-1).sum(0)
        return total / draws

    return run


def public(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return `ppl_bnn.predict`."""
    random_net, guide = _ours(net, x)
    labels = torch.zeros(len(x), dtype=torch.long)
    return lambda draws: predict(random_net, guide, x, labels, num_samples=draws, progress=False)


def served(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return `ppl_bnn.predictor`, one for each number of draws."""
    random_net, guide = _ours(net, x)
    answers = cache(lambda draws: predictor(random_net, guide, x, num_samples=draws))
    return lambda draws: answers(draws)(x)


def _ours(net: nn.Module, x: Tensor) -> tuple[nn.Module, MeanFieldNormal]:
    random_net = bayesian(net)
    labels = torch.zeros(1, dtype=torch.long)
    return random_net, MeanFieldNormal(Classifier(random_net, NUM_DATA), x[:1], labels, init_loc="he", init_scale=0.01)


def bayesian_torch(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return a loop over draws, as in the package's examples."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    batch = default_batch(plain(net), x)
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.6}
    dnn_to_bnn(net, {**settings, "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5})
    net.eval()
    return partial(_averaged, lambda: torch.cat([net(part) for part in x.split(batch)]).softmax(-1))


def tyxe(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return TyXe's own `predict`, aggregated."""
    import tyxe

    normal = pyro.distributions.Normal(0.0, 1.0)
    prior = tyxe.priors.IIDPrior(normal, expose_all=False, hide_module_types=(nn.BatchNorm2d,))
    guide = partial(tyxe_guide(), init_scale=0.01)
    bnn = tyxe.VariationalBNN(net, prior, tyxe.likelihoods.Categorical(NUM_DATA), guide)

    def run(draws: int) -> Tensor:
        with torch.inference_mode(), pyro.get_param_store().scope():
            return bnn.predict(x, num_predictions=draws)

    return run


def tensorflow_probability(net: nn.Module, x: Tensor) -> Callable[[int], object]:
    """Return Keras with reparameterization layers, in batches of 200."""
    import torch._dynamo  # if it is loaded after TensorFlow, the process dies

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tensorflow_probability as tfp
    import tf_keras as keras

    from keras_twin import in_keras

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.set_visible_devices([], "GPU")
    inputs = keras.Input((*x.shape[2:], x.shape[1]))
    with warnings.catch_warnings():
        # TensorFlow Probability 0.25 calls deprecated functions of Keras.
        warnings.simplefilter("ignore", UserWarning)
        layers = tfp.layers.Convolution2DReparameterization, tfp.layers.DenseReparameterization
        model = keras.Model(inputs, in_keras(net, inputs, *layers))
    images = tf.constant(x.permute(0, 2, 3, 1).numpy())
    forward = tf.function(lambda part: tf.nn.softmax(model(part, training=False)))
    parts = tf.split(images, [len(part) for part in x.split(200)])

    def run(draws: int) -> object:
        total = 0.0
        for _ in range(draws):
            total = total + tf.concat([forward(part) for part in parts], 0).numpy()
        return total / draws

    return run


def _averaged(probs: Callable[[], Tensor], draws: int) -> Tensor:
    with torch.inference_mode():
        total = probs()
        for _ in range(draws - 1):
            total += probs()
        return total / draws


CONTENDERS: dict[str, Callable[[nn.Module, Tensor], Callable[[int], object]]] = {
    "draws": partial(ready, method=coherent),
    "layerwise": partial(ready, method=layerwise),
    "predictor": served,
    "predict": public,
    "bayesian-torch": bayesian_torch,
    "tyxe": tyxe,
    "tfp": tensorflow_probability,
}

if __name__ == "__main__":
    main()
