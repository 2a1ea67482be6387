"""A training whose process, or whose worker process, is killed."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from example_kinds import Pairs, Random, Stream
from ranks import Ranks
from small_training import assert_same_state, settings, small, state
from worker_processes import runs, workers

from ppl_bnn import as_examples, fit
from ppl_bnn.errors import WorkerLost
from ppl_bnn.inference import checkpoint, saving

EPOCHS = {"epochs": 2}


def killed_at_step_10(examples, folder):
    """A training, to be run in a process of its own, that writes a checkpoint after each step until it is killed."""
    multiprocessing.set_start_method("fork", force=True)
    saving.Checkpoints.due = lambda self: True
    # Seconds between the looks of a worker for its parent; 5 otherwise.
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2
    asked = iter(range(100))

    def should_stop():
        if next(asked) == 9:
            (folder / "workers").write_text(" ".join(workers()))
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    fit(*small(), examples, **settings(**EPOCHS), folder=folder, should_stop=should_stop)


@pytest.mark.parametrize("data", [Random(), Stream()], ids=["random items", "an iterable"])
def test_a_training_with_a_worker_that_is_killed_in_mid_epoch_resumes_bitwise(data, tmp_path):
    examples = as_examples(data, num_workers=1, length=50 if isinstance(data, Stream) else None)
    killed = Ranks(tmp_path / "killed", 1, killed_at_step_10, examples, tmp_path, connected=False)
    whole = small()
    fit(*whole, examples, **settings(**EPOCHS))
    assert killed.wait() == [-signal.SIGKILL], killed.errors()
    assert checkpoint.step_of(checkpoint.find(tmp_path / "checkpoints")) == 9
    resumed = small(seed=5)
    # The order of an iterable alone depends on the number of workers.
    examples = examples if isinstance(data, Stream) else as_examples(data, num_workers=2)
    fit(*resumed, examples, **settings(**EPOCHS), folder=tmp_path)
    assert_same_state(state(*whole), state(*resumed))
    (worker,) = (tmp_path / "workers").read_text().split()
    deadline = time.monotonic() + 10
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(worker)


class KillsItsWorker(Pairs):
    """A data set whose process is killed in the second epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __getitem__(self, row):
        if (self.folder / "steps.csv").exists() or (self.folder / "log.csv").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def test_a_killed_worker_is_one_clear_line_and_the_last_checkpoint_is_good(tmp_path):
    before = workers()
    data = as_examples(KillsItsWorker(tmp_path), num_workers=1)
    with pytest.raises(
        WorkerLost, match=r"a worker process that reads data is gone .*The last checkpoint is good$"
    ) as lost:
        fit(*small(), data, **settings(epochs=20), folder=tmp_path)
    assert "\n" not in str(lost.value)
    assert workers() == before
    done = checkpoint.load(checkpoint.find(tmp_path / "checkpoints")).step
    assert 7 <= done < 140
