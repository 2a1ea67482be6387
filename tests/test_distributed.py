"""Several ranks train as one: real processes over Gloo on this host, and over Horovod where it is installed."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ppl_bnn import Classifier, KLScaledELBO, MeanFieldNormal, bayesian, build, checkpoint, data_parallel, fit
from ppl_bnn.distributed import Alone, Communicator, GradientBuckets, RankLost, connect, run_elastic, shard
from ppl_bnn.distributed.digest import _digest
from ppl_bnn.distributed.horovod_backend import HorovodRanks, import_horovod
from ppl_bnn.training import Diverged, Interrupted, _batches

ROOT = Path(__file__).parent.parent
X = torch.rand(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > X[:, 1]).long()

# Ranks are forked off a process that has imported everything already, what torch imports at its first step included.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ppl_bnn.run", "ppl_bnn.distributed.torch_backend", "torch._dynamo"])


class Ranks:
    """Processes that run `function(communicator, *arguments)`, or without a communicator, as the ranks of one job."""

    def __init__(self, folder, size, function, *arguments, connected=True):
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            process = context.Process(target=_rank, args=(folder, environment, function, arguments, connected))
            process.start()
            self.processes.append(process)

    def wait(self, seconds=60):
        """Wait for all; the exit codes. What hangs is killed and fails the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} still ran after {seconds} s; {self.errors()}"
        return [process.exitcode for process in self.processes]

    def results(self):
        """What each rank's function returned."""
        codes = self.wait()
        assert codes == [0] * self.size, self.errors()
        return [torch.load(self.folder / f"result-{rank}.pt") for rank in range(self.size)]

    def errors(self):
        """What each rank wrote to standard error."""
        return [(self.folder / f"stderr-{rank}").read_text() for rank in range(self.size)]


def _rank(folder, environment, function, arguments, connected):
    os.environ.update(environment)
    rank = environment["RANK"]
    descriptor = os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    try:
        if connected:
            communicator = connect(timeout=60)
            result = function(communicator, *arguments)
            communicator.shutdown()
        else:
            result = function(*arguments)
        torch.save(result, folder / f"result-{rank}.pt")
    except SystemExit as code:
        os._exit(code.code)
    except BaseException:  # noqa: BLE001 -- the parent shows it
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


def small(net=None, seed=0):
    torch.manual_seed(seed)
    net = net or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = Classifier(bayesian(net), len(X)).double()
    return model, MeanFieldNormal(model, X[:1], Y[:1]).double()


def settings(**changes):
    return {"epochs": 3, "batch_size": 8, "lr": 0.01, "estimator": "plain", "progress": False, **changes}


def state(model, guide):
    parts = {**{f"m.{k}": v for k, v in model.state_dict().items()}, **guide.state_dict()}
    return {name: value.clone() for name, value in parts.items()}


def timeless(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history]


def assert_same(states, tolerance=0.0):
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


