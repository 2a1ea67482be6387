"""Posteriors that were trained elsewhere: against hand-built networks in numpy, and every file that does not fit."""

import json
import math

import h5py
import numpy as np
import pytest
import torch
from pyro import poutine
from run_folders import written
from safetensors.torch import save_file
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, import_posterior, run
from ppl_bnn.guides.importers import put_in_place, read_layers
from ppl_bnn.results import netcdf

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32) * 0.3


def conv_net():
    net = nn.Sequential()
    net.conv, net.norm, net.relu, net.flatten = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()
    net.hidden, net.out = nn.Linear(3 * 4 * 5, 6), nn.Linear(6, 4)
    net = bayesian(net).eval()
    example = torch.zeros(1, 2, 6, 7)
    return net, MeanFieldNormal(Classifier(net, 1), example, torch.zeros(1).long()), example


def tfp_arrays():
    return {
        "conv/kernel_posterior_loc": normal(3, 3, 2, 3), "conv/bias_posterior_loc": normal(3),
        "conv/kernel_posterior_untransformed_scale": normal(3, 3, 2, 3),
        "norm/gamma": 1 + normal(3), "norm/beta": normal(3), "norm/moving_mean": normal(3),
        "norm/moving_variance": 1 + normal(3) ** 2,
        "hidden/loc": normal(60, 6), "hidden/scale": 0.01 + normal(60, 6) ** 2, "hidden/bias": normal(6),
        "out/loc": normal(6, 4), "out/scale": np.full((6, 4), 0.2, np.float32), "out/bias": normal(4),
    }  # fmt: skip


