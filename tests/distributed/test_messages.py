"""What ranks send each other: gradients in buckets, what a communicator carries, and digests."""

import math
import time

import torch
from ranks import OneOfTwo, Ranks
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian, build
from ppl_bnn.distributed import GradientBuckets
from ppl_bnn.distributed.digest import _digest
from ppl_bnn.inference import data_parallel
from ppl_bnn.models.random_network import point_parameters


def average_in_other_orders(communicator):
    """Each parameter a bucket; ranks get their gradients in opposite orders, and rank 1 has none for the last."""
    found = {}
    for compression in ("none", "fp16"):
        parameters = [nn.Parameter(torch.full((500,), float(k))) for k in range(1, 7)]
        parameters.append(nn.Parameter(torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)))
        communicator.calls.clear()
        with GradientBuckets(parameters, communicator, bucket_mb=1e-5, compression=compression) as buckets:
            for _ in range(3):
                order = parameters[:6] if communicator.rank else parameters[5::-1]
                chain = torch.ones(())
                for parameter in order:
                    chain = chain * parameter.mean()
                total = chain + (0 if communicator.rank else (parameters[6] * parameters[6].detach()).sum())
                total.backward()
                buckets.average()
                gradients = [parameter.grad.clone() for parameter in parameters]
                for parameter in parameters:
                    parameter.grad = None
        found[compression] = {
            "gradients": gradients,
            "count": len(buckets),
            "messages": communicator.calls["gradients"].count,
            "bytes": communicator.calls["gradients"].bytes,
            "strides": parameters[6].stride() == gradients[6].stride(),
            "values": [parameter.detach() for parameter in parameters],
        }
    return found


def test_gradients_that_come_in_different_orders_meet_their_own(tmp_path):
    found = Ranks(tmp_path, 3, average_in_other_orders).results()
    for one in found:
        for compression, tolerance in (("none", 1e-6), ("fp16", 2**-10)):
            got = one[compression]
            for k in range(6):
                expected = torch.full((500,), math.factorial(6) / (k + 1) / 500)
                torch.testing.assert_close(got["gradients"][k], expected, rtol=tolerance, atol=0)
            expected = found[0][compression]["values"][6] / 3
            torch.testing.assert_close(got["gradients"][6], expected, rtol=tolerance, atol=0)
            assert got["strides"]
            assert got["count"] == 7
            assert got["messages"] == 3 * 7
        assert one["none"]["bytes"] == 2 * one["fp16"]["bytes"] == 3 * 4 * (6 * 500 + 48)


def test_a_step_of_vgg16_needs_a_handful_of_messages():
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    model = Classifier(build("vgg16", image_shape=(3, 32, 32)), 50_000)
    guide = MeanFieldNormal(model, x, y)
    ranks = OneOfTwo()
    order = data_parallel.forward_order(model, guide)
    points = point_parameters(model).values()
    assert {id(p) for p in order} == {id(p) for p in (*points, *guide.parameters())}
    # A layer's loc, scale and bias are neighbours.
    named = {id(value): name for name, value in (*model.named_parameters(), *guide.named_parameters())}
    layers = [named[id(value)].split(".")[-2] for value in order]
    assert layers == sorted(layers, key=layers.index)
    with GradientBuckets(order, ranks) as buckets:
        sum(parameter.sum() for parameter in order).backward()
        assert ranks.calls["gradients"].count == len(buckets) == 4
        buckets.average()
    assert ranks.calls["gradients"].bytes == 4 * 18_823_178


def test_messages_travel_while_back_propagation_runs():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 2)]
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    model = Classifier(bayesian(nn.Sequential(*layers)), 4)
    guide = MeanFieldNormal(model, x, y)
    order = data_parallel.forward_order(model, guide)
    there, at_start = [], []

    class Watching(OneOfTwo):
        def _start_sum(self, tensor, name):
            at_start.append(len(there))
            return lambda: None

    for parameter in order:
        parameter.register_post_accumulate_grad_hook(there.append)
    with GradientBuckets(order, Watching(), bucket_mb=1e-6) as buckets:
        KLScaledELBO(4).loss_and_grads(model, guide, x, y)
        assert len(at_start) == len(buckets) == len(order) == 9
        buckets.average()
    # Of three layers with three parameters each, the last one's are on their way before the first one's are known.
    assert at_start[2] <= 6


def hold_the_others_back(communicator, folder):
    with communicator.main_first():
        if communicator.is_main:
            time.sleep(0.3)
            (folder / "data").write_text("there")
        found = (folder / "data").read_text()
    numbers = communicator.sum(communicator.rank + 0.5, 1)
    shared = communicator.share({"rank": communicator.rank, "text": "ä" * 300}, root=1)
    rows = communicator.gather(torch.tensor([communicator.rank], dtype=torch.uint8))
    tensor = torch.full((2, 3), float(communicator.rank)).t()
    communicator.broadcast([tensor])
    flags = communicator.any(communicator.rank == 1), communicator.any(False)
    return [found, numbers, shared, rows, tensor, flags]


def test_what_ranks_say_to_each_other(tmp_path):
    for found, numbers, shared, rows, tensor, flags in Ranks(tmp_path, 2, hold_the_others_back, tmp_path).results():
        assert found == "there"
        assert numbers == [2.0, 2.0]
        assert shared == {"rank": 1, "text": "ä" * 300}
        assert rows.dtype == torch.uint8
        assert rows.tolist() == [[0], [1]]
        assert torch.equal(tensor, torch.zeros(3, 2))
        assert flags == (True, False)


def test_a_digest_changes_with_any_bit_and_knows_every_kind_of_number():
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        tensor = torch.randn(4, 3, 2, 2).mul(20).abs().to(kind).contiguous(memory_format=torch.channels_last)
        changed = tensor.clone()
        changed[1, 2, 0, 1] += 1
        assert _digest(tensor) == _digest(tensor.contiguous())
        assert _digest(tensor) != _digest(changed)
