"""The figures of pruning: what they show is what the levels hold."""

import numpy as np
import pytest
import torch
from torch import nn

from ppl_bnn import Classifier, MeanFieldNormal, bayesian, sweep, sweep_to_inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.pruning import changing_answers, draw_pruning, pruning_curves

pytestmark = pytest.mark.any_python


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
