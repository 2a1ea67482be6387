"""The code of docs/from-python.md runs, on a run of a few digits."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest
from run_folders import written

from ppl_bnn.run import main

pytestmark = pytest.mark.any_python
PAGE = Path(__file__).parent.parent / "docs" / "from-python.md"


def test_the_code_of_the_page_runs(tmp_path, data_dir, monkeypatch, capsys):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    config = {
        "data": {"dir": str(data_dir), "num_train": 300, "num_test": 40},
        "train": {"epochs": 1, "optimizer": "adam"},
        "predict": {"num_samples": 20},
    }
    folder = written(tmp_path / "runs" / "mnist-fc", config)
    assert main([str(folder), "--stages", "train,predict"]) == 0
    capsys.readouterr()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    said = capsys.readouterr().out
    assert said.count("nats") == 5
    assert names["small"].posterior.is_pruned
    assert names["posterior"].sites == names["run"].posterior.sites
