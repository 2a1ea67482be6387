"""Times a Bayesian training step, ours and those of other packages, beside a deterministic torch network."""

import argparse
import gc
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pyro
import torch
from torch import nn
from tqdm import tqdm

from contenders import CONTENDERS, Contender, package, why_absent
from operations import operations
from ppl_bnn import build
from ppl_bnn.native.memory import keep_freed_memory
from report import Table, aligned, as_markdown, cpu_name
from turns import in_turns, ratios

SHAPES = {"vgg16": (3, 32, 32), "resnet18": (3, 32, 32), "bnn-fc": (1, 28, 28), "tabular": (30,)}
BATCHES = {"vgg16": 128, "resnet18": 128, "bnn-fc": 100, "tabular": 50}
# Chains of Linear layers: their base is called mlp, and `hand` is written for them.
DENSE = ("bnn-fc", "tabular")
# A contender of another framework is also compared with that framework's deterministic network.
OWN_BASES = {"tfp": "tfp cnn"}

_HELP = """
A step is: gradients to zero, forward, loss, backward, update. In a round each contender runs one step, in a new random
order, so that other work on the machine slows all of them alike. Pixels and labels are random; time and memory do not
depend on them. The network `tabular` is 30-50-50-2 with ReLU, on rows of 30 numbers.

contenders:
  cnn, mlp                       the deterministic network in plain torch, with Adam: the base. It is called mlp for
                                 bnn-fc and tabular, cnn for the others
  hand                           bnn-fc and tabular only: the plain estimator's step written by hand in torch
  plain, flipout, flipout-bfloat16, groups, local
                                 our estimators with Adam, as ppl_bnn.fit runs a step
  ivon                           the plain estimator with optimizer="ivon"
  compiled, plain-compiled       the deterministic step and plain's with torch.compile; only if named
  ivon-opt                       the optimizer of the package ivon-opt on the deterministic network
  bayesian-torch flipout, bayesian-torch reparam
                                 the network converted by the package bayesian-torch, with Adam
  tyxe                           TyXe's BNN of the network in its flipout context, with Pyro's Adam
  tfp                            the network in Keras with TensorFlow Probability's flipout layers, as a tf.function;
                                 "tfp cnn", Keras's own layers, is its base too and comes with it; always channels_last
A package that is not installed or fails is left out, and a line says why. tfp is for float32 on a CPU. Install them
all:
  pip install ivon-opt bayesian-torch tyxe==0.0.2 tensorflow-probability tf-keras

examples:
  python benchmarks/train_step.py --network resnet18 --channels_last --contenders plain,groups --rounds 15
  python benchmarks/train_step.py --network bnn-fc --threads 1 --rounds 150 --markdown
  python benchmarks/train_step.py --network tabular --threads 1 --rounds 300 --contenders plain,ivon,ivon-opt
  python benchmarks/train_step.py --contenders "bayesian-torch flipout,tyxe,tfp"
  python benchmarks/train_step.py --memory
  python benchmarks/train_step.py --device cuda --precision bfloat16 --channels_last
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure time, memory or operations of the training steps named on the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("--network", choices=list(SHAPES), default="vgg16", help="which network (default: vgg16)")
    add("--batch", type=int, help="images a step (default: 128; bnn-fc: 100; tabular: 50)")
    add("--threads", type=int, default=2, help="CPU threads of torch and of TensorFlow (default: 2)")
    add("--rounds", type=int, default=7, help="timed steps of each contender, after 2 untimed ones (default: 7)")
    add("--channels_last", action="store_true", help="use this memory layout for images and kernels of every contender")
    add(
        "--device",
        default="cpu",
        help="cpu, cuda or cuda:N; the clock waits for the device at the end of a step (default: cpu)",
    )
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: all under torch.autocast")
    add("--contenders", help="which to run, separated by commas; the base always runs (default: all that fit)")
    add("--memory", action="store_true", help="measure peak memory instead: 3 steps of each, in a process of its own")
    add("--operations", action="store_true", help="count multiply-adds from layer shapes instead; nothing is timed")
    add("--markdown", action="store_true", help="print the table as markdown too")
    add(
        "--default_malloc",
        action="store_true",
        help="do not call ppl_bnn.native.memory.keep_freed_memory()",
    )
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCHES[options.network]
    others = ("cnn",) if options.network in DENSE else ("mlp", "hand")
    known = [name for name in CONTENDERS if name not in others]
    names = [name for name in known if "compiled" not in name]
    if options.contenders:
        chosen = [name.strip() for name in options.contenders.split(",")]
        names = [known[0], *(OWN_BASES[name] for name in chosen if name in OWN_BASES), *chosen]
    if unknown := set(names) - set(known):
        parser.error(f"{options.network} has no contender {min(unknown)!r}; it has {', '.join(known)}")
    # Batch norm cannot train on one image of a 1x1 map, and one round has no quartiles.
    if min(options.batch, options.rounds) < 2 or options.threads < 1:
        parser.error("--batch and --rounds must be at least 2, --threads at least 1")
    try:
        options.device = torch.empty(0, device=options.device).device
    except RuntimeError as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    if options.memory and sys.platform != "linux" and options.device.type == "cpu":
        parser.error("--memory reads /proc, which only Linux has")
    set_up(options)
    print(_heading(options), flush=True)
    if options.operations:
        table = operations(deterministic_network(options.network), SHAPES[options.network], options.batch)
    else:
        absent = {name: why for name in names if (why := why_absent(name, options.device, options.precision))}
        for name, why in absent.items():
            print(f"{name}: {why}", flush=True)
        runnable = [name for name in dict.fromkeys(names) if name not in absent]
        table = (memory if options.memory else seconds)(runnable, options)
    print(*aligned(table), sep="\n")
    if options.markdown:
        print("", *as_markdown(table), sep="\n")


def seconds(names: list[str], options: argparse.Namespace) -> Table:
    """Time the contenders' steps in turns. Ratios are to the first of `names`."""
    steps = {}
    for name in names:
        with _a_package_may_fail(name):
            step = build_contender(name, options).step
            step()
            step()
            steps[name] = step

    def wait() -> None:
        if options.device.type != "cpu":
            torch.get_device_module(options.device).synchronize(options.device)

    found = in_turns(steps, options.rounds, wait=wait)
    table = [["step", "median s", "min s", f"x {names[0]}", "quartiles of the rounds'"]]
    for name, own in found.items():
        times = f"{statistics.median(own):.5f}", f"{min(own):.5f}"
        table.append([name, *times, *ratios(own, found[names[0]])])
    for name, base in OWN_BASES.items():
        if name in found and base in found:
            table.append([f"{name}, x {base}", "", "", *ratios(found[name], found[base])])
    return table


