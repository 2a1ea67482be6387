"""Code in a run folder of another user needs --trust."""

import os
import sys

import pytest
import yaml
from own_runs import own_run, ran
from refusals import assert_refused

from ppl_bnn.errors import UserError
from ppl_bnn.experiment import saved_config, trust
from ppl_bnn.experiment.config import Config, DataConfig, ModelConfig, ShiftConfig, TrainConfig
from ppl_bnn.experiment.trust import check_trust, own_code
from ppl_bnn.export import main as export
from ppl_bnn.jobs import main as jobs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with own_run(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def of_another_user(folder, monkeypatch):
    """The run folder as another user's: the same files, of another user id."""
    monkeypatch.setattr(trust, "_is_own", lambda path: not path.resolve().is_relative_to(folder))
    return folder


def test_code_of_another_user_needs_trust(of_another_user, capsys):
    folder = of_another_user
    assert_refused(ran(capsys, folder), f"{folder} belongs to another user, and the run executes code (data.name nets:")
    assert "nets" not in sys.modules
    assert not (folder / "out").exists()
    assert ran(capsys, folder, "--trust")[0] == 0
    assert export([str(folder / "out"), "--draws", "2"]) == 2
    assert "allow it with --trust" in capsys.readouterr().err
    assert export([str(folder / "out"), "--draws", "2", "--trust"]) == 0


def test_settings_without_own_code_need_no_trust(of_another_user, capsys):
    named = {"data": {"name": "diabetes"}, "model": {"name": "mlp", "likelihood": "normal"}, "train": {"epochs": 1}}
    (of_another_user / "config.yaml").write_text(yaml.safe_dump(named))
    assert ran(capsys, of_another_user, "--train.optimizer", "torch.optim:SGD")[0] == 0


def test_a_file_of_settings_is_asked_for_its_owner_too(folder, tmp_path, capsys, monkeypatch):
    extra = tmp_path / "extra.yaml"
    extra.write_text("train: {epochs: 1}\n")
    monkeypatch.setattr(trust, "_is_own", lambda path: path != extra)
    assert_refused(ran(capsys, folder, "--config", str(extra)), f"{extra} belongs to another user")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_root_is_not_special(folder, capsys):
    os.chown(folder / "config.yaml", 12345, -1)
    assert_refused(ran(capsys, folder), f"{folder / 'config.yaml'} belongs to another user")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_jobs_pass_trust_on(folder, capsys):
    os.chown(folder / "config.yaml", 12345, -1)
    command = [str(folder), "--vary", "train.seed=0,1", "--stages", "train", "--train.epochs", "1"]
    assert jobs(command) == 2
    assert "belongs to another user" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert jobs([*command, "--trust"]) == 0
    assert capsys.readouterr().err.count("executes code of its own") == 1


def test_what_counts_as_own_code():
    def found(**parts):
        return dict(own_code(Config(**parts)))

    assert found() == {}
    assert found(train=TrainConfig(optimizer="torch.optim:SGD")) == {}
    # Functions of torch can run any code, and so can what is reached through its classes.
    for name in ("torch:load", "torch.hub:load", "torch.nn:modules.torch.load", "torch.optim:sys.exit", "a b:c"):
        assert found(model=ModelConfig(name=name)) == {"model.name": name}
    assert found(model=ModelConfig(prior={"fc1*": "nets:prior"})) == {"model.prior": "nets:prior"}
    assert found(model=ModelConfig(prior={"nets:site": "normal(0, 1)"})) == {"model.prior": "nets:site"}
    # A source with its file is read, but only where other data are named.
    assert found(shift=ShiftConfig(ood=["csv:other.csv", "nets:other"])) == {"shift.ood": "nets:other"}
    assert found(data=DataConfig(name="torch:load")) == {"data.name": "torch:load"}
    assert found(data=DataConfig(dir="C:data", file="D:file"), model=ModelConfig(options={"title": "a:b"})) == {}
    assert dict(own_code(Config(device="cuda:0"))) == {}


@pytest.mark.parametrize("other", ["nets.py", "own_package/__init__.py", "own_package/inner/layers.py"])
def test_a_module_of_another_user_is_not_imported(folder, monkeypatch, other):
    (folder / "own_package" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/layers.py"):
        (folder / "own_package" / name).write_text("")
    prior = {"a*": "nets:site", "*": "own_package.inner.layers:site"}
    monkeypatch.setattr(trust, "_is_own", lambda path: path != folder / other)
    with pytest.raises(UserError, match=f"{folder / other} belongs to another user"):
        check_trust(Config(model=ModelConfig(prior=prior)), folder)
    assert not {"nets", "own_package"} & sys.modules.keys()


def test_the_code_of_a_job_lies_in_its_run_folder(folder, monkeypatch):
    config = Config(model=ModelConfig(name="nets:Net"))
    job = folder / "out" / "jobs" / "train.seed=0" / "predict.seed=1"
    for out in (job, job.parent):
        (out / "checkpoints").mkdir(parents=True)
        saved_config.save(config, out / "config.yaml")
    check_trust(config, job)
    assert sys.path[:2] == [str(job), str(folder)]
    monkeypatch.setattr(trust, "_is_own", lambda path: path != folder)
    with pytest.raises(UserError, match=f"{folder} belongs to another user"):
        check_trust(config, job)


def test_trust_of_a_folder_in_python(of_another_user):
    config = Config(model=ModelConfig(name="nets:Net"))
    with pytest.raises(UserError, match=r"allow it with --trust \(trust=True in Python\)"):
        check_trust(config, of_another_user)
    assert check_trust(config, of_another_user, trusted=True) == {"model.name": "nets:Net"}
