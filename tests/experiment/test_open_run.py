"""From a run to Python: what `open_run` gives is what the run saved, with its data or without."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import DATA, few_digits
from safetensors.torch import load_file, save_file

from ppl_bnn import open_run, predict
from ppl_bnn.errors import FileError, UserError
from ppl_bnn.experiment.described import described, example_of
from ppl_bnn.import_posterior import main as import_posterior
from ppl_bnn.inputs import shape_of
from ppl_bnn.models.networks import NETWORKS
from ppl_bnn.run import main
from ppl_bnn.safe_tensors import checksum

OLD = Path(__file__).parents[1] / "fixtures" / "version_0_1_0"
QUICK = ("--train.epochs", 1, "--pruning.threshold", "[]", "--pruning.fractions", "[0.5]", "--predict.method", "draws")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A trained run that was predicted with, and its report."""
    folder = few_digits(tmp_path_factory.mktemp("reported"), DATA)
    assert main([str(folder), "--stages", "train,predict,report", *map(str, QUICK)]) == 0
    return folder


@pytest.fixture
def out(reported, run_folder):
    """Its out folder, copied."""
    shutil.copytree(reported / "out", run_folder / "out")
    return run_folder / "out"


def without_data(out):
    """The settings of a run whose data are no longer there."""
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("dir: ", "dir: /nowhere"))


def same(here, there):
    assert torch.equal(here.mean, there.mean)
    assert here.scores() == there.scores()


@pytest.mark.any_python
def test_a_run_folder_gives_model_posterior_data_and_results(out):
    state = torch.get_rng_state()
    run = open_run(out.parent)
    assert torch.equal(torch.get_rng_state(), state)
    assert (run.folder, run.step, run.checkpoint) == (out, 6, "last")
    assert run.classes == tuple("0123456789")
    assert run.settings.train.epochs == len(run.log) == 1
    assert (len(run.train_data), len(run.test_data)) == (600, 200)
    found = predict(
        run.model, run.posterior, run.test_data.inputs(), run.test_data.targets, num_samples=5, method="draws",
        progress=False,
    )  # fmt: skip
    same(found, run.predictive())
    idata = run.inference_data()
    assert idata["posterior_predictive"]["probs"].sizes["obs_id"] == 200
    for name in ("accuracy", "nll"):
        assert run.metrics["test"][name] == pytest.approx(found.summary()[name], rel=1e-6)


def test_model_and_posterior_need_no_data(out):
    known = open_run(out)
    without_data(out)
    run = open_run(out)
    for site, values in known.posterior.draw(2).items():
        assert torch.equal(run.posterior.draw(2)[site], values)
    x = known.test_data.inputs()
    y = known.test_data.targets
    same(*(predict(one.model, one.posterior, x, y, num_samples=2, progress=False) for one in (run, known)))
    same(run.predictive(), known.predictive())
    with pytest.raises(FileError, match="/nowhere"):
        run.test_data  # noqa: B018
    assert len(open_run(out, data_dir=known.settings.data.dir).test_data) == 200


def test_another_saved_step_has_its_own_files(out):
    start = open_run(out, checkpoint="0")
    assert (start.step, start.log) == (0, [])
    assert not torch.equal(start.posterior.draw(0)["fc1.weight"], open_run(out).posterior.draw(0)["fc1.weight"])
    with pytest.raises(FileError, match=r"predictive-step-00000000.nc is not there: python -m ppl_bnn.run .*out --st"):
        start.predictive()
    with pytest.raises(FileError, match=r"metrics.json is of predictive.nc, .* are predictive-step-00000000.nc: run"):
        start.metrics  # noqa: B018


def test_a_predictive_of_an_earlier_step_is_not_taken_for_this_one(out, call):
    checkpoints = out / "checkpoints"
    (checkpoints / "step-00000006.safetensors").rename(checkpoints / "step-00000006.kept")
    run = open_run(out)
    with pytest.raises(FileError, match=r"predictive.nc is of step 6, and this is step 0: run the stage predict again"):
        run.inference_data()
    with pytest.raises(FileError, match=r"metrics.json is of step 6, and this is step 0: run the stages predict and"):
        run.metrics  # noqa: B018


def test_numbers_with_a_learnt_noise_scale_need_no_data_either(call, run_folder):
    (run_folder / "config.yaml").write_text(
        "data: {name: diabetes}\nmodel: {name: mlp, likelihood: 'normal(log_normal(-1, 1))'}\n"
        "train: {epochs: 1, optimizer: adam}\npredict: {num_samples: 5, method: draws}\n"
    )
    pytest.importorskip("sklearn")
    assert call("--stages", "train,predict")[0] == 0
    data = open_run(run_folder).test_data
    run = open_run(run_folder, data_dir="/nowhere")
    assert (run.classes, run.posterior.latents) == ((), ["noise_scale"])
    same(
        predict(run.model, run.posterior, data.inputs(), data.targets, num_samples=5, method="draws", progress=False),
        run.predictive(),
    )


