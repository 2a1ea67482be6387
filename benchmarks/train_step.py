"""What a Bayesian training step costs: ours and other packages', beside a deterministic torch network's."""

import argparse
import gc
import math
import os
import platform
import random
import re
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian, build
from ppl_bnn.guides import ESTIMATORS, GroupedFlips
from ppl_bnn.guides.arithmetic import compiled_arithmetic
from ppl_bnn.memory import keep_freed_memory
from ppl_bnn.optimizers import build_optimizer, descend
from ppl_bnn.training_log import BatchAccuracy

NUM_DATA = 50_000
SHAPES = {"vgg16": (3, 32, 32), "resnet18": (3, 32, 32), "bnn-fc": (1, 28, 28)}
# A step of one contender, and the optimizer, which holds all that the step learns and remembers.
Contender = tuple[Callable[[], object], Optimizer]
Table = list[list[str]]

_HELP = """
A step is: gradients to zero, forward, loss, backward, update. In a round each contender runs one step, in an order
drawn anew, so that whatever slows the machine slows them all. Images are random pixels and labels random: time and
memory do not depend on them.

contenders:
  cnn                            the deterministic network in plain torch, with Adam: the base
  hand                           bnn-fc only, and its base: the plain estimator's step written by hand in torch
  plain, groups, flipout, local  our estimators with Adam, as ppl_bnn.fit runs a step
  ivon                           the plain estimator with optimizer="ivon"
  plain+compile, groups+compile, ivon+compile
                                 with compile=True: a minute more to start; --memory counts some of the compiler's
  ivon-opt                       the optimizer of the package ivon-opt on the deterministic network
  bayesian-torch flipout, bayesian-torch reparam
                                 the network converted by the package bayesian-torch, with Adam
  tyxe, tfp                      no step is written for these packages; a line says so

examples:
  python benchmarks/train_step.py --network resnet18 --channels_last --contenders plain,groups --rounds 15
  python benchmarks/train_step.py --network bnn-fc --markdown
  python benchmarks/train_step.py --memory
"""


def main(arguments: list[str] | None = None) -> None:
    """Time, weigh or count the training steps that the command line names."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("--network", choices=list(SHAPES), default="vgg16", help="which network (default: vgg16)")
    add("--batch", type=int, help="images a step (default: 128; bnn-fc: 100)")
    add("--threads", type=int, default=2, help="torch's CPU threads (default: 2)")
    add("--rounds", type=int, default=7, help="timed steps of each contender, after 2 untimed ones (default: 7)")
    add("--channels_last", action="store_true", help="that memory layout of images and kernels, for every contender")
    add("--contenders", help="comma-separated, of those below; the base runs in any case (default: all that fit)")
    add("--memory", action="store_true", help="peak memory instead: 3 steps of each in a process of its own")
    add("--operations", action="store_true", help="multiply-adds from the layers' shapes instead; nothing is timed")
    add("--markdown", action="store_true", help="print the table as markdown too")
    add("--default_malloc", action="store_true", help="leave malloc untuned; else ppl_bnn.memory.keep_freed_memory()")
    options = parser.parse_args(arguments)
    dense = options.network == "bnn-fc"
    options.batch = options.batch or (100 if dense else 128)
    known = [name for name in CONTENDERS if dense or name != "hand"]
    names = [name for name in known if not (dense and (name.endswith("+compile") or name == "ivon-opt"))]
    if options.contenders:
        names = [known[0], *(name.strip() for name in options.contenders.split(","))]
    if unknown := set(names) - set(known):
        parser.error(f"{options.network} has no contender {min(unknown)!r}; it has {', '.join(known)}")
    # Batch norm cannot learn from one image of a 1x1 map, and one round has no quartiles.
    if min(options.batch, options.rounds) < 2 or options.threads < 1:
        parser.error("--batch and --rounds must be at least 2, --threads at least 1")
    if options.memory and sys.platform != "linux":
        parser.error("--memory reads /proc, which only Linux has")
    _set_up(options)
    print(_heading(options), flush=True)
    if options.operations:
        table = operations(options)
    else:
        absent = {name: why for name in names if (why := _why_absent(name))}
        for name, why in absent.items():
            print(f"{name}: {why}", flush=True)
        runnable = [name for name in dict.fromkeys(names) if name not in absent]
        table = (memory if options.memory else seconds)(runnable, options)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    if options.markdown:
        rule = ["---", *["---:"] * (len(widths) - 1)]
        print("", *(f"| {' | '.join(row)} |" for row in [table[0], rule, *table[1:]]), sep="\n")


def seconds(names: list[str], options: argparse.Namespace) -> Table:
    """Time the contenders' steps in turns; the ratios are to the first of `names`."""
    steps = {name: _contender(name, options)[0] for name in names}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in tqdm(range(options.rounds), unit="round", disable=None):
        for name in order.sample(names, len(names)):
            started = time.perf_counter()
            steps[name]()
            found[name].append(time.perf_counter() - started)
    base = found[names[0]]
    table = [["step", "median s", "min s", f"x {names[0]}", "quartiles of the rounds'"]]
    for name, own in found.items():
        low, _, high = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4, method="inclusive")
        median = statistics.median(own)
        ratio = f"{median / statistics.median(base):.2f}"
        table.append([name, f"{median:.5f}", f"{min(own):.5f}", ratio, f"{low:.2f} to {high:.2f}"])
    return table


