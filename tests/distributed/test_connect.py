"""How a process joins the others: what its launcher says, and what it is told where that does not do."""

import os
import sys

import pytest

from ppl_bnn.distributed import Alone, RankLost, connect, is_first, run_elastic
from ppl_bnn.distributed.horovod_backend import HorovodRanks


def test_one_process_is_alone():
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_NTASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert isinstance(connect(environment=environment), Alone)


def test_the_first_rank_is_known_before_the_ranks_meet():
    first = [{}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"}]
    others = [{"WORLD_SIZE": "2", "RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}]
    assert [is_first(environment) for environment in (*first, *others)] == [True] * 4 + [False] * 2


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


def test_a_gpu_that_is_not_there_is_told_before_the_ranks_meet(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(ValueError, match="device 'cuda:1' cannot be used: torch finds no GPU on this host"):
        connect("cuda:1", environment=environment)


def test_a_horovod_without_cuda_is_told_before_any_tensor(monkeypatch):
    monkeypatch.setattr("ppl_bnn.distributed.horovod_backend.import_horovod", Deaf)
    with pytest.raises(ValueError, match=r"device is 'cuda:1', and this Horovod was built without CUDA.*torchrun"):
        connect("cuda:1", environment={"HOROVOD_SIZE": "2"})


@pytest.mark.usefixtures("_own_environment")
def test_horovod_does_not_wait_longer_than_the_bound():
    ranks = HorovodRanks(Deaf(), timeout=0.2)
    with pytest.raises(RankLost, match=r"one of the 2 ranks sent nothing for 0\.2 s"):
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
