"""Steps that are captured once and replayed: what is replayed when, and what happens where a capture fails."""

import logging
from contextlib import contextmanager

import pytest
import torch

from ppl_bnn.inference.graph import Replayed


class Device:
    """Captures as a GPU does: what ran once runs again on the same memory."""

    def __init__(self, fails=False):
        self.fails, self.captures, self.replays, self.beside = fails, 0, 0, 0

    def capture(self, run):
        self.captures += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        result = torch.zeros(2)

        def replay():
            self.replays += 1
            result.copy_(run())

        return result, replay

    @contextmanager
    def scope(self):
        self.beside += 1
        yield


def summed(x, y):
    return torch.stack((x.sum(), y.sum().to(x.dtype)))


def batch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=generator), torch.randint(5, (count,), generator=generator)


def test_batches_of_one_shape_are_replayed_after_three_and_others_run():
    device = Device()
    step = Replayed(summed, device.capture, device.scope)
    for seed, count in enumerate((4, 4, 4, 4, 3, 4, 4)):
        x, y = batch(count, seed)
        torch.testing.assert_close(step(x, y), summed(x, y))
    assert (device.captures, device.replays, device.beside) == (1, 3, 4)


def test_results_are_kept_from_the_next_replay():
    device = Device()
    step = Replayed(summed, device.capture)
    batches = [batch(4, seed) for seed in range(6)]
    found = [step(*one) for one in batches]
    for one, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, summed(*one))


def test_a_step_that_cannot_be_captured_runs_and_says_why_once(caplog):
    device = Device(fails=True)
    step = Replayed(summed, device.capture, device.scope)
    with caplog.at_level(logging.WARNING):
        for seed in range(6):
            x, y = batch(4, seed)
            torch.testing.assert_close(step(x, y), summed(x, y))
    assert device.captures == 1
    assert [record.getMessage() for record in caplog.records] == [
        "a step cannot be replayed as a CUDA graph, and runs as it is: operation not permitted when stream is capturing"
    ]


def test_what_is_captured_has_the_usual_shape():
    device = Device()
    step = Replayed(summed, device.capture)
    # Four steps an epoch, of which the last is smaller.
    for seed in range(20):
        step(*batch(3 if seed % 4 == 3 else 4, seed))
    # Captured at the sixth: before it four of the usual size have run.
    assert device.replays == 15 - 4


def test_a_failed_capture_leaves_no_gradients():
    device, dropped = Device(fails=True), []
    step = Replayed(summed, device.capture, device.scope, lambda: dropped.append(device.captures))
    for seed in range(6):
        step(*batch(4, seed))
    assert dropped == [1]


def test_another_layout_is_another_shape():
    device = Device()
    step = Replayed(summed, device.capture)
    for seed in range(4):
        step(*batch(4, seed))
    x, y = batch(4, 9)
    torch.testing.assert_close(step(x.T.contiguous().T, y), summed(x, y))
    assert device.replays == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_with_graphs_is_the_training_without():
    from small_training import X, Y, settings, small

    from ppl_bnn import fit

    found = []
    for cuda_graph in (False, True):
        model, guide = small()
        model.cuda(), guide.cuda()
        found.append(fit(model, guide, X.cuda(), Y.cuda(), **settings(batch_size=10, cuda_graph=cuda_graph)))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
