"""Compares the predictive by moments with that by 1000 draws, on a trained posterior, and measures its cost.

python benchmarks/moments.py runs/mnist-fc/out --images 2000
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_bnn import metrics
from ppl_bnn.experiment.setup import Experiment, opened
from ppl_bnn.native.memory import keep_freed_memory
from ppl_bnn.prediction.moments import moment_network, moment_predictive, softmax_moments, standard_normals
from ppl_bnn.prediction.plain import plain
from ppl_bnn.prediction.predictive import draw_outputs


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a run's out folder")
    parser.add_argument("--parts", default="quality,time", help="what to measure (default: quality,time)")
    parser.add_argument("--images", type=int, default=2000, help="number of test images (default: 2000)")
    parser.add_argument("--draws", type=int, default=1000, help="draws of the reference (default: 1000)")
    parser.add_argument("--fewer", default="10,30,100,300", help="numbers of other draws (default: 10,30,100,300)")
    parser.add_argument("--batch", type=int, default=100, help="time: images a forward pass (default: 100)")
    parser.add_argument("--rounds", type=int, default=7, help="time: timed rounds (default: 7)")
    parser.add_argument("--data_dir", default=None, help="folder of the data sets (default: that of the run)")
    options = parser.parse_args()
    keep_freed_memory()
    run = opened(options.out, data_dir=options.data_dir)
    run.restored("last")
    x, y = (tensor[: options.images] for tensor in run.tensors(run.test_data))
    print(f"{run.name}: {len(x)} test images, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if "quality" in options.parts:
        quality(run, x, y, options)
    if "time" in options.parts:
        seconds(run, x, options)


def quality(run: Experiment, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    """Print the distance of each method to the draws (total variation of an image) and its metrics."""
    fewer = [int(count) for count in options.fewer.split(",")]
    rows = {f"{options.draws} draws": (many := _by_draws(run, x, options.draws, 1, options.batch, {}))}
    others: dict[int, tuple[Tensor, Tensor]] = {}
    _by_draws(run, x, max(fewer), 2, options.batch, others, fewer)
    rows |= {f"{count} other draws": found for count, found in others.items()}
    rows["moments"] = moment_predictive(run.model.net, run.guide, x, batch_size=options.batch)
    with torch.no_grad():
        mean, variance = moment_network(run.model.net, run.guide)(x)
    rows["moments, 256 points"] = softmax_moments(mean, variance, standard_normals(mean.shape[1], 256))
    for name, logits in (("moments, probit", mean / (1 + torch.pi / 8 * variance).sqrt()), ("mean of logits", mean)):
        rows[name] = (logits.softmax(-1), metrics.entropy(logits.softmax(-1)))
    print(f"{'':22}  TV mean   TV 95%  accuracy     NLL     ECE   total  aleatoric  epistemic")
    for name, (probs, entropy) in rows.items():
        distance = (probs - many[0]).abs().sum(1) / 2
        likelihood = -float(probs.gather(1, y[:, None]).log().mean())
        total, aleatoric, epistemic = (float(part.mean()) for part in metrics.uncertainties(probs, entropy))
        print(
            f"{name:22}  {float(distance.mean()):.5f}  {float(distance.quantile(0.95)):.5f}    "
            f"{metrics.accuracy(probs, y):.4f}  {likelihood:.4f}  {metrics.ece(probs, y):.4f}  {total:.4f}     "
            f"{aleatoric:.4f}     {epistemic:.4f}",
            flush=True,
        )


def _by_draws(
    run: Experiment, x: Tensor, count: int, seed: int, batch: int, found: dict, at: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    probs, entropy = torch.zeros(1), torch.zeros(1)
    draws = draw_outputs(run.model.net, run.guide, x, num_samples=count, seed=seed, batch_size=batch)
    for number, logits in enumerate(tqdm(draws, total=count, disable=None), start=1):
        one = logits.softmax(-1)
        probs, entropy = probs + one, entropy + metrics.entropy(one)
        if at and number in at:
            found[number] = (probs / number, entropy / number)
    return probs / count, entropy / count


@torch.no_grad()
def seconds(run: Experiment, x: Tensor, options: argparse.Namespace) -> None:
    """Print the time of each method, in turns, as a ratio to the faster of two deterministic forward passes."""
    found = plain(run.model.net)
    for site in run.guide.sites:
        found.parameter(site).copy_(found.place(site, *run.guide.loc_scale(site))[0])
    start = time.perf_counter()
    network, net = moment_network(run.model.net, run.guide), found.net
    points = standard_normals(network(x[:1])[0].shape[1])
    print(f"building the network of moments, once: {1e3 * (time.perf_counter() - start):.0f} ms")
    layouts = {"deterministic": x, "deterministic, channels_last": x.contiguous(memory_format=torch.channels_last)}
    ways: dict[str, Callable[[], object]] = {
        name: partial(lambda images: [net(part) for part in images.split(options.batch)], images)
        for name, images in layouts.items()
    }
    ways["moments of the logits"] = lambda: [network(part) for part in x.split(options.batch)]
    ways["moments"] = lambda: [softmax_moments(*network(part), points) for part in x.split(options.batch)]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    base = min((times[name] for name in layouts), key=statistics.median)
    print("time, batch", options.batch)
    for name, each in times.items():
        ratios = [mine / its for mine, its in zip(each, base, strict=True)]
        print(f"{name:30} {1e6 * statistics.median(each) / len(x):8.1f} us an image   {statistics.median(ratios):5.2f}")


if __name__ == "__main__":
    main()
