"""The code and the settings of docs/files.md run."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from run_folders import written

from ppl_bnn.run import main

PAGE = (Path(__file__).parent.parent / "docs" / "files.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    own, python = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    rng = np.random.default_rng(0)
    rooms = rng.integers(1, 6, 50)
    frame = pd.DataFrame({"rooms": rooms, "town": ["Cork", "Bonn"] * 25, "price": 1e5 * rooms + rng.normal(0, 1e4, 50)})
    monkeypatch.chdir(tmp_path)
    frame.to_csv("houses.csv", index=False)
    short = {"train": {"epochs": 1}, "predict": {"num_samples": 2}}
    written(tmp_path / "my-run", settings | short)
    assert main(["my-run", "--quiet", "--stages", "train,predict"]) == 0
    exec(python, {})
    assert "('rooms', 'town=Bonn', 'town=Cork') () price (training standard deviations) (" in capsys.readouterr().out
    Path("my_data.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    (command,) = (line for line in PAGE.splitlines() if "my_data:load" in line and line.startswith("ppl_bnn run"))
    arguments = ["--data.file", "null", "--data.target", "null", "--stages", "train", "--out", "own", "--quiet"]
    torch.manual_seed(0)
    assert main([*command.split()[2:], *arguments]) == 0
    assert (tmp_path / "own" / "log.csv").exists()
