"""Models side by side (the study's figures 4, 5 and 9): what the axes show is what the results hold."""

import numpy as np
import pytest
import torch
from class_predictives import of_classes
from matplotlib.colors import to_hex

from ppl_bnn import Images, to_inference_data
from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.densities import compare_densities, density_by_class
from ppl_bnn.results.figures.draw_counts import compare_draw_counts, densities_by_count, density_by_draws
from ppl_bnn.results.figures.pruning import pruning_accuracy
from ppl_bnn.results.figures.pruning_densities import compare_pruning_densities, densities_under_pruning
from ppl_bnn.results.figures.side_by_side import images_with_draws, load_runs
from ppl_bnn.results.idata import NARROWEST, dataset, density

pytestmark = pytest.mark.any_python
CLASSES = ("cat", "dog", "frog")
LABELS = torch.arange(12) % 3
PIXELS = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
IMAGES = Images(PIXELS, LABELS, CLASSES, "things", "test")


def drawn(seed=0, draws=60, true=None):
    """Probabilities [draws, 12, 3]; with `true`, that is the true class's in every draw."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(draws, 12, 3, generator=generator)).softmax(-1)
    if true is not None:
        probs = torch.full((draws, 12, 3), (1 - true) / 2)
        probs[:, torch.arange(12), LABELS] = true
    return probs


def predictive_file(path, probs, run="run", images=IMAGES, **attrs):
    netcdf.save(to_inference_data(of_classes(probs, LABELS), images, attrs={"run": run, **attrs}), path)
    return path


def pruning_file(path, shares, kept, run="run", seed=0, draws=40):
    """A pruning.nc of as much as its densities need: draws [1, draws, levels, kept, 3] of the images `kept`."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(1, draws, len(shares), len(kept), 3, generator=generator).softmax(-1)
    predictive = {"probs": (("chain", "draw", "level", "obs_id", "class"), probs)}
    pruning = {
        "pruned_fraction": (("level",), np.array(shares)),
        "epistemic": (("level", "image"), np.arange(12.0) + np.zeros((len(shares), 1))),
    }
    groups = {
        "posterior_predictive": dataset(predictive, obs_id=np.array(kept), **{"class": list(CLASSES)}),
        **inference_data.data_groups(IMAGES),
        "pruning": dataset(pruning),
    }
    netcdf.save(inference_data.assemble(groups, {"title": "things", "run": run}), path)
    return path


def width_in_pixels(axis, polygon):
    """The width in pixels of a polygon at half its height."""
    x, y = polygon.get_paths()[0].vertices.T
    high = x[y > y.min() + 0.5 * (y.max() - y.min())]
    pixels = axis.transData.transform([(high.min(), 0), (high.max(), 0)])[:, 0]
    return pixels[1] - pixels[0]


@pytest.mark.parametrize("certain", [1.0, 1 - 1e-7, 0.0, 1e-7, 0.4])
def test_equal_draws_are_a_peak_of_the_smallest_width_whose_mass_is_1(certain):
    values = np.full(100, certain)
    grid, height = density(values)
    assert (grid[0], grid[-1]) == (0, 1)
    assert np.trapezoid(height, grid) == pytest.approx(1, abs=1e-3)
    assert grid[height.argmax()] == pytest.approx(certain, abs=1 / 512)
    # Half of a kernel at the end is as wide as the other half, reflected onto it.
    deviation = np.sqrt(np.trapezoid(height * (grid - certain) ** 2, grid))
    assert deviation == pytest.approx(NARROWEST, rel=0.05)


def test_draws_that_nearly_agree_are_no_narrower_and_others_keep_arvizs_density():
    random = np.random.default_rng(0)
    for scale in (1e-5, 1e-3, 5e-3):
        values = 1 - np.abs(random.normal(0, scale, 400))
        grid, height = density(values)
        assert np.trapezoid(height, grid) == pytest.approx(1, abs=1e-3)
        assert (grid[height > 0.5 * height.max()]).min() < 1 - NARROWEST
    values = random.beta(2, 3, 400)
    expected = inference_data._arviz().kde(values, bound_correction=True, custom_lims=(0, 1))[:2]
    np.testing.assert_array_equal(density(values), expected)


