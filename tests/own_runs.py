"""A run folder with code of its own beside the settings, and its command."""

import sys
from contextlib import contextmanager

from run_folders import written

from ppl_bnn.experiment import trust
from ppl_bnn.run import main

NETS = '''
import pyro.distributions as dist
import torch
from torch import nn

from ppl_bnn import Categorical, Table, bayesian


class Net(nn.Sequential):
    def __init__(self, shape, width=8, *, num_outputs):
        super().__init__(nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, num_outputs))


class NoShape(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


class Unfit(Net):
    def forward(self, x):
        return super().forward(x[:, 1:])


def already(shape):
    return bayesian(Net(shape, num_outputs=2), dist.Normal(0.0, 0.3))


def failing(shape):
    raise RuntimeError("no such layer")


def no_network(shape):
    return "a network"


def fan_in(site, shape):
    return dist.Normal(0.0, float(shape[1]) ** -0.5)


def by_layer():
    return {"0.*": dist.Laplace(0.0, 0.2), "*": fan_in}


def failing_prior(site, shape):
    return shape.width


def likelihood():
    return Categorical()


def failing_likelihood():
    return {}["scale"]


def jitter(x):
    return x + 0.01 * torch.randn_like(x)


class SGD(torch.optim.SGD):
    pass


def not_finite():
    items = [(torch.ones(3), at % 2) for at in range(60)]
    items[41] = (torch.ones(3) / 0, 1)
    return items


def tables(folder, file, progress):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = (x.sum(1) > 0).long()
    return tuple(
        Table(x[rows], y[rows], features=("a", "b", "c"), target="y", title="Signs", split=split,
              classes=("below", "above"))
        for rows, split in ((slice(40), "train"), (slice(40, None), "test"))
    )
'''  # fmt: skip


@contextmanager
def own_run(tmp_path, monkeypatch):
    """A run folder with a module beside its config.yaml; what the test makes importable is forgotten after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trust, "_run_folders", [])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.chdir(tmp_path)
    made = written(
        tmp_path / "mine",
        {
            "data": {"name": "nets:tables"},
            "model": {"name": "nets:Net", "prior": "nets:fan_in"},
            "train": {"epochs": 2, "batch_size": 20, "optimizer": "adam"},
            "predict": {"num_samples": 4},
        },
    )
    (made / "nets.py").write_text(NETS)
    yield made
    sys.modules.pop("nets", None)


def ran(capsys, folder, *arguments):
    capsys.readouterr()
    code = main([str(folder), "--stages", "train", *arguments])
    return code, capsys.readouterr().err.strip().splitlines()
