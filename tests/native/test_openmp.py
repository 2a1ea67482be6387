"""The number of cores that a process may use."""

import os

from ppl_bnn.native.openmp import num_cores


def test_the_cores_of_this_process_count_or_those_of_the_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 6}, raising=False)
    assert num_cores() == 3
    # As on macOS.
    monkeypatch.delattr("os.sched_getaffinity")
    assert num_cores() == os.cpu_count()