@pytest.mark.parametrize("certain", [1 - 1e-7, 1e-7])
def test_a_certain_image_has_a_peak_that_is_seen_within_the_axes(tmp_path, certain):
    """It was cut at 1, and less than a pixel wide."""
    groups = netcdf.groups_of(inference_data.load(predictive_file(tmp_path / "a.nc", drawn(true=certain), run="a")))
    figure = density_by_class({"a": groups}, images=[0, 1, 2])
    figure.draw_without_rendering()
    panels = [axis for axis in figure.axes if axis.collections]
    assert len(panels) == 3
    for axis in panels:
        (polygon,) = axis.collections
        vertices = polygon.get_paths()[0].vertices
        peak = vertices[vertices[:, 1].argmax()]
        left, right = axis.get_xlim()
        assert left < vertices[:, 0].min()
        assert vertices[:, 0].max() < right
        assert axis.get_ylim()[1] > peak[1] > 0.5 * axis.get_ylim()[1]
        assert peak[0] == pytest.approx(certain, abs=0.01)
        assert width_in_pixels(axis, polygon) >= 2.5
    for figure in (densities_by_count({"a": groups}, image=1), density_by_draws(groups, "things", image=1, label=1)):
        for line in (line for axis in figure.axes[1:] for line in axis.lines):
            assert np.max(line.get_ydata()) <= line.axes.get_ylim()[1]
            left, right = line.axes.get_xlim()
            assert left < np.min(line.get_xdata()) <= np.max(line.get_xdata()) < right


def test_figure_4_has_a_panel_for_each_model_and_a_curve_for_each_number_of_draws(tmp_path):
    few, many = drawn(0, 60), drawn(1, 130)
    paths = [predictive_file(tmp_path / "few.nc", few), predictive_file(tmp_path / "many.nc", many)]
    runs = load_runs(paths, ["1 rank", "16 ranks"], kind="predictive")
    figure = densities_by_count(runs)
    image, *panels = figure.axes
    assert len(image.images) == 1
    # Image 2 is the first of class 2.
    assert "image #2 (true class frog)" in figure.get_suptitle()
    assert [axis.get_title().split(":")[0] for axis in panels] == ["1 rank", "16 ranks"]
    for axis, probs, counts in zip(panels, (few, many), ((10, 25, 50, 60), (10, 25, 50, 100, 130)), strict=True):
        assert [text.get_text() for text in axis.get_legend().get_texts()] == [str(count) for count in counts]
        for line, count in zip(axis.lines, counts, strict=True):
            expected = density(probs[:count, 2, 2].numpy())
            # The file holds probabilities in 16 bits.
            np.testing.assert_allclose(line.get_ydata(), expected[1], atol=0.02 * expected[1].max())
            assert line.get_ydata().max() <= axis.get_ylim()[1]
    # A number of draws has the same colour in every panel.
    colours = [[to_hex(line.get_color()) for line in axis.lines] for axis in panels]
    assert colours[0][:4] == colours[1][:4]
    assert len(set(colours[1])) == 5
    other = densities_by_count(runs, image=4, label=0, counts=[20])
    assert "Softmax of cat for test image #4 (true class dog)" in other.get_suptitle()
    assert [len(axis.lines) for axis in other.axes[1:]] == [1, 1]
    written = compare_draw_counts(paths[:1], tmp_path / "one.png")
    assert written.read_bytes().startswith(b"\x89PNG")


