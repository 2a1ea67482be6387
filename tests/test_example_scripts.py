"""The examples run at small size, draw their figure, and fit on a screen or two."""

import ast
import re
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


def test_a_loop_of_ones_own_learns(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["own_loop.py", "--epochs", "30"])
    runpy.run_path("own_loop.py", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    numbers = [float(number) for number in re.findall(r"[\d.]+", lines[-1].partition(":")[2])]
    loss, nll, kl_weight, kl, accuracy, _ = numbers
    assert loss == pytest.approx(nll + kl_weight * kl, abs=2e-3)
    assert accuracy > 0.9


# Lightning's own: it calls what torch is about to drop, and has advice on the number of workers.
@pytest.mark.filterwarnings("ignore:.*treespec", "ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_a_lightning_module_of_thirty_lines_learns(monkeypatch, capsys):
    pytest.importorskip("lightning")
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["lightning_module.py", "--epochs", "30"])
    module = runpy.run_path("lightning_module.py", run_name="__main__")["BayesianModule"]
    scores = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert scores["val_accuracy"] > 0.85
    assert scores["loss"] == pytest.approx(scores["nll"] + 0.1 * scores["kl"], abs=2e-3)
    text = (EXAMPLES / "lightning_module.py").read_text(encoding="utf-8")
    (tree,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == module.__name__)
    assert tree.end_lineno - tree.lineno + 1 <= 30


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name