# -- what each rank works on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "batch"), [(50, 8), (7, 4), (64, 1), (11, 3)])
def test_an_epoch_visits_each_example_once_in_one_ranks_order(size, n, batch):
    arguments = {"epoch": 2, "seed": 5, "skip": 0, "device": torch.device("cpu")}
    batches = list(_batches(n, batch * size, **arguments))
    seen = Counter()
    for rows in batches:
        parts = [shard(rows, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([part for part, weight in parts if weight]), rows)
        seen.update(int(row) for part, weight in parts if weight for row in part)
        values = torch.arange(n, dtype=torch.float64)
        mean = sum(weight * values[part].mean() for part, weight in parts) / size
        torch.testing.assert_close(mean, values[rows].mean())
    assert seen == Counter(range(n))


def test_noise_seeds_differ_by_rank_and_rank_0_has_that_of_one_process():
    seeds = [data_parallel.rank_seed(seed, rank) for seed in (0, 1, 7) for rank in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert data_parallel.rank_seed(7, 0) == 7


# -- the update --------------------------------------------------------------------------------------------------


def train_with_one_noise(communicator, folder, changes):
    data_parallel.rank_seed = lambda seed, rank: seed
    model, guide = small(seed=communicator.rank)
    history = fit(model, guide, X, Y, **settings(**changes), communicator=communicator, folder=folder)
    return {"state": state(model, guide), "history": timeless(history)}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        # 50 = 24 + 24 + 2: parts of 8, 8, 8, then of 1, 1 and none at all.
        (3, {"clip_norm": 0.05, "kl_weight": 0.3}),
        (2, {"optimizer": "ivon", "num_particles": 2, "lr_per_rank": True, "lr": 0.05}),
    ],
)
def test_ranks_of_batch_b_make_the_update_of_one_with_all_of_it(tmp_path, size, changes):
    """With the same weight noise everywhere; parts of unequal size and an empty one included. The KL counts once."""
    found = Ranks(tmp_path / "ranks", size, train_with_one_noise, tmp_path / "out", changes).results()
    assert_same([one["state"] for one in found])
    assert all(one["history"] == found[0]["history"] for one in found)

    model, guide = small(seed=0)
    one_rank = {**changes, "batch_size": 8 * size}
    if one_rank.pop("lr_per_rank", False):
        one_rank["lr"] *= size
    history = fit(model, guide, X, Y, **settings(**one_rank))
    assert_same([state(model, guide), found[0]["state"]], tolerance=1e-12)
    for expected, got in zip(timeless(history), found[0]["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-10)
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 4


def train_with_own_noise(communicator):
    model, guide = small(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    draws = []
    guide.register_forward_hook(lambda module, inputs, draw: draws.append(draw["1.weight"].detach().clone()))
    fit(model, guide, X[:48], Y[:48], **settings(epochs=1, batch_size=24), communicator=communicator)
    return {"state": state(model, guide), "draw": draws[0]}


def test_ranks_draw_their_own_noise_and_stay_equal(tmp_path):
    found = Ranks(tmp_path, 2, train_with_own_noise).results()
    assert_same([one["state"] for one in found])
    assert not torch.allclose(found[0]["draw"], found[1]["draw"])
    # Batch norm's running mean after one step: a tenth of the mean over both halves of the data.
    torch.testing.assert_close(found[0]["state"]["m.net.0.running_mean"], 0.1 * X[:48].mean(0))


# -- stopping together -------------------------------------------------------------------------------------------


def train_in_two_goes(communicator, folder, stop_at):
    # Only rank 0 has the folder; groups draw signs, so each rank's random state has to come back too.
    folder = folder if communicator.is_main else folder / "not here"
    changes = settings(estimator="groups")
    whole = small()
    fit(*whole, X, Y, **changes, communicator=communicator, folder=folder / "whole")
    asked = iter(range(1, 1000))
    stopping = {"should_stop": lambda: communicator.rank == 1 and next(asked) >= stop_at}
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} of 12"):
        fit(*small(), X, Y, **changes, **stopping, communicator=communicator, folder=folder / "cut")
    cut = small(seed=5 + communicator.rank)
    fit(*cut, X, Y, **changes, communicator=communicator, folder=folder / "cut")
    return {"whole": state(*whole), "cut": state(*cut), "there": folder.exists()}


def test_a_stop_on_any_rank_stops_all_at_the_same_step_and_they_go_on_bitwise(tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_in_two_goes, tmp_path / "out", 6).results()
    assert_same([one[name] for one in found for name in ("whole", "cut")])
    assert [one["there"] for one in found] == [True, False]
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path / "out" / "cut" / "checkpoints")]
    assert steps == [0, 4, 6, 8, 12]


def train_and_count(communicator, folder, stop_at):
    """The examples of each step that counted here, up to a stop."""
    model, guide = small()
    seen, steps, asked, agree_really = [], [], iter(range(1, 1000)), data_parallel.agree
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def agree(ranks, *arguments, **keywords):
        # Examples of a part that is empty do not count: the model is then in evaluation mode.
        steps.append([row.tolist() for row in seen.pop()] if model.training else [])
        return agree_really(ranks, *arguments, **keywords)

    data_parallel.agree = agree
    changes = settings(lr_schedule="cosine", lr_per_rank=True, epochs=2)
    stopping = {"should_stop": lambda: next(asked) >= stop_at}
    history = None
    with contextlib.suppress(Interrupted):
        history = fit(model, guide, X, Y, **changes, **stopping, communicator=communicator, folder=folder)
    return {"steps": steps, "history": history, "state": state(model, guide)}