def test_figure_9_shows_the_levels_nearest_to_those_asked_for_and_says_which_they_are(tmp_path):
    left = pruning_file(tmp_path / "l.nc", [0.0, 0.3, 0.52, 0.9, 0.99], [0, 1, 2, 4, 5], "conv")
    right = pruning_file(tmp_path / "r.nc", [0.91, 0.001, 0.5], [1, 2, 3, 5], "fc", seed=1)
    runs = load_runs([left, right], kind="pruning")
    figure = densities_under_pruning(runs, "title", images=[2, 1], levels=[0, 25, 50, 90])
    panels = figure.axes
    assert [axis.get_title() for axis in panels] == ["#2: frog", "#1: dog"] * 2
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["0%", "30%", "52%", "90%"]
    assert [text.get_text() for text in panels[2].get_yticklabels()] == ["0.1%", "50%", "91%"]
    # The right network's level at 50% is its third, and lies second from the top.
    values = runs["fc"]["posterior_predictive"]["probs"].sel(obs_id=2).isel({"level": 2, "class": 2}).values.ravel()
    grid, height = density(values)
    x, y = panels[2].collections[1].get_paths()[0].vertices.T
    assert y.min() == 1
    assert x[y.argmax()] == pytest.approx(grid[height.argmax()])
    for axis in panels:
        assert axis.get_ylim()[0] < 0
        assert axis.get_xlim()[0] < 0 < 1 < axis.get_xlim()[1]
        assert len(axis.child_axes[0].images) == 1
    assert [block.get_suptitle() for block in figure.subfigs] == ["conv: 40 draws", "fc: 40 draws"]
    # Those that the default chooses from: both kept them.
    assert images_with_draws(runs) == [1, 2, 5]
    assert compare_pruning_densities([left, right], tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    every = densities_under_pruning({"": runs["conv"]}, "title", images=[0])
    assert [text.get_text() for text in every.axes[0].get_yticklabels()] == ["0%", "30%", "52%", "90%", "99%"]


def test_wrong_input_is_refused_in_one_line(tmp_path):
    a = predictive_file(tmp_path / "a.nc", drawn(0), "a")
    one = predictive_file(tmp_path / "one.nc", drawn(0, draws=1), "one")
    moments = predictive_file(tmp_path / "m.nc", drawn(0, draws=2), "m", method="moments")
    turned = Images(PIXELS.flip(0), LABELS, CLASSES, "things", "test")
    other = predictive_file(tmp_path / "other.nc", drawn(0), "other", images=turned)
    pruned = pruning_file(tmp_path / "p.nc", [0.0, 0.5], [1, 2, 3])
    kept = pruning_file(tmp_path / "k.nc", [0.0, 0.5], [4, 5], "kept")
    png = tmp_path / "f.png"
    for refused, message in (
        (lambda: compare_draw_counts([], png), "got no result to draw"),
        (lambda: compare_draw_counts([a, other], png), "a and other are not of the same test images"),
        (lambda: compare_draw_counts([a, one], png), "has 1 draw, and a density needs at least 2"),
        (lambda: compare_draw_counts([moments], png), "m.nc has no draws"),
        (lambda: compare_draw_counts([a], png, image=12), "image 12 has no draws; the images go from 0 to 11"),
        (lambda: compare_draw_counts([a], png, label=3), "label must be from 0 to 2, got 3"),
        (lambda: compare_draw_counts([a], png, counts=[1]), "numbers of draws of at least 2, got"),
        (lambda: compare_draw_counts([a], png, names=["a", "b"]), "each of the 1 results a name of its own"),
        (lambda: compare_draw_counts([a, a], png, names=["a", "a"]), "each of the 2 results a name of its own"),
        (lambda: compare_densities(a, other, png), "not of the same test images"),
        (lambda: compare_densities(a, a, png, images=[-1]), "image -1 has no draws"),
        (lambda: compare_densities(a, a, png, images=[]), "give at least one image"),
        (lambda: compare_pruning_densities([pruned], png, images=[0]), "image 0 has no draws in run.*kept those of 1"),
        (lambda: compare_pruning_densities([pruned], png, images=[99]), "image 99 has no draws; .* from 0 to 11"),
        (lambda: compare_pruning_densities([pruned, kept], png), "kept draws of no common image"),
        (lambda: compare_pruning_densities([a], png), "a.nc is not a pruning.nc"),
        (lambda: compare_draw_counts([pruned], png), "p.nc is not a predictive.nc"),
        (lambda: pruning_accuracy({"a": [a]}, png), "a.nc is not a pruning.nc"),
        (lambda: compare_pruning_densities([pruned], png, levels=[101]), "from 0 to 100, got"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            refused()
        assert "\n" not in str(raised.value)
        assert not png.exists()


def test_the_first_draws_alone_are_compared(tmp_path):
    paths = [predictive_file(tmp_path / f"{seed}.nc", drawn(seed), run=str(seed)) for seed in (1, 2)]
    some = density_by_class(load_runs(paths, kind="predictive"), num_samples=20)
    labels = [axis.get_ylabel() for axis in some.axes if axis.get_ylabel()]
    assert labels == ["1\n(20 draws)", "2\n(20 draws)"]
    means = [float(text.get_text()) for axis in some.axes for text in axis.texts]
    groups = load_runs(paths, kind="predictive")["1"]
    image = int(some.axes[0].get_title().split(":")[0][1:])
    expected = inference_data.draws_of(groups, image)[int(LABELS[image])][:20].mean()
    assert means[0] == pytest.approx(expected, abs=0.006)
    assert compare_densities(*paths, tmp_path / "f.png", num_samples=20).stat().st_size > 1000
