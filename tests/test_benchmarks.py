"""The benchmarks that nothing else runs: they start, and say what they measured."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["predict.py", "--network", "bnn-fc", "--images", "3", "--draws", "2", "--rounds", "2", "--threads", "1",
             "--contenders", "draws,layerwise,predictor,predict"],
            ["draws ", "layerwise ", "predictor ", "predict ", "cnn "],
        ),
        (
            ["train_step.py", "--network", "bnn-fc", "--rounds", "2", "--threads", "1", "--contenders", "plain,ivon"],
            ["mlp ", "plain ", "ivon "],
        ),
        (
            ["train_step.py", "--network", "tabular", "--rounds", "2", "--threads", "1",
             "--contenders", "hand,groups,local,ivon-opt"],
            ["mlp ", "hand ", "groups ", "local ", "ivon-opt "],
        ),
        (
            ["any_network.py", "--networks", "lstm,branch", "--batch", "4", "--images", "5", "--rounds", "2"],
            ["lstm: step ", "lstm: draw, its graph", "branch: draw, the network as it is"],
        ),
        (
            ["train_step.py", "--network", "tabular", "--operations"],
            ["deterministic ", "plain ", "groups ", "flipout "],
        ),
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_a_benchmark_says_what_it_measured(arguments, parts):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True, timeout=120)
    for part in parts:
        assert any(line.startswith(part) for line in done.stdout.splitlines()), done.stdout
