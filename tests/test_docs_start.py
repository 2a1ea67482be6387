"""The page for newcomers: each job is at most ten lines, and ends with scores, figures, draws for ArviZ and pruning."""

import re
from functools import partial
from pathlib import Path

import arviz as az
import matplotlib as mpl
import pytest
import torch
from PIL import Image

import ppl_bnn
from ppl_bnn import load, predict, sweep

sklearn = pytest.importorskip("sklearn.datasets")
PAGE = Path(__file__).parent.parent / "docs" / "start.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def jobs():
    return [block for block in BLOCKS if "import ppl_bnn as bnn" in block]


def test_a_job_is_at_most_ten_lines():
    assert len(jobs()) == 4
    for block in jobs():
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, block


def csv_of(name, target):
    """One of scikit-learn's tables as people have them: a CSV with a header, and text for class labels."""
    found = getattr(sklearn, f"load_{name}")(as_frame=True)
    frame = found.frame.rename(columns={"target": target})
    if "target_names" in found:
        frame[target] = [str(found.target_names[label]) for label in frame[target]]
    frame.to_csv(f"{name}.csv", index=False)


def digits(data_dir, train=1500, test=300):
    """MNIST's digits as people have images: a folder of PNGs for each class."""
    for part, data, count in zip(("train", "test"), load("mnist", data_dir), (train, test), strict=True):
        for at, (image, label) in enumerate(zip(data.pixels[:count], data.labels.tolist(), strict=False)):
            folder = Path("digits", part, str(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{at:05d}.png")


def is_whole(folder, figures):
    assert figures <= {path.name for path in Path(folder, "figures").iterdir()}
    assert "posterior_predictive" in str(az.from_netcdf(f"{folder}/predictive.nc"))
    assert len(az.from_netcdf(f"{folder}/pruning.nc")["pruning"]["pruned_fraction"]) == 4
    assert Path(folder, "log.csv").exists()


# ArviZ 0.23 announces its refactoring, and calls matplotlib 3.11 in a way that is to go in 3.13.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::matplotlib.MatplotlibDeprecationWarning")
@pytest.mark.parametrize("name", [pytest.param("wine", marks=pytest.mark.any_python), "diabetes", "out", "curve"])
def test_a_newcomers_job(name, tmp_path, data_dir, monkeypatch):
    data_dir = Path(data_dir).absolute()
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    torch.manual_seed(0)
    if name in ("wine", "diabetes"):
        csv_of(name, {"wine": "cultivar", "diabetes": "progression"}[name])
    if name == "out":
        digits(data_dir)
    given = {"out": "DataLoader(", "curve": "linspace"}.get(name, "nothing")
    own = next((block for block in BLOCKS if given in block), "")
    job = next(block for block in jobs() if f'folder="{name}"' in block)
    names: dict = {}
    for whole, short in (("epochs=500", "epochs=200"), ("epochs=200", "epochs=120")):
        job = job.replace(whole, short)
    # As many draws as figures need.
    monkeypatch.setattr(ppl_bnn, "predict", partial(predict, num_samples=50))
    monkeypatch.setattr(ppl_bnn, "sweep", partial(sweep, num_samples=20))
    exec(own + job, names)
    scores = names["predictive"].summary()
    if name in ("wine", "out"):
        # Of three cultivars the most frequent is two fifths.
        assert scores["accuracy"] > {"wine": 0.9, "out": 0.8}[name]
        is_whole(name, {"reliability.png", "snr.png", "pruning.png"})
    else:
        # The rule that says the mean of all targets has 1, and about 0.8 for the curve.
        assert scores["rmse"] < {"diabetes": 0.8, "curve": 0.2}[name]
        is_whole(name, {"predicted_observed.png", "snr.png"})