@pytest.mark.parametrize("sizes", [(2, 3), (3, 1), (1, 2)])
def test_on_another_number_of_ranks_each_example_of_the_epoch_is_still_seen_once(tmp_path, sizes):
    before = Ranks(tmp_path / "before", sizes[0], train_and_count, tmp_path / "out", 2).results()
    after = Ranks(tmp_path / "after", sizes[1], train_and_count, tmp_path / "out", 1000).results()
    assert_same([one["state"] for one in after])
    rows = [tuple(row) for one in (*before, *after) for step in one["steps"] for row in step]
    # Two epochs, of which the first was cut in two.
    assert Counter(rows) == Counter({tuple(row): 2 for row in X.tolist()})
    first = [tuple(row) for one in before for step in one["steps"] for row in step]
    assert len(first) == len(set(first)) == 2 * 8 * sizes[0] < len(X)
    history = after[0]["history"]
    left = math.ceil((len(X) - len(first)) / (8 * sizes[1]))
    an_epoch = math.ceil(len(X) / (8 * sizes[1]))
    assert [row["step"] for row in history] == [2 + left, 2 + left + an_epoch]
    # The schedule counts examples: its last step begins before the last, smaller, batch.
    done = 1 - (len(X) - (an_epoch - 1) * 8 * sizes[1]) / (2 * len(X))
    assert history[-1]["lr"] == pytest.approx(0.01 * sizes[1] * 0.5 * (1 + math.cos(math.pi * done)))
    with pytest.raises(ValueError, match="holds a training with epochs 2, this one has 3"):
        fit(*small(), X, Y, **settings(lr_schedule="cosine", lr_per_rank=True), folder=tmp_path / "out")


def train_until_rank_1_goes_bad(communicator, folder):
    model, guide = small()
    asked = iter(range(1000))

    def spoil(module, inputs, output):
        return output * (math.nan if communicator.rank == 1 and next(asked) >= 5 else 1.0)

    model.net.get_submodule("1").register_forward_hook(spoil)
    with pytest.raises(Diverged) as bad:
        fit(model, guide, X, Y, **settings(), communicator=communicator, folder=folder)
    return {"state": state(model, guide), "message": str(bad.value)}


def test_a_bad_number_on_one_rank_stops_all_before_the_update(tmp_path):
    found = Ranks(tmp_path / "ranks", 2, train_until_rank_1_goes_bad, tmp_path / "out").results()
    assert found[0]["message"] == found[1]["message"]
    assert "at step 6 (loss nan" in found[0]["message"]
    assert "output of layer net.1 is the first that is not finite, on rank 1 of 2" in found[0]["message"]
    assert_same([one["state"] for one in found])
    assert all(value.isfinite().all() for value in found[0]["state"].values())
    assert checkpoint.step_of(checkpoint.find(tmp_path / "out" / "checkpoints")) == 4


def train_until_rank_1_changes(communicator, folder):
    model, guide = small()
    asked = iter(range(1, 1000))

    def spoil():
        if communicator.rank == 1 and next(asked) == 6:
            # The last bit of one number.
            number = next(iter(guide.state_dict().values()))
            number.view(torch.int64).view(-1)[3] ^= 1
        return False

    with pytest.raises(Diverged) as bad:
        fit(
            model, guide, X, Y, **settings(compare_every=5), should_stop=spoil, communicator=communicator, folder=folder
        )
    return {"message": str(bad.value), "name": next(iter(dict(guide.named_parameters())))}


