"""What a newcomer does with a CSV: one `init` and one `run`, with scores, figures, draws and pruning at the end."""

import json
from pathlib import Path

import arviz as az
import pytest
import yaml

from ppl_bnn.__main__ import main as ppl_bnn
from ppl_bnn.run import main as run

sklearn = pytest.importorskip("sklearn.datasets")


def csv_of(name, path):
    """One of scikit-learn's tables as people have them: a CSV with a header, and text for class labels."""
    found = getattr(sklearn, f"load_{name}")(as_frame=True)
    frame = found.frame
    if "target_names" in found:
        frame["target"] = [str(found.target_names[label]) for label in found.target]
    frame.to_csv(path, index=False)


@pytest.fixture
def started(tmp_path, monkeypatch, capsys):
    """A run folder made by `ppl_bnn init`, and what it said."""
    monkeypatch.chdir(tmp_path)

    def start(name, *arguments):
        csv_of(name, tmp_path / f"{name}.csv")
        assert ppl_bnn(["init", "my-run", "--data", f"{name}.csv", "--target", "target", *arguments]) == 0
        return capsys.readouterr().err

    return start


QUICK = ["--train.epochs", "30", "--predict.num_samples", "20", "--pruning.num_samples", "10"]


@pytest.mark.any_python
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_classes_of_a_csv_by_one_init_and_one_run(started):
    assert started("breast_cancer").splitlines()[-1] == "next: ppl_bnn run my-run"
    settings = yaml.safe_load(Path("my-run/config.yaml").read_text())
    assert settings["model"]["likelihood"] == "categorical"
    assert run(["my-run", *QUICK]) == 0
    metrics = json.loads(Path("my-run/out/metrics.json").read_text())
    # The rule that says benign of everyone is right for 63%.
    assert metrics["test"]["accuracy"] > 0.9
    assert {level["pruned_fraction"] for level in metrics["pruning"]} >= {0.0}
    assert {"reliability.png", "risk_coverage.png", "training.png", "snr.png"} <= figures()
    predictive = az.from_netcdf("my-run/out/predictive.nc")
    assert predictive.posterior_predictive["probs"].shape == (1, 20, 114, 2)
    assert list(predictive.posterior_predictive["class"].values) == ["benign", "malignant"]
    assert Path("my-run/out/pruning.nc").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_numbers_of_a_csv_by_one_init_and_one_run(started):
    assert "next: ppl_bnn run my-run" in started("diabetes")
    settings = yaml.safe_load(Path("my-run/config.yaml").read_text())
    assert settings["model"]["likelihood"] == "normal"
    assert run(["my-run", *QUICK]) == 0
    metrics = json.loads(Path("my-run/out/metrics.json").read_text())
    # In training standard deviations: the rule that says the mean of everyone has 1.
    assert metrics["test"]["rmse"] < 0.9
    assert {"bands.png", "predicted_observed.png", "training.png", "snr.png"} <= figures()
    predictive = az.from_netcdf("my-run/out/predictive.nc")
    assert predictive.posterior_predictive["y"].shape == (1, 20, 88)
    assert Path("my-run/out/pruning.nc").exists()


def figures():
    return {path.name for path in Path("my-run/out/figures").iterdir()}
