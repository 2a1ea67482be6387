"""The memory of a training does not grow with the data that it reads from a file."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit

ROWS, WIDTH = 8192, 1024


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def trained(folder):
    """Number of steps, and the peak of anonymous memory above the start, in MiB."""
    file = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (ROWS, WIDTH))
    file[:] = 1
    file.flush()
    x, y = np.load(folder / "x.npy", mmap_mode="r"), torch.arange(ROWS) % 3
    net = bayesian(nn.Linear(WIDTH, 3))
    guide = MeanFieldNormal(Classifier(net, ROWS), torch.zeros(1, WIDTH), y[:1])
    how = {"epochs": 1, "batch_size": 128, "progress": False}
    # What is made once, in the first steps.
    fit(Classifier(net, 256), guide, x[:256], y[:256], **how)
    start, most, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    (record,) = fit(Classifier(net, ROWS), guide, x, y, **how)
    done.set()
    watcher.join()
    return record["step"], (most[0] - start) / 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_training_on_a_mapped_file_takes_less_memory_than_a_quarter_of_the_file(tmp_path):
    ((steps, mebibytes),) = Ranks(tmp_path / "rank", 1, trained, tmp_path, connected=False).results()
    assert steps == 64
    # The file has 32 MiB and a batch half a MiB.
    assert 0 < mebibytes < 8
