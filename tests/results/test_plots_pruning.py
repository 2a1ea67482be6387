"""The figures of pruning: what they show is what the levels hold."""

import numpy as np
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, sweep, sweep_to_inference_data
from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.networks import read_networks
from ppl_bnn.results.figures.pruning import (
    accuracy_curves,
    changing_answers,
    draw_pruning,
    pruning_accuracy,
    pruning_curves,
)


def swept(images, seed=0):
    torch.manual_seed(seed)
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    x, y = images.inputs(), images.labels
    guide = MeanFieldNormal(Classifier(net, 10), x[:1], y[:1], init_loc=0.02, init_scale=0.01)
    levels = sweep(
        net, guide, x, y, thresholds=(1.0 + seed,), fractions=(0.0, 0.5, 0.9), num_samples=4, keep=torch.arange(5),
        progress=False,
    )  # fmt: skip
    return sweep_to_inference_data(levels, images, guide=guide, attrs={"run": f"seed {seed}"})


@pytest.fixture(scope="module")
def results(mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    paths = [folder / f"{seed}.nc" for seed in range(3)]
    for seed, path in enumerate(paths):
        netcdf.save(swept(mnist[1].first(200), seed), path)
    return paths


def test_bands_over_trainings_are_the_least_and_the_most(results):
    runs = [{"pruning": netcdf.read_group(path, "pruning")} for path in results]
    axis = pruning_curves({"net": runs}, "digits").axes[0]
    assert axis.get_ylabel() == "accuracy"
    (band,) = axis.collections
    # Levels at a fraction are common, those at a threshold are not.
    common = {0.0, 0.5, 0.9}
    rows = []
    for run in runs:
        fractions, accuracies = (run["pruning"][name].values for name in ("pruned_fraction", "accuracy"))
        rows.append({round(float(f), 3): float(a) for f, a in zip(fractions, accuracies, strict=True)})
    best = max(value for row in rows for value in row.values())
    corners = {(round(float(x), 3), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    for fraction in common:
        column = [row[fraction] for row in rows]
        if min(column) >= best - 0.1:
            assert (100 * fraction, round(min(column), 6)) in corners
            assert (100 * fraction, round(max(column), 6)) in corners
    assert len(axis.lines) == len(runs) + 2


def test_levels_in_any_order_are_compared_with_the_least_pruned(results):
    groups = {"pruning": netcdf.read_group(results[0], "pruning")}
    levels = groups["pruning"]
    order = np.roll(np.arange(levels.sizes["level"]), 1)
    turned = {"pruning": levels.isel(level=order)}
    for run in (groups, turned):
        axis = pruning_curves({"net": [run]}, "digits").axes[4]
        assert axis.get_ylabel() == "answers unlike the unpruned network's (%)"
        assert axis.lines[0].get_ydata()[0] == 0
        assert axis.lines[0].get_xdata()[0] == pytest.approx(0, abs=0.01)
    without = {"pruning": levels.isel(level=levels["pruned_fraction"].values > 0.45)}
    assert pruning_curves({"net": [without]}, "digits").axes[4].get_ylabel() == "answers unlike those at 50% pruned (%)"


def test_images_that_change_their_answer(results):
    groups = {name: netcdf.read_group(results[0], name) for name in ("pruning", "observed_data", "constant_data")}
    levels, labels = groups["pruning"], groups["observed_data"]["y"].values
    shown = levels["accuracy"].values >= levels["accuracy"].values.max() - 0.1
    answers = levels["mean_probs"].values[shown].argmax(-1)
    turned = np.flatnonzero((answers[0] == labels) & (answers[-1] != labels))
    figure = changing_answers(groups, "digits")
    titles = [axis.get_title() for axis in figure.axes]
    upper = [int(title.split(":")[0][1:]) for title in titles[:5] if title]
    assert upper
    assert set(upper) <= set(turned)
    assert f"({len(turned)} of 200 images" in figure.get_suptitle()


def test_both_figures_are_written(results, tmp_path):
    paths = draw_pruning(results, tmp_path)
    assert [path.name for path in paths] == ["pruning.png", "pruning_answers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(ValueError, match="at least one"):
        draw_pruning([], tmp_path)


def with_attrs(path, source, **attrs):
    """A copy of a result with other attributes."""
    idata = inference_data.load(source)
    netcdf.save(inference_data.assemble(netcdf.groups_of(idata), {"title": idata.attrs["title"], **attrs}), path)
    return path


def labelled(axis):
    return [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]


def test_two_networks_are_two_curves_and_two_seeds_are_one_with_a_band(results, tmp_path):
    fc, conv = ({"model": {"name": name}, "train": {"lr": 0.1}} for name in ("fc", "conv"))
    first = with_attrs(tmp_path / "0.nc", results[0], run="fc", training=fc)
    second = with_attrs(tmp_path / "1.nc", results[1], run="fc", training=fc)
    third = with_attrs(tmp_path / "2.nc", results[2], run="conv", training=conv)
    title, networks = read_networks([first, third, second])
    assert {name: len(trainings) for name, trainings in networks.items()} == {"fc": 2, "conv": 1}
    for figure in (accuracy_curves(networks, title), pruning_curves(networks, title)):
        axis = figure.axes[0]
        assert labelled(axis) == ["fc (2 trainings)", "conv"]
        (band,) = axis.collections
        lines = {line.get_label().split()[0]: line for line in axis.lines}
        assert lines["fc"].get_color() != lines["conv"].get_color()
        levels = [
            one["pruning"].isel(level=one["pruning"]["pruned_fraction"].values.argmin()) for one in networks["fc"]
        ]
        unpruned = [float(one["accuracy"]) for one in levels]
        assert lines["fc"].get_ydata()[0] == pytest.approx(np.mean(unpruned))
        heights = [y for x, y in band.get_paths()[0].vertices if x == 0]
        assert (min(heights), max(heights)) == (min(unpruned), max(unpruned))
        own = networks["conv"][0]["pruning"]
        expected = own["accuracy"].values[np.argsort(own["pruned_fraction"].values)]
        drawn = lines["conv"].get_ydata()
        np.testing.assert_array_equal(drawn, expected[: len(drawn)])
        (legend,) = figure.legends or [axis.get_legend()]
        assert [text.get_text() for text in legend.get_texts()] == ["fc (2 trainings)", "conv"]


def test_what_makes_results_trainings_of_one_network(results, tmp_path):
    def count(*attrs):
        paths = [with_attrs(tmp_path / f"{at}.nc", results[at], **its) for at, its in enumerate(attrs)]
        return [len(trainings) for trainings in read_networks(paths)[1].values()]

    training = {"train": {"lr": 0.1}}
    by_snr, by_kl = ({"settings": {"criterion": name, "structure": "weights"}} for name in ("snr", "kl"))
    assert count({"run": "a", "training": training}, {"run": "b", "training": training}) == [2]
    assert count({"run": "a", "training": training}, {"run": "a", "training": {"train": {"lr": 0.2}}}) == [1, 1]
    assert count({"run": "a", "inputs": by_snr}, {"run": "a", "inputs": by_kl}) == [1, 1]
    # Results of earlier versions do not hold how they were trained.
    assert count({"run": "a"}, {"run": "a"}) == [2]
    assert count({"run": "a"}, {"run": "b"}) == [1, 1]
    # The caller may know better.
    given = {"net": [tmp_path / "0.nc", tmp_path / "1.nc"]}
    assert [len(trainings) for trainings in read_networks(given)[1].values()] == [2]


def test_networks_of_other_layers_are_not_averaged(results, tmp_path):
    idata = inference_data.load(results[1])
    groups = netcdf.groups_of(idata)
    groups["pruning"] = groups["pruning"].assign(weights_by_layer=groups["pruning"]["weights_by_layer"] + 1)
    attrs = {"title": idata.attrs["title"], "run": "seed 0"}
    netcdf.save(inference_data.assemble(groups, attrs), tmp_path / "wider.nc")
    networks = read_networks([results[0], tmp_path / "wider.nc"])[1]
    assert list(networks) == ["seed 0", f"seed 0 ({tmp_path / 'wider.nc'})"]


def test_accuracy_is_drawn_down_to_the_collapse_on_a_linear_axis(results, tmp_path):
    pruned = netcdf.read_group(results[0], "pruning")
    # The threshold prunes all that it may: chance is left.
    collapsed = pruned.assign(
        accuracy=("level", np.where(pruned["pruned_fraction"] > 0.8, 0.1, 0.95)),
    )
    figure = accuracy_curves({"BNN-FC": [{"pruning": collapsed}]}, "digits")
    (axis,) = figure.axes
    assert axis.get_xscale() == "linear"
    low, high = axis.get_ylim()
    (line,) = axis.lines
    assert len(line.get_xdata()) == pruned.sizes["level"]
    assert low < 0.1 == min(line.get_ydata()) < max(line.get_ydata()) < high
    assert axis.get_xlim()[0] < 0 < 100 < axis.get_xlim()[1]
    path = pruning_accuracy({"a": results[:2], "b": results[2:]}, tmp_path / "figure8.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    for refused in ({}, {"a": results, "b": []}):
        with pytest.raises(UserError, match="give at least one"):
            pruning_accuracy(refused, path)
    other = with_attrs(tmp_path / "other.nc", results[1], run="seed 0")
    other_title = inference_data.load(other)
    other_title.attrs["title"] = "Fashion-MNIST"
    netcdf.save(other_title, other)
    with pytest.raises(UserError, match=r"has other images than .*: Fashion-MNIST and MNIST"):
        pruning_accuracy({"a": [results[0], other]}, path)


def test_a_training_far_below_the_others_does_not_leave_the_figure_empty(results):
    pruned = netcdf.read_group(results[0], "pruning")
    worse = pruned.assign(accuracy=pruned["accuracy"] - 0.3)
    axis = pruning_curves({"net": [{"pruning": pruned}, {"pruning": worse}]}, "digits").axes[0]
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    assert float(worse["accuracy"].max()) in drawn