def test_a_parameter_that_changes_on_one_rank_is_found_and_named(tmp_path):
    found = Ranks(tmp_path / "ranks", 3, train_until_rank_1_changes, tmp_path / "out").results()
    assert len({one["message"] for one in found}) == 1
    # Three ranks take 3 steps an epoch: the end of the second comes before step 10.
    assert "no longer the same at step 6: " in found[0]["message"]
    assert f"{found[0]['name']} of rank 1 is not rank 0's" in found[0]["message"]
    assert checkpoint.step_of(checkpoint.find(tmp_path / "out" / "checkpoints")) == 3


def test_a_digest_changes_with_any_bit_and_knows_every_kind_of_number():
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        tensor = torch.randn(4, 3, 2, 2).mul(20).abs().to(kind).contiguous(memory_format=torch.channels_last)
        changed = tensor.clone()
        changed[1, 2, 0, 1] += 1
        assert _digest(tensor) == _digest(tensor.contiguous())
        assert _digest(tensor) != _digest(changed)


def start_unlike(communicator):
    messages = []
    for changes, labels in (({"lr": 0.01 + communicator.rank}, Y), ({}, Y.roll(communicator.rank)), ({}, Y[:1])):
        with pytest.raises(ValueError) as error:
            fit(*small(), X[: len(labels)], labels, **settings(**changes), communicator=communicator)
        messages.append(str(error.value))
    return messages


def test_ranks_that_cannot_train_together_say_so(tmp_path):
    for messages in Ranks(tmp_path, 2, start_unlike).results():
        assert (
            messages[:2] == ["the ranks were not started alike: settings or labels of rank 1 differ from rank 0's"] * 2
        )
        assert messages[2] == "1 examples are too few for 2 ranks: start fewer"


# -- messages ----------------------------------------------------------------------------------------------------


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


class Counting(Communicator):
    """Two ranks of which the other one adds nothing."""

    name = "counting"

    def __init__(self):
        super().__init__(0, 2, 0, 2)

    def _start_sum(self, tensor, name):
        return lambda: None

    def _broadcast(self, tensor):
        pass

    def shutdown(self):
        pass


def test_a_step_of_vgg16_needs_a_handful_of_messages():
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    model = Classifier(build("vgg16", image_shape=(3, 32, 32)), 50_000)
    guide = MeanFieldNormal(model, x, y)
    ranks = Counting()
    order = data_parallel.forward_order(model, guide)
    assert {id(p) for p in order} == {id(p) for p in (*model.parameters(), *guide.parameters())}
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

    class Watching(Counting):
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


# -- joining -----------------------------------------------------------------------------------------------------


def test_one_process_is_alone():
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_NTASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert isinstance(connect(environment=environment), Alone)


def test_ranks_that_no_launcher_introduced_are_refused():
    with pytest.raises(ValueError, match="2 ranks were started, but MASTER_ADDR, MASTER_PORT is not set"):
        connect(environment={"WORLD_SIZE": "2", "RANK": "0"})


@pytest.fixture
def _no_horovod():
    """Horovod is not imported yet, and what a test puts in its place is forgotten."""

    def taken_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "horovod"}

    before = taken_out()
    yield
    taken_out()
    sys.modules.update(before)