def keras_forward(images, arrays, kernel, hidden, out):
    """[N, height, width, channel] -> logits, as Keras computes them: channels last, batch norm epsilon 0.001."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))
    x = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + arrays["conv/bias_posterior_loc"]
    x = (x - arrays["norm/moving_mean"]) / np.sqrt(arrays["norm/moving_variance"] + 1e-3)
    x = np.maximum(x * arrays["norm/gamma"] + arrays["norm/beta"], 0)
    return (x.reshape(len(x), -1) @ hidden + arrays["hidden/bias"]) @ out + arrays["out/bias"]


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_keras_network_has_the_same_outputs_here(tmp_path, suffix):
    arrays, path = tfp_arrays(), tmp_path / f"theirs{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    net, guide, example = conv_net()
    assert put_in_place(read_layers(path), net, guide, example, layout="tfp") == []
    images = normal(5, 6, 7, 2)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    # The means, and one draw of noise of its own for every weight.
    for noise in (0.0, 1.0):
        names = ("conv/kernel_posterior_loc", "hidden/loc", "out/loc")
        eps = {name: noise * normal(*arrays[name].shape) for name in names}
        scale = np.log1p(np.exp(arrays["conv/kernel_posterior_untransformed_scale"])) + 1.2e-7
        kernel = arrays["conv/kernel_posterior_loc"] + scale * eps["conv/kernel_posterior_loc"]
        hidden = arrays["hidden/loc"] + arrays["hidden/scale"] * eps["hidden/loc"]
        out = arrays["out/loc"] + arrays["out/scale"] * eps["out/loc"]
        flat = eps["hidden/loc"].reshape(4, 5, 3, 6).transpose(3, 2, 0, 1).reshape(6, 60)
        conv = eps["conv/kernel_posterior_loc"].transpose(3, 2, 0, 1)
        ours = {"conv.weight": conv, "hidden.weight": flat, "out.weight": eps["out/loc"].T}
        weights = {}
        for site, own in ours.items():
            loc, scale_here = guide.loc_scale(site)
            weights[site] = loc + scale_here * torch.from_numpy(own.copy())
        with poutine.condition(data=weights), torch.no_grad():
            found = net(x)
        np.testing.assert_allclose(found, keras_forward(images, arrays, kernel, hidden, out), rtol=2e-4, atol=2e-5)


def bayesian_torch_state(layers, bias=True):
    """A state_dict as bayesian-torch 0.5 has it: names, shapes, and the buffers that are no weights."""
    state = {}
    for name, shape in layers.items():
        kind = "kernel" if len(shape) == 4 else "weight"
        for part in ("mu", "rho"):
            state[f"{name}.{part}_{kind}"] = torch.from_numpy(normal(*shape)) - (3.0 if part == "rho" else 0.0)
            if bias:
                state[f"{name}.{part}_bias"] = torch.from_numpy(normal(shape[0])) - (3.0 if part == "rho" else 0.0)
        for buffer in (f"eps_{kind}", "prior_weight_mu", "prior_weight_sigma"):
            state[f"{name}.{buffer}"] = torch.zeros(shape)
        state |= {f"{name}.eps_bias": torch.zeros(shape[0]), f"{name}.prior_bias_mu": torch.zeros(shape[0])}
    return state


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("bayesian_bias", [False, True])
def test_a_bayesian_torch_state_dict_is_read_as_it_is(tmp_path, suffix, bayesian_bias):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    net = bayesian(net, bayesian_bias=bayesian_bias)
    guide = MeanFieldNormal(Classifier(net, 1), torch.zeros(1, 1, 4, 4), torch.zeros(1).long())
    state, path = bayesian_torch_state({"conv": (2, 1, 3, 3), "head": (3, 8)}), tmp_path / f"theirs{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    notes = put_in_place(read_layers(path), net, guide, torch.zeros(1, 1, 4, 4), layout="torch", names=["conv", "head"])
    assert len(notes) == (0 if bayesian_bias else 2)
    for site, theirs in (("0.weight", "conv.{}_kernel"), ("2.weight", "head.{}_weight")):
        loc, scale = guide.loc_scale(site)
        assert torch.equal(loc, state[theirs.format("mu")])
        torch.testing.assert_close(scale, state[theirs.format("rho")].exp().log1p(), rtol=1e-5, atol=2e-7)
    if bayesian_bias:
        expected = state["head.rho_bias"].exp().log1p()
        torch.testing.assert_close(guide.loc_scale("2.bias")[1], expected, rtol=1e-5, atol=2e-7)
    else:
        assert torch.equal(net.get_parameter("2.bias"), state["head.mu_bias"])


def change(name, value):
    return lambda arrays: {**arrays, name: value}


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        (change("hidden/loc", normal(6, 60)), r"layer hidden: loc is \[6, 60\] .* becomes \[60, 6\].* needs \[6, 60\]"),
        (change("conv/kernel_posterior_loc", normal(3, 2, 3, 3)), r"layer conv: loc is .* run needs \[3, 2, 3, 3\]"),
        (change("out/scale", np.zeros((6, 4))), r"layer out: scale must be above 1.2e-07 everywhere, its least is 0"),
        (change("out/scale", np.full((6, 4), -0.1)), r"layer out: scale must be above .*, its least is -0.1"),
        (change("out/scale", np.full((6, 4), math.nan)), "layer out: scale holds NaN or infinite values"),
        (change("hidden/bias", np.full(6, math.inf)), "layer hidden: bias holds NaN or infinite values"),
        (lambda arrays: {k: v for k, v in arrays.items() if k != "out/bias"}, "layer out: the file lacks bias; it"),
        (change("norm/loc", normal(3)), "layer norm: the run's layer has no loc"),
        (change("norm/moving_variance", -np.ones(3)), "layer norm: running_var must be at least 0, its least is -1"),
        (change("out/loc", 1j * normal(6, 4)), "layer out: loc must be a dense array of real numbers"),
        (change("out/unconstrained_scale", normal(6, 4)), "layer out: the file has both scale and its"),
        (change("extra/loc", normal(3)), "the run conv, norm, hidden, out: name all of the file's"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, altered, message):
    np.savez(tmp_path / "a.npz", **altered(tfp_arrays()))
    net, guide, example = conv_net()
    before = {name: value.clone() for name, value in {**net.state_dict(), **guide.state_dict()}.items()}
    with pytest.raises(ValueError, match=message):
        put_in_place(read_layers(tmp_path / "a.npz"), net, guide, example, layout="tfp")
    for name, value in {**net.state_dict(), **guide.state_dict()}.items():
        assert torch.equal(value, before[name])


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.fixture
def fc_run(tmp_path, data_dir):
    """The settings of a small evaluation of BNN-FC."""
    config = {
        "data": {"dir": str(data_dir), "num_train": 100, "num_test": 50},
        "predict": {"num_samples": 4},
        "pruning": {"num_samples": 3, "threshold": 1.0, "fractions": [0.0, 0.5]},
    }
    return written(tmp_path / "theirs", config)


def fc_arrays():
    sizes, arrays = {"fc1": (784, 256), "fc2": (256, 256), "fc3": (256, 10)}, {}
    for name, shape in sizes.items():
        arrays |= {f"{name}/loc": normal(*shape) / 5, f"{name}/bias": normal(shape[1])}
        arrays[f"{name}/scale"] = np.full(shape, 0.01, np.float32)
    return arrays


def test_an_imported_posterior_is_predicted_with_pruned_and_reported(fc_run, tmp_path, mnist):
    arrays = fc_arrays()
    np.savez(tmp_path / "theirs.npz", **arrays)
    out = tmp_path / "out"
    command = [str(tmp_path / "theirs.npz"), "--run", str(fc_run), "--out", str(out), "--layout", "tfp"]
    assert import_posterior.main(command) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [layer["site"] for layer in manifest["layers"]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert run.main([str(fc_run), "--out", str(out), "--quiet"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["pruning"]) == 3
    # Hardly any noise: the averaged predictive is close to the network of the means.
    hidden = mnist[1].first(50).inputs().numpy().reshape(50, -1)
    for name in ("fc1", "fc2", "fc3"):
        hidden = hidden @ arrays[f"{name}/loc"] + arrays[f"{name}/bias"]
        hidden = hidden if name == "fc3" else np.maximum(hidden, 0)
    probs = np.exp(hidden) / np.exp(hidden).sum(1, keepdims=True)
    found = netcdf.read_group(out / "predictive.nc", "uncertainty")["mean_probs"].values
    assert np.abs(found - probs).max() < 0.1
    assert import_posterior.main(command) == 2  # the folder is taken


def test_refusals_on_the_command_line_are_one_line(fc_run, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(file, *parts, layout="tfp", more=()):
        capsys.readouterr()
        code = import_posterior.main([str(file), "--run", str(fc_run), "--out", str(out), "--layout", layout, *more])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert len(lines) == 1
        for part in parts:
            assert part in lines[0]
        assert not (out / "checkpoints").exists()

    np.savez(tmp_path / "good.npz", **fc_arrays())
    refused(tmp_path / "absent.npz", "absent.npz is not there")
    refused(tmp_path / "good.npz", "layer fc1: loc is [784, 256]", "the run needs [256, 784]", layout="torch")
    refused(tmp_path / "good.npz", "name all of the file's", more=["--layers", "fc1,fc2"])
    refused(tmp_path / "good.npz", "layout", layout="keras")
    np.savez(tmp_path / "objects.npz", **{"fc1/loc": np.array([_Harmful()], dtype=object)})
    refused(tmp_path / "objects.npz", "objects.npz cannot be read", "allow_pickle")
    torch.save({"fc1.mu_weight": _Harmful()}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt", "needs code to be run")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:5000])
    refused(tmp_path / "cut.npz", "cut.npz cannot be read")
    (tmp_path / "cut.h5").write_bytes(b"nothing")
    refused(tmp_path / "cut.h5", "cut.h5 cannot be read")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path / "a.csv", "none of .npz, .h5")
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    refused(tmp_path / "other.npz", "has no array of a layer", "as in fc1/loc")
    for name, content in {"keys": {1: torch.zeros(3)}, "list": {"state_dict": [1, 2]}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    refused(tmp_path / "keys.pt", "has no array of a layer")
    refused(tmp_path / "list.pt", "holds other things than arrays")
    refused(tmp_path / "good.npz", "is the run folder itself", more=["--out", str(fc_run)])
    # What is no number is left out, whatever it is called.
    np.savez(
        tmp_path / "notes.npz", **fc_arrays(), **{"fc1/name": np.array("first"), "made": np.datetime64("2026-01-01")}
    )
    assert list(read_layers(tmp_path / "notes.npz")) == ["fc1", "fc2", "fc3"]
