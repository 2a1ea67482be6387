"""The points of a study: every combination once, but for what does not matter to a point."""

import pytest
from jsonargparse import ArgumentError, Namespace

from ppl_bnn.scaling.plan import plan_of


def options(**changes):
    default = {
        "runs": ["runs/mnist-lenet", "runs/mnist-lenet-cnn"], "ranks": [1, 2], "batches": [100], "devices": ["cpu"],
        "estimators": None, "mbit": [0.0], "latency_ms": [0.0], "cycle_ms": None, "fusion_mb": None, "steps": 10,
        "repeats": 1, "epochs": None, "accuracy": [0.6], "launcher": "horovod", "threads": None, "out": "scaling",
    }  # fmt: skip
    return Namespace(**{**default, **changes})


def test_a_deterministic_run_is_timed_once_and_one_rank_has_no_messages():
    plan = plan_of(options(estimators=["flipout", "groups"], cycle_ms=[1.0, 5.0], fusion_mb=[0.0]), [])
    found = [(point.run.removeprefix("runs/mnist-"), point.ranks, point.estimator, point.cycle_ms, point.fusion_mb)
             for point in plan.points]  # fmt: skip
    alone = [("lenet", 1, "flipout", None, None), ("lenet", 1, "groups", None, None), ("lenet-cnn", 1, "", None, None)]
    two = [
        (run, 2, estimator, cycle, 0.0)
        for cycle in (1.0, 5.0)
        for run, estimator in (("lenet", "flipout"), ("lenet", "groups"), ("lenet-cnn", ""))
    ]
    assert found == alone + two
    assert len({point.name for point in plan.points}) == 9


def test_settings_for_every_run_decide_which_are_deterministic():
    settings = ["--model.deterministic", "true", "--train.epochs", "3"]
    plan = plan_of(options(estimators=["flipout"], ranks=[1]), settings)
    assert [point.estimator for point in plan.points] == ["", ""]
    assert plan.runs["runs/mnist-lenet"]["train"]["epochs"] == 3


@pytest.mark.parametrize(("ranks", "threads"), [([1], 4), ([1, 2], 2), ([64], 1)])
def test_ranks_share_the_cores_and_may_be_more(monkeypatch, ranks, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    assert plan_of(options(ranks=ranks), []).threads == threads


@pytest.mark.parametrize("option", ["--elastic", "--quiet"])
def test_what_a_study_does_not_pass_on_is_refused(option):
    with pytest.raises(ArgumentError, match=f"unrecognized arguments: {option}"):
        plan_of(options(), [option])


def test_rehearsed_links_are_of_several_ranks():
    plan = plan_of(options(mbit=[0.0, 100.0], latency_ms=[0.0, 5.0], runs=["runs/mnist-lenet"], repeats=2), [])
    links = [(point.repeat, point.ranks, point.mbit, point.latency_ms) for point in plan.points]
    assert links == [(k, *link) for k in (0, 1) for link in ((1, 0, 0), (2, 0, 0), (2, 100, 0), (2, 100, 5))]
