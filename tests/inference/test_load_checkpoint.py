"""`load_checkpoint`: a saved step by name, into the model and guide of the user."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_training import X, Y, assert_same_state, settings, small, state, timeless
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, fit, load_checkpoint, predict
from ppl_bnn.inference import checkpoint


@pytest.fixture
def trained(tmp_path):
    model, guide = small()
    history = fit(model, guide, X, Y, **settings(checkpoint_every=1), folder=tmp_path)
    return model, guide, history


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000028.safetensors"])
def test_the_last_step_is_found_from_the_out_folder_its_checkpoints_or_the_file(trained, tmp_path, place):
    model, guide = small(seed=3)
    found = load_checkpoint(tmp_path / place, model=model, guide=guide)
    assert found.step == 28
    assert timeless(found.history) == timeless(trained[2])
    assert_same_state(state(model, guide), state(*trained[:2]))
    assert_same_state(
        {"probs": predict(model.net, guide, X, Y, num_samples=4, progress=False).mean_probs},
        {"probs": predict(trained[0].net, trained[1], X, Y, num_samples=4, progress=False).mean_probs},
    )


@pytest.mark.parametrize("step", [14, "14", "step-00000014"])
def test_an_earlier_step_is_an_earlier_posterior(trained, tmp_path, step):
    model, guide = small(seed=3)
    found = load_checkpoint(str(tmp_path), step, model=model, guide=guide)
    assert (found.step, len(found.history)) == (14, 2)
    assert not torch.equal(guide.loc_scale("0.weight")[0], trained[1].loc_scale("0.weight")[0])


def test_what_does_not_fit_is_refused_and_changes_nothing(trained, tmp_path):
    torch.manual_seed(0)
    model = Classifier(bayesian(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))), len(X))
    guide = MeanFieldNormal(model, X[:1], Y[:1])
    with pytest.raises(ValueError, match=r"from another network: model tensor 'net.2.bias': saved \[2\], now absent"):
        load_checkpoint(tmp_path, model=model, guide=guide)
    # The guide alone differs: the model stays as it is, too.
    model, guide = small(seed=3)
    before = state(model, guide)
    with pytest.raises(ValueError, match="from another network: guide tensor"):
        load_checkpoint(tmp_path, model=model, guide=nn.Linear(2, 2))
    assert_same_state(state(model, guide), before)
    with pytest.raises(ValueError, match=r"no checkpoint '15' .* saved steps: step-00000000, step-00000007"):
        load_checkpoint(tmp_path, 15, model=model, guide=guide)
    file = checkpoint.find(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="is not a folder, in which to find '7'"):
        load_checkpoint(file, 7, model=model, guide=guide)
    with pytest.raises(ValueError, match="is not there"):
        load_checkpoint(tmp_path / "nowhere", model=model, guide=guide)


def test_values_of_pyro_param_come_back_where_the_statements_have_run(tmp_path):
    def guide(x, y=None):
        for site, shape in (("0.weight", (8, 6)), ("2.weight", (2, 8))):
            scale = pyro.param(f"{site} scale", torch.full(shape, 0.1), constraint=dist.constraints.positive)
            pyro.sample(site, dist.Normal(pyro.param(f"{site} loc", torch.zeros(shape)), scale).to_event(2))

    model, _ = small()
    fit(model, guide, X, Y, **settings(epochs=1, estimator="plain"), folder=tmp_path)
    trained = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"pyro.param '0.weight loc': saved \[8, 6\], now absent"):
        load_checkpoint(tmp_path, model=model, guide=guide)
    guide(X)
    load_checkpoint(tmp_path, model=model, guide=guide)
    assert_same_state(dict(pyro.get_param_store().items()), trained)


def test_the_docs_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_checkpoint" in block)
    names = {}
    exec(example, names)
    assert capsys.readouterr().out.startswith("step 20: ")
    assert names["probs"].shape == (50, 2)
    assert not torch.equal(
        names["guide"].loc_scale("0.weight")[0],
        checkpoint.load(checkpoint.find(tmp_path / "results" / "checkpoints")).tensors["guide.loc.0.weight"],
    )
