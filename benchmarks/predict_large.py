"""Predictions from data that stay in a file: memory, and what reading in chunks costs beside tensors in memory."""

import argparse
import os
import random
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal, as_examples, bayesian, build, predict
from ppl_bnn.prediction import chunks
from ppl_bnn.prediction.result import Predictive
from turns import ratios

_HELP = """
mapped: a file of `--rows` times 100 float32 features, read through np.memmap and predicted by 100-32-3. What the
prediction adds to the process's anonymous memory at most, beside the result that it returns.

chunks: the same tensors predicted as tensors and, with a transform that changes nothing, in chunks; in turns. Ratios
are of one round's CPU times. `tabular` is 100-512-3 on `--rows` rows, others are networks on `--images` images.
"""
_FEATURES, _CLASSES = 100, 3


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line names."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    parser.add_argument("what", choices=["mapped", "tabular", "vgg16", "resnet18"])
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows (default: ten million, 4 GB)")
    parser.add_argument("--images", type=int, default=10_000, help="images of 32 x 32 (default: 10,000)")
    parser.add_argument("--draws", type=int, default=10, help="draws (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after an untimed one (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--chunk", type=int, default=128, help="MiB of inputs in a chunk (default: the library's 128)")
    parser.add_argument("--folder", help="where to write the file (default: a temporary folder)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chunks.CHUNK_BYTES = options.chunk * 2**20
    print(f"torch {torch.__version__}, threads {options.threads}, {options.draws} draws")
    if options.what == "mapped":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _mapped(_written(Path(folder) / "x.npy", options.rows), options)
    else:
        _in_chunks(options)


def _written(path: Path, rows: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, _FEATURES))
    for start in range(0, rows, 100_000):
        x[start : start + 100_000] = generator.standard_normal(x[start : start + 100_000].shape, np.float32)
    x.flush()
    return np.load(path, mmap_mode="r")


def _dense(width: int) -> tuple[nn.Module, MeanFieldNormal]:
    torch.manual_seed(0)
    net = bayesian(nn.Sequential(nn.Linear(_FEATURES, width), nn.ReLU(), nn.Linear(width, _CLASSES)))
    x, y = torch.zeros(1, _FEATURES), torch.zeros(1).long()
    return net, MeanFieldNormal(Classifier(net, 1), x, y, init_loc="he", init_scale=0.01)


def _mapped(x: np.ndarray, options: argparse.Namespace) -> None:
    net, guide = _dense(32)
    y = np.arange(len(x)) % _CLASSES
    predict(net, guide, x[:100], y[:100], num_samples=2, progress=False)
    start, most, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    found = predict(net, guide, x, y, num_samples=options.draws, progress=False)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    returned = _size(found)
    own, result = (size / 2**20 for size in (most[0] - start - returned, returned))
    print(
        f"predict of {len(x)} rows: {own:.0f} MiB beside the {result:.0f} MiB returned, at most; {seconds:.0f} s; "
        f"single draws of {len(found.kept)} examples kept"
    )


def _anonymous() -> int:
    """Bytes of this process in memory that no file backs."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def _size(found: Predictive) -> int:
    """Bytes of the tensors of a result, each counted once."""
    parts = [part for part in [*vars(found).values(), *found.sums.values()] if isinstance(part, Tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def _in_chunks(options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    if options.what == "tabular":
        net, guide = _dense(512)
        x = torch.randn(options.rows, _FEATURES, generator=generator)
        y = torch.arange(len(x)) % _CLASSES
    else:
        torch.manual_seed(0)
        net = build(options.what)
        x = torch.rand(options.images, 3, 32, 32, generator=generator)
        y = torch.arange(len(x)) % 10
        guide = MeanFieldNormal(Classifier(net, len(x)), x[:1], y[:1], init_loc="he", init_scale=0.01)

    def run(*data: object) -> Callable[[], Predictive]:
        settings = {"method": "draws", "keep": range(min(1000, len(x))), "log_likelihood": False, "progress": False}
        return lambda: predict(net, guide, *data, num_samples=options.draws, **settings)  # type: ignore[arg-type]

    contenders = {"tensors": run(x, y), "chunks": run(as_examples((x, y), transform=lambda x: x))}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for number in range(options.rounds + 1):
        for name in order.sample(list(contenders), len(contenders)):
            before = os.times()
            contenders[name]()
            after = os.times()
            if number:
                cpu[name].append(after.user + after.system - before.user - before.system)
    for name, seconds in cpu.items():
        ratio, quartiles = ratios(seconds, cpu["tensors"])
        print(f"{name:8} {statistics.median(seconds):8.2f} s of CPU {ratio:>6}  quartiles {quartiles}")


if __name__ == "__main__":
    main()
