import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, Model, Normal, Poisson, bayesian, predict, prune
from ppl_bnn.errors import UserError
from ppl_bnn.export import main
from ppl_bnn.models.resnet import Block
from ppl_bnn.prediction.moments import moment_predictive
from ppl_bnn.prediction.onnx import export
from ppl_bnn.prediction.predictive import draw_outputs
from ppl_bnn.run import main as run

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
X = torch.rand(6, 2, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def posterior():
    net = nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(2, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip
    net[2].running_mean.add_(0.3)
    net = bayesian(net).eval()
    return net, MeanFieldNormal(Classifier(net, 6), X[:1], torch.zeros(1, dtype=torch.long), init_loc="he")


def run_file(path, x):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"x": x.numpy()})]


def test_frozen_draws_of_a_pruned_posterior(posterior, tmp_path):
    net, guide = posterior
    found = prune(guide, fraction=0.95, scope="layer")
    pruned = found.guide
    export(tmp_path / "pruned.onnx", net, pruned, X[:2], num_samples=3, seed=4, each_draw=True)
    mean, each = run_file(tmp_path / "pruned.onnx", X)
    # The same draws as the predictive's, for another number of images than it was exported with.
    expected = torch.stack(list(draw_outputs(net, pruned, X, num_samples=3, seed=4))).softmax(-1)
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mean, expected.mean(0), rtol=0, atol=1e-5)
    graph = onnx.load(tmp_path / "pruned.onnx").graph
    assert sum(tensor.values.dims[0] for tensor in graph.sparse_initializer) == 3 * sum(found.nonzero.values())
    assert str(ROOT) not in (tmp_path / "pruned.onnx").read_bytes().decode(errors="replace")


def test_a_residual_block_with_batch_norm(tmp_path):
    net = nn.Sequential(Block(2, 4, stride=2), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(4, 3))
    for norm in (net[0].norm1, net[0].norm2):
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.add_(torch.rand_like(tensor))
    net = bayesian(net).eval()
    guide = MeanFieldNormal(Classifier(net, 6), X[:1], torch.zeros(1).long(), init_loc="he", init_scale=0.2)
    export(tmp_path / "block.onnx", net, guide, X[:2], num_samples=3, each_draw=True)
    _, each = run_file(tmp_path / "block.onnx", X)
    expected = torch.stack(list(draw_outputs(net, guide, X, num_samples=3))).softmax(-1)
    assert float((expected[0] - expected[1]).abs().max()) > 0.01
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)


def test_each_draw_by_its_own_statistics(posterior, tmp_path):
    net, guide = posterior
    own = {"num_samples": 3, "seed": 4, "norm_inputs": torch.rand(20, 2, 10, 10)}
    export(tmp_path / "own.onnx", net, guide, X[:2], each_draw=True, **own)
    _, each = run_file(tmp_path / "own.onnx", X)
    expected = torch.stack(list(draw_outputs(net, guide, X, **own))).softmax(-1)
    averages = torch.stack(list(draw_outputs(net, guide, X, num_samples=3, seed=4))).softmax(-1)
    assert (expected - averages).abs().max() > 0.01
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="it needs method draws, got moments"):
        export(tmp_path / "x.onnx", net, guide, X[:2], method="moments", norm_inputs=X)


def test_the_moments_without_torch(posterior, tmp_path):
    net, guide = posterior
    export(tmp_path / "moments.onnx", net, guide, X[:2], method="moments", opset=18)
    expected, _ = moment_predictive(net, guide, X)
    torch.save(X, tmp_path / "x.pt")
    (tmp_path / "x.raw").write_bytes(X.numpy().tobytes())
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "x = np.fromfile('x.raw', np.float32).reshape(6, 2, 10, 10)\n"
        "ort.InferenceSession('moments.onnx').run(None, {'x': x})[0].tofile('probs.raw')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.frombuffer(bytearray((tmp_path / "probs.raw").read_bytes()), dtype=torch.float32).view(6, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 11}, "operator set 11 is too old: 18 to"),
        ({"opset": 99}, "operator set 99 is too new"),
        ({"method": "magic"}, "draws, moments; got 'magic'"),
        ({"num_samples": 0}, "at least 1, got 0"),
        ({"num_samples": 100_000_000}, "an ONNX file holds 2"),
    ],
)
def test_what_cannot_be_exported(posterior, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "x.onnx", *posterior, X[:2], **arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(posterior, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"onnxscript: pip install 'ppl_bnn\[export\]'"):
        export(tmp_path / "x.onnx", *posterior, X[:2])


def test_a_run_is_exported_and_the_example_predicts_with_it(tmp_path, data_dir, capsys):
    out, data = tmp_path / "out", str(data_dir)
    arguments = ["--data.dir", data, "--data.num_train", "200", "--data.num_test", "20", "--train.epochs", "1"]
    assert run([str(ROOT / "runs" / "mnist-fc"), "--stages", "train", "--out", str(out), "--quiet", *arguments]) == 0
    capsys.readouterr()
    assert main([str(out), "--draws", "2", "--fraction", "0.9"]) == 0
    assert [line[:7] for line in capsys.readouterr().err.splitlines()] == ["export:"]
    images = next(data_dir.glob("mnist/**/t10k-images*ubyte"))
    command = [sys.executable, ROOT / "examples" / "predict_onnx.py", out / "predictive.onnx", images]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "10000 images" in done.stdout
    example = (ROOT / "examples" / "predict_onnx.py").read_text()
    assert len(example.splitlines()) <= 36
    assert example in (ROOT / "docs" / "deploy.md").read_text()
    capsys.readouterr()
    for bad, message in (
        ([str(out), "--opset", "9"], "too old"),
        ([str(out), "--fraction", "1.5"], "[0, 1)"),
        ([str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(bad) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]


@pytest.mark.parametrize("likelihood", ["fixed", "predicted", "latent", "poisson"])
def test_a_file_of_numbers_has_mean_and_standard_deviation(tmp_path, likelihood):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 9).unsqueeze(1)
    of = {
        "fixed": Normal(0.3),
        "predicted": Normal("predicted"),
        "latent": Normal(dist.LogNormal(-1.0, 0.5)),
        "poisson": Poisson(),
    }[likelihood]
    net = bayesian(nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 2 if likelihood == "predicted" else 1)))
    model = Model(net, of, 9)
    guide = MeanFieldNormal(model, x[:1], init_loc=0.5, init_scale=0.2)
    export(tmp_path / "numbers.onnx", model, guide, x[:4], num_samples=8, seed=2, each_draw=True)
    assert [output.name for output in onnx.load(tmp_path / "numbers.onnx").graph.output] == ["mean", "std", "draw_mean"]
    mean, std, draws = (part.double() for part in run_file(tmp_path / "numbers.onnx", x))
    expected = predict(model, guide, x, num_samples=8, seed=2, method="draws", progress=False)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, expected.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draws, expected.means.double(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="method moments exports class labels"):
        export(tmp_path / "other.onnx", model, guide, x, method="moments")
