"""Golden numbers: short trainings and predictions at fixed seeds that a change must reproduce (`tests/test_golden.py`).

    python tools/golden.py                       # write tests/fixtures/golden.json anew

Write it anew only where results are meant to change: when the noise of a seed is defined anew. Then set GENERATOR, and
say in the CHANGELOG that numbers changed. It uses public names alone, so that older versions can write it too.
"""

import json
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from ppl_bnn import Classifier, MeanFieldNormal, __version__, bayesian, fit, predict

FILE = Path(__file__).parents[1] / "tests" / "fixtures" / "golden.json"
# Which definition of a seed's noise the numbers are of.
GENERATOR = "philox4x32-10/1"
NUM_DATA, CLASSES = 60, 3
NETWORKS = ("dense", "convolutional")
TRAININGS = {
    **{
        estimator: {"estimator": estimator} for estimator in ("plain", "flipout", "flipout-bfloat16", "groups", "local")
    },
    "rmsprop": {"estimator": "groups", "optimizer": "rmsprop"},
    "ivon": {"estimator": "plain", "optimizer": "ivon", "lr": 0.1, "beta2": 0.9},
}
METHODS = ("draws", "layerwise", "moments")


def train(network: str, name: str) -> tuple[nn.Module, MeanFieldNormal, list[dict[str, float]]]:
    """Train `network` as TRAININGS[name] says: (network, guide, loss, nll, kl and accuracy of each epoch)."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    net, (x, y) = _network(network), data(network)
    model = Classifier(net, NUM_DATA)
    guide = MeanFieldNormal(model, x[:1], y[:1], init_loc="he", init_scale=0.1)
    settings = {"epochs": 3, "batch_size": 16, "lr": 0.01, "kl_weight": 0.5, "seed": 1, "progress": False}
    history = fit(model, guide, x, y, **{**settings, **TRAININGS[name]})
    return net, guide, [{key: row[key] for key in ("loss", "nll", "kl", "accuracy")} for row in history]


def summary(network: str, net: nn.Module, guide: MeanFieldNormal, method: str) -> dict[str, float]:
    """Accuracy, nll, ece and brier of 20 draws of a trained guide on its own training data."""
    found = predict(net, guide, *data(network), num_samples=20, seed=2, method=method, progress=False).summary()
    return {key: found[key] for key in ("accuracy", "nll", "ece", "brier")}


def data(network: str) -> tuple[Tensor, Tensor]:
    """Inputs [60, 6] or [60, 1, 6, 6] of seeded normals, and labels [60] that depend on them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_DATA, *{"dense": (6,), "convolutional": (1, 6, 6)}[network], generator=generator)
    return x, x.flatten(1)[:, :CLASSES].argmax(1)


def _network(network: str) -> nn.Module:
    if network == "dense":
        return bayesian(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)))
    # No bias before batch norm: its gradient is rounding alone, and Adam makes whole steps of it.
    layers = (nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    return bayesian(nn.Sequential(*layers))


def main() -> None:
    """Write FILE."""
    content: dict[str, object] = {"version": __version__, "generator": GENERATOR}
    for network in NETWORKS:
        content[network] = {
            "trainings": {name: train(network, name)[2] for name in TRAININGS},
            "predictions": {method: summary(network, *train(network, "plain")[:2], method) for method in METHODS},
        }
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
