"""Times training steps on data that stay in files, and on images that worker processes decode."""

import argparse
import io
import itertools
import random
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ppl_bnn import (
    Classifier,
    Examples,
    MeanFieldNormal,
    TrainingStep,
    as_examples,
    bayesian,
    build,
    fit,
    normalize,
)
from ppl_bnn.data import TensorExamples
from ppl_bnn.distributed import Alone
from ppl_bnn.errors import Interrupted
from ppl_bnn.inference.reading import Batch, Reader
from ppl_bnn.models.labels import class_labels
from ppl_bnn.native.memory import keep_freed_memory
from turns import ratios

_HELP = """
mapped: a file of `--rows` times 100 float32 features, read through np.memmap, beside the same array in memory. In a
round each takes `--steps` steps, in a random order; ratios are of one round's times, of the clock and of the CPUs. Then
`fit` trains on the mapped file alone: what it adds to the process's memory, anonymous and file-backed.

jpeg: the images of `--file` (arrays jpeg, offsets, labels: `tools/fetch_data.py` says where from), decoded by worker
processes. The share of the time for which steps wait for data, and how long it takes to decode an image.
"""
_FEATURES, _CLASSES = 100, 10
_SIZES = {"100-64-10": (64,), "100-512-512-10": (512, 512)}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line names."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_HELP, formatter_class=layout)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the file (default: ten million, 4 GB)")
    parser.add_argument("--batch", type=int, default=1000, help="rows a step (default: 1000)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a contender in a round (default: 50)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, after an untimed one (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--folder", help="where to write the file (default: a temporary folder)")
    parser.add_argument("--file", help="an .npz of JPEG images; leaves out the mapped file")
    parser.add_argument("--network", default="resnet18", help="of the images (default: resnet18)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: 2)")
    parser.add_argument("--images", type=int, default=128, help="images a step (default: 128)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, threads {options.threads}")
    if options.file:
        _jpeg(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "x.npy"
        y = _write(path, options.rows)
        _memory(path, y, options)
        _mapped(path, y, options)


def _write(path: Path, rows: int) -> Tensor:
    generator = np.random.default_rng(0)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, _FEATURES))
    for start in range(0, rows, 100_000):
        x[start : start + 100_000] = generator.standard_normal(x[start : start + 100_000].shape, np.float32)
    x.flush()
    return torch.arange(rows) % _CLASSES


def _step(widths: tuple[int, ...], rows: int) -> tuple[TrainingStep, Classifier, MeanFieldNormal]:
    torch.manual_seed(0)
    sizes = [_FEATURES, *widths, _CLASSES]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = Classifier(bayesian(nn.Sequential(*layers[:-1])), rows)
    guide = MeanFieldNormal(model, torch.zeros(1, _FEATURES), torch.zeros(1).long(), init_loc="he", init_scale=0.01)
    x, y = torch.zeros(2, _FEATURES), torch.zeros(2).long()
    return TrainingStep(model, guide, x, y, num_data=rows, lr=1e-3), model, guide


def _mapped(path: Path, y: Tensor, options: argparse.Namespace) -> None:
    mapped = np.load(path, mmap_mode="r")
    held: dict[str, Examples] = {
        "memory": as_examples(torch.from_numpy(np.load(path)), y),
        "mapped": as_examples(mapped, y),
    }
    for name, widths in _SIZES.items():
        turns = {}
        with _closing_all() as opened:
            for kind, examples in held.items():
                step, _, _ = _step(widths, len(examples))
                turns[kind] = _many(step, opened(_batches(examples, options.batch)), options.steps)
            wall, cpu = _timed(turns, options.rounds)
        for kind in held:
            ratio, quartiles = ratios(wall[kind], wall["memory"])
            of_cpu, _ = ratios(cpu[kind], cpu["memory"])
            milliseconds = 1000 * statistics.median(wall[kind]) / options.steps
            print(f"{name:16} {kind:8} {milliseconds:8.3f} ms a step {ratio:>6}  quartiles {quartiles}  CPU {of_cpu}")