def memory(names: list[str], options: argparse.Namespace) -> Table:
    """Peak memory over what the process held before the network was built; the ratios are to the first of `names`.

    The last column, (peak - parameters and optimizer state) / the base's peak, is at most 1.6 where a step takes at
    most 1.6 times the base's memory plus its own parameters and optimizer state.
    """
    table = [["step", "peak MiB", f"x {names[0]}", "parameters, state MiB", f"peak less these, x {names[0]}"]]
    base = 0
    for name in tqdm(names, unit="contender", disable=None):
        # Spawned, not forked: a fork would begin with this process's memory.
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            peak, held = fresh.submit(_peak_and_held, name, options).result()
        base = base or peak
        mebibytes = (f"{count / 2**20:,.1f}" for count in (peak, held))
        ratios = (f"{count / base:.2f}" for count in (peak, peak - held))
        table.append([name, *(cell for pair in zip(mebibytes, ratios, strict=True) for cell in pair)])
    return table


def operations(options: argparse.Namespace) -> Table:
    """An image's multiply-adds, and those of drawing the weights, forward: once a step, whatever the batch."""
    net = build(options.network, deterministic=True)
    forward, training, weights = multiply_adds(net, torch.rand(2, *SHAPES[options.network]))
    groups = math.ceil(options.batch / math.ceil(options.batch / GroupedFlips().groups))
    # Passes of every layer, and multiply-adds a weight: one for the draw, and one for each flip of it.
    costs = {"cnn": (1, 0), "plain": (1, 1), "groups": (1, groups), "flipout": (2, 1)}
    table = [["step", "forward", "training", "x cnn", "drawing weights", "of it an image"]]
    for name, (passes, draws) in costs.items():
        a_step = (f"{draws * weights:,}", f"{draws * weights / options.batch:,.0f}")
        table.append([name, f"{passes * forward:,}", f"{passes * training:,}", f"{passes:.2f}", *a_step])
    return table


