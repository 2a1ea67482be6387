"""The benchmarks that nothing else runs: they start, and say what they measured."""

import os
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


def test_the_kl_benchmark_finds_no_variance_in_the_expected_kl(tmp_path):
    (tmp_path / "toy_digits.py").write_text(
        "import torch\n"
        "from ppl_bnn import Images\n"
        "def digits(folder, file, progress):\n"
        "    pixels = torch.randint(256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))\n"
        "    images = Images(pixels.to(torch.uint8), torch.arange(40) % 10, tuple('0123456789'), 'toy', 'train')\n"
        "    return images, images\n"
    )
    command = [
        sys.executable, "kl_variance.py", "--data", "toy_digits:digits", "--batch", "5", "--warm", "2", "--draws", "3",
        "--rounds", "2",
    ]  # fmt: skip
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=BENCHMARKS, check=True, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines()]
    for estimator in ("local", "plain"):
        assert [estimator, "KL", "alone,", "expected", "0", "0", "0", "0"] in rows, done.stdout
        assert [estimator, "one", "draw"] in [row[:3] for row in rows], done.stdout
