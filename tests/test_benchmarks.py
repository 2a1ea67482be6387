"""The benchmarks that nothing else runs: they start, and say what they measured."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from jpeg_files import jpegs

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
        (["predict_large.py", "mapped", "--rows", "3000", "--draws", "2"], ["predict of 3000 rows: "]),
        (
            ["predict_large.py", "vgg16", "--images", "3", "--draws", "1", "--rounds", "2"],
            ["tensors ", "chunks "],
        ),
        (
            ["examples.py", "--rows", "3000", "--batch", "20", "--steps", "2", "--rounds", "2", "--threads", "1"],
            ["fit on 3000 rows, at most above the start: ", "100-64-10 ", "100-512-512-10 "],
        ),
        (
            ["train_step.py", "--network", "tabular", "--operations"],
            ["deterministic ", "plain ", "groups ", "flipout "],
        ),
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_a_benchmark_says_what_it_measured(arguments, parts, run_here):
    printed = run_here(*arguments)
    for part in parts:
        assert any(line.startswith(part) for line in printed.splitlines()), printed


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a benchmark in this process, which has imported everything already; returns what it printed."""

    def run(script, *arguments):
        monkeypatch.chdir(BENCHMARKS)
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def step_scaling(run_here, folder, *arguments):
    printed = run_here("step_scaling.py", "--seconds", "0.1", "--batch", "2", "--out", folder, *arguments)
    assert (folder / "step_scaling.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((folder / "step_scaling.json").read_text())["points"]
    return printed, [(point["axis"], point["size"], point["contender"]) for point in points], points


def test_step_scaling_measures_each_size_that_fits(tmp_path, run_here):
    sizes = ["--parameters", "1e3,1e4,1e13", "--batches", "1,4", "--size", "1000", "--ranks", ""]
    text, found, points = step_scaling(run_here, tmp_path, *sizes, "--contenders", "plain")
    every = [("parameters", 986), ("parameters", 10_146), ("batch", 1), ("batch", 4)]
    assert found == [(*size, name) for size in every for name in ("mlp", "plain")]
    assert "10,000,000,000,000 parameters, batch 2: skipped, it needs about 600000.0 GB, and " in text
    assert all(len(point["seconds"]) >= 5 and min(point["seconds"]) > 0 for point in points)


@pytest.mark.slow
def test_step_scaling_measures_ranks(tmp_path, run_here):
    sizes = ["--parameters", "", "--batches", "", "--ranks", "1,2", "--ranks_rounds", "2", "--contenders", ""]
    _, found, points = step_scaling(run_here, tmp_path, *sizes)
    assert found == [("ranks", 1, "mlp"), ("ranks", 2, "mlp")]
    assert points[0]["seconds"] == points[1]["alone"]


def test_the_kl_benchmark_finds_no_variance_in_the_expected_kl(tmp_path, run_here, monkeypatch):
    (tmp_path / "toy_digits.py").write_text(
        "import torch\n"
        "from ppl_bnn import Images\n"
        "def digits(folder, file, progress):\n"
        "    pixels = torch.randint(256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))\n"
        "    images = Images(pixels.to(torch.uint8), torch.arange(40) % 10, tuple('0123456789'), 'toy', 'train')\n"
        "    return images, images\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    printed = run_here(
        "kl_variance.py", "--data", "toy_digits:digits", "--batch", 5, "--warm", 2, "--draws", 3, "--rounds", 2
    )
    rows = [line.split() for line in printed.splitlines()]
    for estimator in ("local", "plain"):
        assert [estimator, "KL", "alone,", "expected", "0", "0", "0", "0"] in rows, printed
        assert [estimator, "one", "draw"] in [row[:3] for row in rows], printed


def test_the_benchmark_of_examples_decodes_images_by_workers(tmp_path, run_here):
    np.savez(tmp_path / "images.npz", **jpegs(60)[0])
    arguments = ["--file", tmp_path / "images.npz", "--network", "mlp", "--images", 4, "--rounds", 3, "--threads", 1]
    _, decoding, line = run_here("examples.py", *arguments, "--workers", 1).splitlines()
    assert re.fullmatch(r"decoding: \d+ microseconds of CPU an image", decoding)
    assert re.fullmatch(r"mlp, 4 images a step, 1 workers: \d+ ms a step, of which [\d.]+% waiting for data", line)