def multiply_adds(net: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Multiply-adds an image of the Linear and Conv2d layers, forward and in training, and the number of weights.

    Backward takes a forward's for the weights' gradient and as many for the input's, which a layer that sees the
    images themselves does without. `x` holds at least 2 images.
    """
    forward, training, weights = 0, 0, 0

    def count(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal forward, training, weights
        # One output element takes a product with each weight of a row: inputs of a group times kernel area.
        products = output[0].numel() * layer.weight[0].numel()
        forward += products
        training += products * (3 if inputs[0].requires_grad else 2)
        weights += layer.weight.numel()

    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    net(x)
    return forward, training, weights


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
    method, _, compiled = name.partition("+")
    ivon = method == "ivon"
    model = Classifier(bayesian(net), NUM_DATA)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.0063 if ivon else 1.2e-4)
    model.to(memory_format=layout)
    guide.to(memory_format=layout)
    optimizer = build_optimizer("ivon" if ivon else "adam", model, guide, lr=0.01 if ivon else 1e-4)
    elbo = KLScaledELBO(NUM_DATA)
    handlers = ESTIMATORS["plain" if ivon else method](), BatchAccuracy()
    # A parameter store of its own: the contenders' parameters have the same names.
    parameters: dict = {"params": {}, "constraints": {}}

    def step() -> None:
        optimizer.param_groups[0]["kl_per_datum"] = elbo.kl_weight / NUM_DATA
        # Entering the compiled arithmetic anew compiles nothing anew: torch keeps what it compiled with the function.
        arithmetic = compiled_arithmetic() if compiled else nullcontext()
        with pyro.get_param_store().scope(parameters), handlers[0], handlers[1], arithmetic:
            elbo.loss_and_grads(model, guide, x, y)
            descend(optimizer)

    return step, optimizer


def ivon_opt(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format) -> Contender:
    """IVON's own implementation (Shen et al. 2024), which draws every parameter of the deterministic network."""
    import ivon

    optimizer = ivon.IVON(net.parameters(), lr=0.01, ess=NUM_DATA)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step, optimizer


def bayesian_torch(net: nn.Module, x: Tensor, y: Tensor, layout: torch.memory_format, *, kind: str) -> Contender:
    """The layers of bayesian-torch, whose biases are random too, and the loss of its examples."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -9.0}
    dnn_to_bnn(net, {**settings, "type": kind, "moped_enable": False, "moped_delta": 0.5})
    net.to(memory_format=layout)
    return _with_adam(net.parameters(), lambda: F.cross_entropy(net(x), y) + get_kl_loss(net) / len(x))


# The first that fits the network is its base.
CONTENDERS: dict[str, Callable[..., Contender] | None] = {
    "hand": by_hand,
    "cnn": deterministic,
    **{name: partial(ours, name=name) for name in ("plain", "groups", "flipout", "local", "ivon")},
    **{name: partial(ours, name=name) for name in ("plain+compile", "groups+compile", "ivon+compile")},
    "ivon-opt": ivon_opt,
    "bayesian-torch flipout": partial(bayesian_torch, kind="Flipout"),
    "bayesian-torch reparam": partial(bayesian_torch, kind="Reparameterization"),
    "tyxe": None,
    "tfp": None,
}
_PACKAGES = {"ivon-opt": "ivon", "bayesian-torch": "bayesian_torch", "tyxe": "tyxe", "tfp": "tensorflow_probability"}


def _contender(name: str, options: argparse.Namespace, net: nn.Module | None = None) -> Contender:
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x = torch.rand(options.batch, *SHAPES[options.network]).contiguous(memory_format=layout)
    net = (net or build(options.network, deterministic=True)).to(memory_format=layout)
    make = CONTENDERS[name]
    assert make is not None
    return make(net, x, torch.randint(10, (len(x),)), layout)


def _with_adam(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Contender:
    optimizer = Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, optimizer


def _peak_and_held(name: str, options: argparse.Namespace) -> tuple[int, int]:
    _set_up(options)
    # What the libraries load at the first step of all, 100 MB and more, is no part of a network's memory.
    channels = SHAPES[options.network][0]
    convolution = [nn.Conv2d(channels, channels, 3), nn.AdaptiveAvgPool2d(28)] if channels == 3 else []
    tiny = nn.Sequential(*convolution, nn.Flatten(), nn.Linear(784 * channels, 10))
    _contender(name, argparse.Namespace(**{**vars(options), "batch": 2}), tiny)[0]()
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    step, optimizer = _contender(name, options)
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before, _bytes(optimizer.param_groups) + _bytes(optimizer.state)


def _bytes(held: object) -> int:
    if isinstance(held, Tensor):
        return held.nbytes
    parts: Iterable = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(map(_bytes, parts))


def _set_up(options: argparse.Namespace) -> None:
    if not options.default_malloc:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pyro.enable_validation(False)


def _heading(options: argparse.Namespace) -> str:
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    named = re.search(r"model name\s*:\s*(.+)", info)
    layout = "channels_last" if options.channels_last else "contiguous"
    return (
        f"{options.network}: torch {torch.__version__}, threads {options.threads}, batch {options.batch}, "
        f"{named[1] if named else platform.machine()}, {layout}, "
        f"mallopt tuning {'off' if options.default_malloc else 'on'}"
    )


def _why_absent(name: str) -> str | None:
    package = name.partition(" ")[0]
    installed = package not in _PACKAGES or find_spec(_PACKAGES[package]) is not None
    if CONTENDERS[name] is None:
        return "installed, but no step is written for it" if installed else "not installed here"
    if name.endswith("+compile") and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler, such as g++"
    return None if installed else f"not installed; pip install {package}"


if __name__ == "__main__":
    main()
