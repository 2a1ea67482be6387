"""Measures the efficiency of a training step on several ranks: ours, and DistributedDataParallel's."""

import argparse
import inspect
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from tqdm import tqdm

from ppl_bnn import Classifier, MeanFieldNormal, TrainingStep, bayesian, build
from ppl_bnn.distributed import Communicator, connect
from ppl_bnn.guides import ESTIMATORS
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.elbo import Terms
from ppl_bnn.native.memory import keep_freed_memory

_HELP = """
Every rank computes a batch of its own, with the same number of threads. In a round each contender takes one step, in a
new random order, so that other work on the machine slows all of them alike:

  alone   rank 0 takes a step without messages while the other ranks sleep: T1
  silent  all ranks take a step at the same time, without messages: the cost of sharing memory and caches
  ours    all ranks take the step of ppl_bnn.fit: gradients in buckets, and one small message
  ddp     the deterministic network in DistributedDataParallel with Adam, and the same small message (needs torchrun and
          --deterministic)

A step of several ranks ends when its last rank ends. Efficiency is T1 / TN with the same batch on each rank. The table
gives medians of the rounds' ratios. Pixels and labels are random.

examples:
  torchrun --nproc-per-node 2 benchmarks/scaling_efficiency.py vgg16 --deterministic
  horovodrun -np 2 --gloo python benchmarks/scaling_efficiency.py resnet18 --estimator flipout
"""


def main() -> None:
    """Measure what the command line asks for, and print a table on rank 0."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    add = parser.add_argument
    add("network", choices=("vgg16", "resnet18"), help="which network")
    add("--deterministic", action="store_true", help="the deterministic network instead of the Bayesian one")
    add("--estimator", choices=list(ESTIMATORS), default="groups", help="of the Bayesian network (default: groups)")
    add("--batch", type=int, default=128, help="batch size of each rank (default: 128)")
    add("--rounds", type=int, default=9, help="timed steps of each contender, after one untimed step (default: 9)")
    add("--threads", type=int, default=1, help="threads of each rank (default: 1)")
    add("--bucket_mb", type=float, default=25.0, help="as train.bucket_mb (default: 25)")
    add("--compression", choices=("none", "fp16"), default="none", help="as train.compression (default: none)")
    add("--json", type=Path, help="file for each step's seconds, round by round")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    ranks = connect(timeout=120)
    if ranks.size == 1:
        parser.error("start it on several ranks: torchrun --nproc-per-node 2 " + parser.prog)
    try:
        found, calls = measure(options, ranks)
        if ranks.is_main:
            report(options, ranks, found, calls)
            if options.json:
                options.json.write_text(json.dumps(found), encoding="utf-8")
    finally:
        ranks.shutdown()


def measure(options: argparse.Namespace, ranks: Communicator) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return each contender's seconds a step, and the seconds that this rank waited in ours, by kind of call."""
    torch.manual_seed(ranks.rank)
    steps = {"alone": ours(options, None), "ours": ours(options, ranks)}
    steps["silent"] = steps["alone"]
    if options.deterministic and torch.distributed.is_initialized():
        steps["ddp"] = ddp(options, ranks)
    found: dict[str, list[float]] = {name: [] for name in steps}
    waited: dict[str, float] = {}
    order = random.Random(0)
    for number in tqdm(range(options.rounds + 1), unit="round", disable=not ranks.is_main or None):
        for name in order.sample(list(steps), len(steps)):
            ranks.barrier()
            ranks.calls.clear()
            started = time.perf_counter()
            if name != "alone" or ranks.is_main:
                steps[name]()
            own = time.perf_counter() - started
            calls = {kind: call.seconds for kind, call in ranks.calls.items()}
            slowest = float(ranks.gather(torch.tensor([own], dtype=torch.float64)).max())
            if number:
                found[name].append(slowest)
                if name == "ours":
                    waited = {kind: waited.get(kind, 0.0) + value / options.rounds for kind, value in calls.items()}
    return found, waited


def ours(options: argparse.Namespace, ranks: Communicator | None) -> Callable[[], None]:
    """Return the step of `ppl_bnn.fit`, without communication if `ranks` is None."""
    net = build(options.network, deterministic=True)
    model = Classifier(net if options.deterministic else bayesian(net), 50_000).to(memory_format=torch.channels_last)
    x, y = batch(options)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=1.2e-4).to(memory_format=torch.channels_last)
    if ranks is not None:
        ranks.broadcast([*model.state_dict().values(), *guide.state_dict().values()])
    step = TrainingStep(
        model, guide, x, y, num_data=50_000, lr=1e-4, communicator=ranks,
        estimator="plain" if options.deterministic else options.estimator, bucket_mb=options.bucket_mb,
        compression=options.compression,
    )  # fmt: skip
    if ranks is None:
        return lambda: step(x, y)

    def together() -> None:
        found = step(x, y)
        terms = Terms(found.loss, found.nll, found.kl)
        data_parallel.agree(ranks, [(terms, found.correct)], stop=False, save=False)

    return together


def ddp(options: argparse.Namespace, ranks: Communicator) -> Callable[[], None]:
    """Return the step of DistributedDataParallel on the deterministic network, with loss and accuracy as in a log."""
    net = build(options.network, deterministic=True).to(memory_format=torch.channels_last)
    # Each rank keeps its own batch norm statistics, as ours do between checkpoints. The setting has two names.
    ddp_settings = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    own_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in ddp_settings else "broadcast_buffers": False}
    parallel = nn.parallel.DistributedDataParallel(
        net, bucket_cap_mb=options.bucket_mb, gradient_as_bucket_view=True, **own_buffers
    )
    optimizer = Adam(net.parameters(), lr=1e-4, fused=True)
    x, y = batch(options)

    def step() -> None:
        optimizer.zero_grad()
        logits = parallel(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        ranks.sum(loss.item(), float((logits.argmax(-1) == y).sum()))
        optimizer.step()

    return step


def batch(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images [B, 3, 32, 32] and labels [B]."""
    x = torch.rand(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (options.batch,))


def report(
    options: argparse.Namespace, ranks: Communicator, found: dict[str, list[float]], waited: dict[str, float]
) -> None:
    """Print the table."""
    kind = "CNN" if options.deterministic else f"BNN, {options.estimator}"
    print(
        f"{options.network} ({kind}), batch {options.batch}: {ranks.size} ranks over {ranks.name}, {options.threads} "
        f"thread each, buckets of {options.bucket_mb:g} MiB, {options.rounds} rounds"
    )
    print(f"{'step':8}{'median s':>10}{'efficiency':>12}   quartiles of the rounds'")
    for name, seconds in found.items():
        ratios = [one / own for one, own in zip(found["alone"], seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"{name:8}{statistics.median(seconds):10.4f}{middle:12.3f}   {low:.3f}, {high:.3f}")
    if "ddp" in found:
        ratios = [own / theirs for own, theirs in zip(found["ours"], found["ddp"], strict=True)]
        print(f"ours takes {statistics.median(ratios):.3f} of ddp's time")
    parts = ", ".join(f"{kind} {1e3 * seconds:.1f} ms" for kind, seconds in waited.items())
    print(f"rank 0 waited in each step of ours for: {parts}")


if __name__ == "__main__":
    main()
