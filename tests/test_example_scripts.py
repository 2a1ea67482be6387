"""The examples run at small size, draw their figure, and fit on a screen or two."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "regression_1d": 20, "tabular_regression": 2, "counts": 2, "vae": 1, "lstm_series": 1, "pretrained_backbone": 1,
    "segmentation": 1, "vision_transformer": 1,
}  # fmt: skip
IMAGES = ("pretrained_backbone", "segmentation", "vision_transformer")


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_and_draws_its_figure(name, tmp_path, data_dir):
    figure = tmp_path / f"{name}.png"
    command = [sys.executable, "-W", "error", f"{name}.py", "--epochs", str(SMALL[name]), "--figure", str(figure)]
    command += ["--data", str(data_dir.absolute())] if name in IMAGES else []
    done = subprocess.run(command, cwd=EXAMPLES, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert figure.stat().st_size > 10_000
    assert done.stdout


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name
