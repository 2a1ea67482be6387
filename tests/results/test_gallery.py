"""The gallery in a browser and by its structure, the study's two figures, and per-image spread."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from class_predictives import of_classes

from ppl_bnn import Images, to_inference_data
from ppl_bnn.errors import FileError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.densities import (
    compare_densities,
    density_by_class,
    density_by_draws,
    draw_predictive_figures,
)
from ppl_bnn.results.figures.gallery import _ridge, write_gallery
from ppl_bnn.results.figures.predictive import draw_figures

pytestmark = pytest.mark.any_python
CLASSES = ("cat & dog", "<b>bird</b>", "frog", "never seen")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def predictive_file(path, seed=0, scale=1.5, draws=60):
    """30 images of three of four classes, 60 draws that agree less and less from the first image to the last.

    Image i has only its first `draws`[i], if there are so many numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 3
    spread = scale * torch.arange(30)[:, None] / 30
    logits = 2 * torch.nn.functional.one_hot(labels, 4) + spread * torch.randn(60, 30, 4, generator=generator)
    probs = logits.softmax(-1)
    probs[torch.arange(60)[:, None] >= torch.as_tensor(draws).expand(30)] = torch.nan
    found = of_classes(probs, labels)
    pixels = torch.randint(0, 256, (30, 1, 12, 12), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    images = Images(pixels, labels, CLASSES, "things", "test")
    netcdf.save(to_inference_data(found, images, attrs={"run": f"run{seed}"}), path)
    return found


def test_each_image_has_the_spread_of_its_draws(tmp_path):
    found = predictive_file(tmp_path / "p.nc")
    group = netcdf.read_group(tmp_path / "p.nc", "uncertainty")
    probs = found.probs.numpy()
    np.testing.assert_allclose(group["std_probs"], probs.std(0), atol=1e-6)
    np.testing.assert_allclose(group["interval"].sel(quantile=0.05), np.quantile(probs, 0.05, axis=0), atol=1e-6)
    np.testing.assert_allclose(group["interval"].sel(quantile=0.95), np.quantile(probs, 0.95, axis=0), atol=1e-6)


def test_images_that_stopped_early_are_drawn_from_the_draws_they_have(tmp_path):
    draws = torch.where(torch.arange(30) % 2 == 0, 20, 60)
    found = predictive_file(tmp_path / "p.nc", draws=draws)
    page = write_gallery(tmp_path / "p.nc", tmp_path / "g.html").read_text()
    assert page.count("<article") == 30
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)
    groups = netcdf.groups_of(inference_data.load(tmp_path / "p.nc"))
    assert [inference_data.draws_of(groups, image).shape for image in (0, 1)] == [(4, 20), (4, 60)]
    by_draws = density_by_draws(groups, "things", image=28, label=2)
    titles = [axis.get_title() for axis in by_draws.axes if axis.get_title()]
    assert [title.split()[0] for title in titles] == ["10", "20"]
    assert f"mean {found.probs[:20, 28, 2].mean():.3f}" in titles[-1]
    by_class = density_by_class({"run": groups}, images=[28])
    assert by_class.axes[1].texts[0].get_text() == f"{found.probs[:20, 28, 28 % 3].mean():.2f}"
    for path in draw_figures(tmp_path / "p.nc", None, tmp_path / "figures"):
        assert path.stat().st_size > 5000
    spread = groups["uncertainty"]
    np.testing.assert_allclose(spread["std_probs"][28], found.probs[:20, 28].std(0, correction=0), atol=1e-4)


def test_a_narrow_density_keeps_its_peak():
    values = np.random.default_rng(0).normal(0.4216, 2e-4, 200)
    rows = _ridge("frog", values, 0, "#888")
    assert "nan" not in rows
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', rows)[1].split()]
    assert min(heights) == pytest.approx(7.0)


