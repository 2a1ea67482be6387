"""The examples run at small size, draw their figure, and fit on a screen or two."""

import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "regression_1d": 20, "tabular_regression": 2, "counts": 2, "vae": 1, "lstm_series": 1, "pretrained_backbone": 1,
    "segmentation": 1, "vision_transformer": 1,
}  # fmt: skip
IMAGES = ("pretrained_backbone", "segmentation", "vision_transformer")


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_and_draws_its_figure(name, tmp_path, data_dir, monkeypatch, capsys):
    script, figure = f"{name}.py", tmp_path / f"{name}.png"
    arguments = ["--epochs", str(SMALL[name]), "--figure", str(figure)]
    arguments += ["--data", str(data_dir.absolute())] if name in IMAGES else []
    monkeypatch.chdir(EXAMPLES)
    # In this process, which has imported everything already.
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    plt.close("all")
    assert figure.stat().st_size > 10_000
    assert capsys.readouterr().out


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name