@pytest.mark.usefixtures("_no_horovod")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Horovod is not installed here"),
        ("raise ImportError('mpi_lib_v2.so: undefined symbol: _ZN3c10')", "built for another torch than .*undefined"),
    ],
)
def test_ranks_without_a_horovod_that_works_are_told_what_to_do(tmp_path, monkeypatch, content, message):
    if content is None:
        sys.modules["horovod"] = None
    else:
        (tmp_path / "horovod").mkdir()
        (tmp_path / "horovod" / "__init__.py").write_text("")
        (tmp_path / "horovod" / "torch.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    for environment in ({"OMPI_COMM_WORLD_SIZE": "3"}, {"HOROVOD_SIZE": "3"}, {"SLURM_STEP_NUM_TASKS": "3"}):
        with pytest.raises(ValueError, match=rf"3 ranks were started by .*{message}.*make horovod.*torchrun"):
            connect(environment=environment)


class Deaf:
    """A Horovod whose other rank never says anything."""

    Sum = None

    def __getattr__(self, name):
        return {"size": lambda: 2, "poll": lambda handle: False}.get(name, lambda *arguments, **keywords: 0)


class OnGpus(Deaf):
    """The same, built with NCCL."""

    nccl_built = staticmethod(lambda: True)


@pytest.fixture
def _own_environment(monkeypatch):
    """What a test sets for Horovod is forgotten after it."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_MCA_"))}
    monkeypatch.setattr(os, "environ", others)


@pytest.mark.usefixtures("_own_environment")
def test_horovod_does_not_wait_longer_than_the_bound():
    ranks = HorovodRanks(Deaf(), timeout=0.2)
    with pytest.raises(RankLost, match=r"nothing from one of the 2 ranks for 0\.2 s"):
        ranks.barrier()


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize(
    ("hvd", "before", "expected"),
    [
        (Deaf(), {}, {"HOROVOD_CYCLE_TIME": "3", "OMPI_MCA_mpi_yield_when_idle": "1"}),
        (Deaf(), {"HOROVOD_CYCLE_TIME": "7"}, {"HOROVOD_CYCLE_TIME": "7", "OMPI_MCA_mpi_yield_when_idle": "1"}),
        (OnGpus(), {}, {"HOROVOD_CYCLE_TIME": None, "OMPI_MCA_mpi_yield_when_idle": None}),
    ],
)
def test_horovod_leaves_the_processor_to_the_computation_unless_told_otherwise(hvd, before, expected):
    os.environ.update(before)
    HorovodRanks(hvd, timeout=1)
    assert {name: os.environ.get(name) for name in expected} == expected


def test_elastic_training_needs_its_launcher():
    with pytest.raises(ValueError, match="--elastic needs horovodrun with --min-np"):
        run_elastic(lambda ranks, changed: True, timeout=1)


# -- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path, data_dir):
    """A run of seconds on real MNIST: 600 training digits, 6 steps an epoch on one rank."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "data": {"dir": str(data_dir), "num_train": 600, "num_test": 200},
        "train": {"epochs": 2, "optimizer": "adam", "estimator": "local", "checkpoint_every": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command_line(*arguments):
    from ppl_bnn.run import main

    sys.exit(main(list(arguments)))


def start(run_folder, *arguments):
    """Start two ranks of a long training and come back when its first epoch is done."""
    checkpoints = run_folder / "out" / "checkpoints"
    command = (str(run_folder), "--stages", "train", "--train.epochs", "5000", *arguments)
    ranks = Ranks(run_folder / "ranks", 2, command_line, *command, connected=False)
    deadline = time.monotonic() + 60
    while len(checkpoint.saved(checkpoints)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_the_others_end_soon_and_say_why(run_folder, rank):
    ranks = start(run_folder)
    os.kill(ranks.processes[rank].pid, signal.SIGKILL)
    codes = ranks.wait(seconds=45)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1), ranks.errors()
    last = ranks.errors()[1 - rank].splitlines()[-1]
    assert "error: another rank is gone" in last
    assert last.endswith("run the same command again to go on from the last checkpoint")
    assert last.startswith("rank 1: ") == (rank == 0)
    assert checkpoint.step_of(checkpoint.find(run_folder / "out" / "checkpoints")) >= 3


def test_when_a_rank_is_stopped_the_others_end_within_the_bound(run_folder):
    ranks = start(run_folder, "--train.rank_timeout", "3")
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    ranks.processes[0].join(20)
    assert ranks.processes[0].exitcode == 1
    last = ranks.errors()[0].splitlines()[-1]
    assert "error: another rank is gone" in last
    # It goes on one day, and ends too.
    os.kill(ranks.processes[1].pid, signal.SIGCONT)
    assert ranks.wait() == [1, 1]


def test_a_signal_to_one_rank_stops_both_with_one_checkpoint(run_folder):
    ranks = start(run_folder, "--train.keep_checkpoints", "1")
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.errors()
    main, other = ranks.errors()
    assert "stopped" in main.splitlines()[-1]
    assert other == ""
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(run_folder / "out" / "checkpoints")]
    assert len(steps) == 2
    assert f"step {steps[1]} of" in main or f"epoch {steps[1] // 3} of" in main


def rows_of(out):
    """log.csv without times."""
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    return [[value for column, value in enumerate(row) if column not in (2, 9)] for row in rows]


def launched(run_folder, launcher):
    """Run a launcher's command on the run: what it wrote, and its log.csv without times."""
    out = run_folder / "out"
    command = [*launcher, "ppl_bnn.run", str(run_folder), "--out", str(out), "--stages", "train,posterior"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert (out / "posterior.json").exists()
    assert "posterior: rank 0 alone" in output
    return output, rows_of(out)


def test_torchrun_runs_a_run(run_folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    output, rows = launched(run_folder, launcher)
    assert "2 ranks over Gloo: " in output
    assert [row[1] for row in rows[1:]] == ["3", "6"]


@pytest.fixture
def horovodrun():
    """The launcher, where Horovod is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_horovod()
    except ImportError as error:
        pytest.skip(str(error))
    return str(Path(sys.executable).parent / "horovodrun")


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_horovodrun_runs_the_same_training(run_folder, horovodrun, controller):
    if controller == "mpi" and not import_horovod().mpi_built():
        pytest.skip("Horovod was built without MPI here")
    output, rows = launched(run_folder, [horovodrun, "-np", "2", f"--{controller}", sys.executable, "-m"])
    assert f"2 ranks over Horovod ({controller}".lower() in output.lower()
    other = run_folder / "other"
    arguments = (str(run_folder), "--stages", "train", "--out", str(other))
    ranks = Ranks(run_folder / "ranks", 2, command_line, *arguments, connected=False)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert rows == rows_of(other)


class Horovodrun:
    """A launcher's process, what it and its ranks wrote, and the ranks."""

    def __init__(self, launcher, run_folder, *arguments):
        self.log = run_folder / "launcher.log"
        command = [*launcher, sys.executable, "-m", "ppl_bnn.run", str(run_folder), "--stages", "train", *arguments]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)

    def rank(self, **environment):
        """The process whose environment has these."""
        import psutil

        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.cmdline()[1:3] == ["-m", "ppl_bnn.run"] and environment.items() <= process.environ().items():
                return process
        raise AssertionError(f"no rank has {environment}; {self.log.read_text()}")

    def wait_for(self, condition, seconds=90):
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.05)
        assert condition(), self.log.read_text()

    def wait(self, seconds):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def test_a_stopped_rank_ends_a_horovodrun_within_the_bound(run_folder, horovodrun):
    run = Horovodrun(
        [horovodrun, "-np", "2", "--gloo"], run_folder, "--train.epochs", "5000", "--train.rank_timeout", "10"
    )
    run.wait_for(lambda: len(checkpoint.saved(run_folder / "out" / "checkpoints")) > 1)
    run.rank(HOROVOD_RANK="1").suspend()
    assert run.wait(60) == 1
    assert "error: another rank is gone" in run.log.read_text()


def test_an_elastic_training_outlives_a_killed_rank_and_takes_in_a_new_one(run_folder, horovodrun):
    # One machine under two names: Horovod gives up the host of a rank that died.
    hosts, discover = run_folder / "hosts", run_folder / "discover.sh"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(0o755)
    launcher = [horovodrun, "-np", "2", "--min-np", "1", "--max-np", "2", "--host-discovery-script", str(discover)]
    run = Horovodrun(launcher, run_folder, "--elastic", "--train.epochs", "100")
    run.wait_for(lambda: len(checkpoint.saved(run_folder / "out" / "checkpoints")) > 3)
    run.rank(HOROVOD_HOSTNAME="127.0.0.1").kill()
    run.wait_for(lambda: "1 ranks instead of 2" in run.log.read_text())
    hosts.write_text("localhost:2\n")
    run.wait_for(lambda: "2 ranks instead of 1" in run.log.read_text())
    assert run.wait(120) == 0, run.log.read_text()
    assert "a rank is gone" in run.log.read_text()
    assert len(rows_of(run_folder / "out")) == 1 + 100