def memory(names: list[str], options: argparse.Namespace) -> Table:
    """Measure the device's peak memory above that before the network was built. Ratios are to the first of `names`.

    The last column is (peak - parameters and optimizer state) / the base's peak. It is at most 1.6 if a step takes at
    most 1.6 times the base's memory plus its own parameters and optimizer state.
    """
    table = [["step", "peak MiB", f"x {names[0]}", "parameters, state MiB", f"peak less these, x {names[0]}"]]
    found = {}
    for name in tqdm(names, unit="contender", disable=None):
        # Spawned, because a fork would start with this process's memory.
        with _a_package_may_fail(name), ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            found[name] = fresh.submit(_peak_and_held, name, options).result()
    base = found[names[0]][0]
    for name, (peak, held) in found.items():
        mebibytes = (f"{count / 2**20:,.1f}" for count in (peak, held))
        ratios = (f"{count / base:.2f}" for count in (peak, peak - held))
        table.append([name, *(cell for pair in zip(mebibytes, ratios, strict=True) for cell in pair)])
    return table


@contextmanager
def _a_package_may_fail(name: str) -> Iterator[None]:
    """Report in one line that another package's contender failed, and continue. A failure of ours ends the run."""
    try:
        yield
    except Exception as error:
        if package(name) is None:
            raise
        tqdm.write(f"{name}: could not run: {type(error).__name__}: {' '.join(str(error).split())}")


def build_contender(
    name: str, options: argparse.Namespace, net: nn.Module | None = None, make: Callable[..., Contender] | None = None
) -> Contender:
    """Build a contender by name, on random images, for the options.

    Args:
        net: replaces the network that they name.
        make: replaces the function in `CONTENDERS`.
    """
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x = torch.rand(options.batch, *SHAPES[options.network]).to(options.device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    net = (net or deterministic_network(options.network)).to(options.device).to(memory_format=layout)
    labels = torch.randint(2 if options.network == "tabular" else 10, (len(x),)).to(options.device)
    contender = (make or CONTENDERS[name])(net, x, labels, layout)
    if options.precision == "float32":
        return contender

    def step() -> None:
        with torch.autocast(options.device.type, torch.bfloat16, cache_enabled=False):
            contender.step()

    return contender._replace(step=step)


def deterministic_network(name: str) -> nn.Module:
    """A network of `SHAPES` by name, in plain torch."""
    if name == "tabular":
        return nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))
    return build(name, deterministic=True)


def _peak_and_held(name: str, options: argparse.Namespace) -> tuple[int, int]:
    set_up(options)
    # Libraries load 100 MB and more at the very first step. This is not part of a network's memory.
    shape = SHAPES[options.network]
    convolution = [nn.Conv2d(3, 3, 3, padding="same")] if shape[0] == 3 else []
    tiny = nn.Sequential(*convolution, nn.Flatten(), nn.Linear(math.prod(shape), 10))
    build_contender(name, argparse.Namespace(**{**vars(options), "batch": 2}), tiny).step()
    gc.collect()
    on_cpu, backend = options.device.type == "cpu", torch.get_device_module(options.device)
    if on_cpu:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:
        before = backend.memory_allocated(options.device)
        backend.reset_peak_memory_stats(options.device)
    contender = build_contender(name, options)
    for _ in range(3):
        contender.step()
    if on_cpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = backend.max_memory_allocated(options.device)
    return peak - before, contender.held()


def set_up(options: argparse.Namespace) -> None:
    """Set up a process before it measures anything."""
    if not options.default_malloc:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pyro.enable_validation(False)


def _heading(options: argparse.Namespace) -> str:
    layout = "channels_last" if options.channels_last else "contiguous"
    return (
        f"{options.network}: torch {torch.__version__}, threads {options.threads}, batch {options.batch}, "
        f"{cpu_name()}, {options.device}, {options.precision}, {layout}, "
        f"mallopt tuning {'off' if options.default_malloc else 'on'}"
    )


if __name__ == "__main__":
    main()
