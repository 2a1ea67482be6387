"""The memory of a prediction does not grow with the data that it reads from a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Peak of anonymous memory above the start and beside the result, MiB.
PREDICT = """
import re, sys, threading
from pathlib import Path
import numpy as np, torch
from torch import nn
from ppl_bnn import Classifier, MeanFieldNormal, bayesian, predict
from ppl_bnn.prediction import kept

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

folder, rows, kept.KEPT_BYTES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, 100))
for first in range(0, rows, 100_000):
    x[first : first + 100_000] = np.random.default_rng(first).standard_normal((100_000, 100), np.float32)
x.flush()
x, y = np.load(folder / "x.npy", mmap_mode="r"), np.arange(rows) % 3
net = bayesian(nn.Sequential(nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 3)))
guide = MeanFieldNormal(Classifier(net, rows), torch.zeros(1, 100), torch.zeros(1).long())
predict(net, guide, x[:100], y[:100], num_samples=2, progress=False)
start, most, done = anonymous(), 0, threading.Event()

def watch():
    global most
    while not done.wait(0.01):
        most = max(most, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
found = predict(net, guide, x, y, num_samples=10, progress=False)
done.set()
watcher.join()
parts = [part for part in [*vars(found).values(), *found.sums.values()] if isinstance(part, torch.Tensor)]
returned = sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())
print((most - start - returned) // 2**20, len(found.kept), found.nll > 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("rows", "kept"),
    [(200_000, 2**20), pytest.param(1_000_000, 2**30, marks=pytest.mark.slow)],
)
def test_predicting_a_mapped_file_takes_less_than_1_gib(rows, kept, tmp_path):
    run = [sys.executable, "-c", PREDICT, str(tmp_path), str(rows), str(kept)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, timeout=600)
    mebibytes, number, finite = printed.stdout.split()
    # A chunk of inputs has 25 MiB; the file 76 MiB and 381 MiB.
    assert int(mebibytes) < (250 if rows < 1_000_000 else 350)
    assert int(number) == (1000 if rows < 1_000_000 else rows)
    assert finite == "True"