def test_a_deterministic_twin_is_opened_without_sites(call, run_folder):
    assert call("--stages", "train", "--model.deterministic", "true", "--train.epochs", 1)[0] == 0
    run = open_run(run_folder, data_dir="/nowhere")
    assert not run.posterior.sites
    assert predict(run.model, run.posterior, torch.rand(3, 1, 28, 28), num_samples=1, progress=False).mean.shape[0] == 3


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_a_run_of_version_0_1_0_is_opened_with_its_data(monkeypatch, tmp_path, fraction):
    monkeypatch.setitem(NETWORKS, "tiny", runpy.run_path(str(OLD / "make.py"))["tiny"])
    monkeypatch.chdir(OLD)
    run = open_run(OLD / "run" / "out").pruned(fraction)
    found = predict(
        run.model, run.posterior, run.test_data.inputs(), run.test_data.targets, num_samples=100, progress=False
    )
    assert found.summary()["accuracy"] > 0.85
    # Without a fraction it is pruned.safetensors, whose format is of that version.
    left = sum(int((run.posterior.loc_scale(site)[0] != 0).sum()) for site in run.posterior.sites)
    assert (left == 974) is (fraction is None)


def test_an_imported_posterior_is_opened_without_data(out, run_folder, tmp_path):
    run = open_run(out)
    arrays = {}
    for name in ("fc1", "fc2", "fc3"):
        loc, scale = run.posterior.loc_scale(f"{name}.weight")
        bias = run.model.net.get_parameter(f"{name}.bias")
        arrays |= {f"{name}/loc": loc.detach(), f"{name}/scale": scale.detach(), f"{name}/bias": bias.detach()}
    np.savez(tmp_path / "theirs.npz", **{name: value.numpy() for name, value in arrays.items()})
    to = tmp_path / "imported"
    arguments = [tmp_path / "theirs.npz", "--run", run_folder, "--out", to, "--layout", "torch"]
    assert import_posterior(list(map(str, arguments))) == 0
    found = open_run(to, data_dir="/nowhere")
    torch.testing.assert_close(found.posterior.loc_scale("fc2.weight")[1], run.posterior.loc_scale("fc2.weight")[1])


def test_what_is_no_trained_run_is_one_clear_line(tmp_path, run_folder, call, out):
    for folder, message in (
        (tmp_path / "nothing", "there is no folder .*nothing/out: give a run folder that was trained"),
        (tmp_path / "empty", "there is no checkpoint in .*checkpoints; run the train stage first"),
    ):
        (tmp_path / "empty" / "out").mkdir(parents=True, exist_ok=True)
        with pytest.raises(FileError, match=message) as error:
            open_run(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(FileError, match=r"there is no checkpoint 'best' in .*; saved steps: step-00000000, step-0"):
        open_run(out, checkpoint="best")
    with pytest.raises(UserError, match="device 'cuda:7' cannot be used"):
        open_run(out, device="cuda:7")
    run = open_run(out)
    with pytest.raises(FileError, match=r"pruned.safetensors is not there; .*pruning.save_fraction a pruned one"):
        run.pruned()
    with pytest.raises(UserError, match="give either a fraction or a file"):
        run.pruned(0.5, file="p")
    with pytest.raises(UserError, match="scope is for a fraction"):
        run.pruned(file="p", scope="layer")
    (out / "metrics.json").write_text("{")
    with pytest.raises(FileError, match=r"metrics.json is not valid JSON"):
        run.metrics  # noqa: B018
    (out / "metrics.json").unlink()
    with pytest.raises(FileError, match=r"metrics.json is not there: .* --stages report writes it"):
        run.metrics  # noqa: B018


def test_settings_of_another_network_are_refused(out):
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("name: bnn-fc", "name: mlp"))
    with pytest.raises(FileError, match=r"from another network: .*fc1.* saved \[256\], now \[50\]"):
        open_run(out)


class _Data:
    classes = ("a", "b")

    def __len__(self):
        return 7


@pytest.mark.parametrize(
    "example",
    [torch.rand(1, 3, 8, 8), torch.zeros(1, 5).long(), torch.zeros(1), (torch.rand(1, 2), torch.zeros(1, 3).byte()),
     {"tokens": torch.zeros(1, 4).int(), "more": (torch.rand(1, 2).double(),)}],
)  # fmt: skip
def test_inputs_of_any_kind_are_described_as_json(example):
    found = json.loads(json.dumps(described(_Data(), example)))
    assert (found["classes"], found["num_data"]) == (["a", "b"], 7)
    again = example_of(found["inputs"])
    assert shape_of(again) == shape_of(example)
    kinds = [part.dtype for part in (example if isinstance(example, tuple) else [])]
    assert kinds == [part.dtype for part in (again if isinstance(again, tuple) else [])]
    assert type(again) is type(example)


@pytest.mark.parametrize("inputs", ["float32", "float99[2]", 7, None])
def test_inputs_that_cannot_be_read_are_refused(inputs):
    with pytest.raises(FileError, match="the checkpoint describes inputs"):
        example_of(inputs)


def test_a_checkpoint_of_before_is_opened_with_the_data_and_refused_without(out):
    path = out / "checkpoints" / "step-00000006.safetensors"
    tensors = load_file(path)
    content = json.loads(_metadata(path)["ppl_bnn"])
    del content["meta"]["origin"]["described"]
    text = json.dumps(content)
    save_file(tensors, path, metadata={"ppl_bnn": text, "crc32": str(checksum(tensors, text))})
    assert open_run(out).step == 6
    with pytest.raises(FileError, match="/nowhere"):
        open_run(out, data_dir="/nowhere")
    # It is resumed from as before.
    shutil.rmtree(out / "figures", ignore_errors=True)
    assert main([str(out), "--stages", "train,predict"]) == 0


def _metadata(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