def test_the_gallery_loads_nothing_and_holds_every_image(tmp_path):
    found = predictive_file(tmp_path / "p.nc")
    page = write_gallery(tmp_path / "p.nc", tmp_path / "g.html", most=8, spread=5).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|https?://", page)
    numbers = [int(number) for number in re.findall(r'data-image="(\d+)"', page)]
    epistemic = found.uncertainties()[2].numpy()
    order = np.argsort(-epistemic, kind="stable").tolist()
    assert numbers[:8] == order[:8]
    assert len(numbers) == 13
    assert (numbers[8], numbers[-1]) == (order[8], order[-1])
    assert "<!--" not in page
    assert html.escape("<b>bird</b>") in page
    assert "<b>bird</b>" not in page
    whole = write_gallery(tmp_path / "p.nc", tmp_path / "g.html").read_text()
    assert len(re.findall("<article", whole)) == 30


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH to open the gallery in")
def test_a_browser_sorts_and_filters(tmp_path):
    predictive_file(tmp_path / "p.nc")
    write_gallery(tmp_path / "p.nc", tmp_path / "g.html")
    base = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [*base, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/g.html#class=frog&sort=aleatoric"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "10 of 30 images shown" in done.stdout
    shown = re.findall(r"<article [^>]*?>", done.stdout)
    visible = [tag for tag in shown if 'hidden=""' not in tag]
    assert len(visible) == 10
    assert all('data-label="frog"' in tag for tag in visible)
    values = [float(re.search(r'data-aleatoric="([\d.e+-]+)"', tag)[1]) for tag in shown]
    assert values == sorted(values, reverse=True)


def test_figure_4_and_5_for_one_run_and_two(tmp_path):
    predictive_file(tmp_path / "a.nc", seed=0)
    predictive_file(tmp_path / "b.nc", seed=1)
    groups = netcdf.groups_of(inference_data.load(tmp_path / "a.nc"))
    figure = density_by_draws(groups, "things", image=29, label=0)
    titles = [axis.get_title().split(" draws")[0] for axis in figure.axes if "draws" in axis.get_title()]
    assert titles == ["10", "25", "50", "60"]
    # The error of pairs is that of their means, and Sobol points do not tell theirs.
    values = inference_data.draws_of(groups, 29)[0]
    for sampling, of in (("independent", values), ("antithetic", values.reshape(-1, 2).mean(1))):
        figure = density_by_draws(groups, "things", image=29, label=0, sampling=sampling)
        error = of.std(ddof=1) / len(of) ** 0.5
        assert figure.axes[4].get_title().endswith(f"± {error:.3f}")
    figure = density_by_draws(groups, "things", image=29, label=0, sampling="sobol")
    assert not any("±" in axis.get_title() or axis.collections for axis in figure.axes)
    assert "band" not in figure.get_suptitle()
    one_a_class = density_by_class({"a": groups})
    shown = [axis.get_title() for axis in one_a_class.axes if axis.get_title()]
    assert [title.split(": ")[1] for title in shown] == list(CLASSES[:3])
    path = compare_densities(tmp_path / "a.nc", tmp_path / "b.nc", tmp_path / "two.png", images=[0, 29])
    assert path.stat().st_size > 5_000
    assert len(draw_predictive_figures(tmp_path / "a.nc", tmp_path)) == 3


@pytest.mark.parametrize(
    "values", [[0.3] * 5, [0.9] * 4 + [0.1], [0.5, 0.5, 0.5, 0.500002], [1.0] * 50 + [1 - 2e-6], [0.1, 0.2, 0.7]]
)
def test_a_density_of_few_or_equal_values_is_finite(values):
    grid, height = inference_data.density(np.array(values))
    assert np.isfinite(grid).all()
    assert np.isfinite(height).all()
    assert height.max() > 0


def test_refusals(tmp_path):
    predictive_file(tmp_path / "a.nc")
    groups = netcdf.groups_of(inference_data.load(tmp_path / "a.nc"))
    with pytest.raises(ValueError, match="image 30 has no draws; the images go from 0 to 29"):
        density_by_draws(groups, "things", image=30)
    with pytest.raises(ValueError, match="label must be from 0 to 3, got 4"):
        density_by_draws(groups, "things", label=4)
    other = {**groups, "observed_data": groups["observed_data"] + 1}
    with pytest.raises(ValueError, match="a and b are not of the same test images"):
        density_by_class({"a": groups, "b": other})
    (tmp_path / "cut.nc").write_bytes((tmp_path / "a.nc").read_bytes()[:900])
    with pytest.raises(FileError, match=r"cut\.nc is truncated"):
        write_gallery(tmp_path / "cut.nc", tmp_path / "g.html")