def _batches(examples: Examples, size: int) -> Iterator[Batch]:
    """As `fit` reads them: labels that are not in memory are checked."""
    labels = None if isinstance(examples, TensorExamples) else partial(class_labels, num_classes=_CLASSES)
    return Reader(examples, size, 0, Alone(), torch.device("cpu"), labels, torch.float32).batches(range(1000))


@contextmanager
def _closing_all() -> Iterator[Callable]:
    opened: list = []
    try:
        yield lambda one: opened.append(one) or one
    finally:
        for one in opened:
            one.close()


def _many(step: TrainingStep, batches: Iterator[Batch], steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            batch = next(batches)
            assert isinstance(batch.x, Tensor)
            step(batch.x, batch.y)

    return run


def _timed(turns: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the clock and of the CPUs, round by round."""
    wall: dict[str, list[float]] = {name: [] for name in turns}
    cpu: dict[str, list[float]] = {name: [] for name in turns}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(turns), len(turns)):
            started = time.perf_counter(), time.process_time()
            turns[name]()
            if number:
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    return wall, cpu


def _memory(path: Path, y: Tensor, options: argparse.Namespace) -> None:
    """Memory that training on the file adds, in a process that does nothing else."""
    examples = as_examples(np.load(path, mmap_mode="r"), y)
    _, model, guide = _step(_SIZES["100-64-10"], len(examples))
    left = iter(range(options.steps * options.rounds))
    start, most = _resident(), dict.fromkeys(_resident(), 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most.update({name: max(most[name], now) for name, now in _resident().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        how = {"epochs": 1, "batch_size": options.batch, "progress": False}
        fit(model, guide, examples, **how, should_stop=lambda: next(left, None) is None)  # type: ignore[arg-type]
    except Interrupted:
        pass
    finally:
        done.set()
        watcher.join()
    text = ", ".join(f"{(most[name] - start[name]) / 2**20:.0f} MiB {name}" for name in start)
    print(f"fit on {len(examples)} rows, at most above the start: {text}")


def _resident() -> dict[str, int]:
    """Bytes of this process in memory."""
    text = Path("/proc/self/status").read_text()
    names = {"anonymous": "RssAnon", "file-backed": "RssFile"}
    return {name: 1024 * int(re.search(rf"{key}:\s*(\d+)", text)[1]) for name, key in names.items()}  # type: ignore[index]


class Jpegs(Dataset):
    """The images of an .npz, decoded one by one."""

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            self.bytes, self.offsets, self.labels = file["jpeg"], file["offsets"], file["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """An image, uint8 [3, H, W], and its label."""
        with Image.open(io.BytesIO(self.bytes[self.offsets[row] : self.offsets[row + 1]].tobytes())) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), int(self.labels[row])


def _jpeg(options: argparse.Namespace) -> None:
    data = Jpegs(options.file)
    started = time.process_time()
    for row in range(200):
        data[row % len(data)]
    print(f"decoding: {(time.process_time() - started) / 200 * 1e6:.0f} microseconds of CPU an image")
    change = normalize(0.5, 0.25)
    examples = as_examples(data, num_workers=options.workers, transform=change)
    x, y = examples.take(torch.arange(2))
    assert isinstance(x, Tensor)
    assert y is not None
    model = Classifier(build(options.network, image_shape=tuple(x.shape[1:]), num_outputs=10), len(data))
    guide = MeanFieldNormal(model, change(x[:1]), y[:1], init_loc="he", init_scale=1e-3)
    step = TrainingStep(model, guide, change(x), y, num_data=len(data), lr=1e-4)
    waited, whole = [], []
    with closing(_batches(examples, options.images)) as batches:  # type: ignore[type-var]
        for _ in range(options.rounds + 1):
            started = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - started)
            step(batch.x, batch.y)  # type: ignore[arg-type]
            whole.append(time.perf_counter() - started)
    # Without the first, which starts the workers.
    share = sum(waited[1:]) / sum(whole[1:])
    print(
        f"{options.network}, {options.images} images a step, {options.workers} workers: "
        f"{1000 * statistics.median(whole[1:]):.0f} ms a step, of which {share:.1%} waiting for data"
    )


if __name__ == "__main__":
    main()
