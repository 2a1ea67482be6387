"""A page of test images with their predictive densities, the most uncertain first, in one file that loads nothing."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ppl_bnn.files import write_text
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups

_TRUE, _WRONG, _OTHER = "#2a7f3f", "#c0392b", "#8a8a8a"
_WIDTH, _ROW, _LABEL = 260, 34, 74
# Pixels of a card's image, which is shown at 72.
_LARGEST = 144
_PAGE = (Path(__file__).parent / "gallery.html").read_text(encoding="utf-8")


def write_gallery(
    predictive: Path,
    path: Path,
    *,
    pixels: Callable[[np.ndarray], np.ndarray] | None = None,
    most: int = 300,
    spread: int = 60,
) -> Path:
    """Write the gallery of a ``predictive.nc`` as HTML that needs no network; return its path.

    Args:
        pixels: gives the images of some positions [M], uint8 [M, channels, height, width], where the result does not
            hold them. It is called once, with those that are shown.
        most: how many of the most epistemically uncertain images it shows.
        spread: how many of the others, evenly over their ranks, so that the certain ones are seen too.

    Raises:
        FileError: the result cannot be read.
        OSError: the page cannot be written.
    """
    idata = inference_data.load(predictive)
    groups = netcdf.groups_of(idata)
    kept = groups["posterior_predictive"]["obs_id"].values
    epistemic = groups["uncertainty"]["epistemic"].values
    order = kept[np.argsort(-epistemic[kept], kind="stable")]
    rest = np.arange(min(most, len(order)), len(order))
    chosen = [*range(min(most, len(order))), *rest[np.linspace(0, len(rest) - 1, min(spread, len(rest))).astype(int)]]
    shown = order[chosen]
    images = groups["constant_data"]["image"].values[shown] if pixels is None else pixels(shown)
    cards = [_card(groups, int(at), rank + 1, image) for at, rank, image in zip(shown, chosen, images, strict=True)]
    classes = [str(name) for name in groups["posterior_predictive"]["class"].values]
    title = html.escape(str(idata.attrs["title"]))
    run = html.escape(str(idata.attrs.get("run", "")))
    content = {
        "TITLE": f"{run}: {title}" if run else title,
        "DRAWS": str(inference_data.draws_in(groups)),
        "IMAGES": f"{len(order):,}",
        "OPTIONS": "".join(f"<option>{html.escape(name)}</option>" for name in classes),
        "CARDS": "\n".join(cards),
    }
    page = _PAGE
    for name, value in content.items():
        page = page.replace(f"<!--{name}-->", value)
    write_text(path, page)
    return path


def _card(groups: Groups, image: int, rank: int, pixels: np.ndarray) -> str:
    classes = [str(name) for name in groups["posterior_predictive"]["class"].values]
    values = inference_data.draws_of(groups, image)
    found = {name: float(groups["uncertainty"][name].values[image]) for name in ("total", "aleatoric", "epistemic")}
    mean = groups["uncertainty"]["mean_probs"].values[image]
    label, choice = int(groups["observed_data"]["y"].values[image]), int(mean.argmax())
    shown = [label, *(int(at) for at in np.argsort(-mean, kind="stable") if at != label)][:3]
    shown.sort(key=lambda at: -mean[at])
    rows = "".join(_ridge(classes[at], values[at], place, _colour(at, label, choice)) for place, at in enumerate(shown))
    height = _ROW * len(shown) + 16
    ticks = "".join(f'<text x="{_x(at):.1f}" y="{height - 3}" text-anchor="middle">{at:g}</text>' for at in (0, 0.5, 1))
    verdict = "right" if choice == label else "wrong"
    said = f"predicted <b>{html.escape(classes[choice])}</b> ({mean[choice]:.2f})"
    uncertainties = " · ".join(f"{name} {value:.3f}" for name, value in found.items())
    data = " ".join(f'data-{name}="{value:.6g}"' for name, value in found.items())
    return (
        f'<article class="{verdict}" data-label="{html.escape(classes[label])}" '
        f'data-choice="{html.escape(classes[choice])}" data-image="{image}" {data}>'
        f'<img alt="test image {image}" src="{_png(pixels)}">'
        f"<div><h2>#{image}: <b>{html.escape(classes[label])}</b></h2><p>{said}</p>"
        f'<p class="small">rank {rank:,} · {uncertainties}</p></div>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="predictive densities">{rows}{ticks}</svg>'
        "</article>"
    )


def _ridge(name: str, values: np.ndarray, place: int, colour: str) -> str:
    grid, height = inference_data.density(values)
    if len(grid) > 100:
        # Every fifth point draws the curve, and the peak, which can be narrower than that.
        points = np.union1d(np.arange(0, len(grid), 5), height.argmax())
        grid, height = grid[points], height[points]
    bottom = _ROW * (place + 1)
    low, high = np.quantile(values, (0.05, 0.95))
    peak = " ".join(f"{_x(x):.1f},{bottom - 27 * y / height.max():.1f}" for x, y in zip(grid, height, strict=True))
    mean, left, right = (_x(at) for at in (values.mean(), grid[0], grid[-1]))
    return (
        f'<text x="{_LABEL - 8}" y="{bottom - 4}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
        f'<line x1="{_x(0):.1f}" x2="{_x(1):.1f}" y1="{bottom}" y2="{bottom}" stroke="#bbb"/>'
        f'<polygon points="{left:.1f},{bottom} {peak} {right:.1f},{bottom}" fill="{colour}" fill-opacity=".55"/>'
        f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{bottom}" y2="{bottom}" stroke="{colour}" stroke-width="3"/>'
        f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{bottom - 29}" y2="{bottom + 2}" stroke="#222" '
        'stroke-dasharray="3 2"/>'
    )


def _x(prob: float) -> float:
    return _LABEL + (_WIDTH - _LABEL - 10) * min(max(float(prob), 0.0), 1.0)


def _colour(at: int, label: int, choice: int) -> str:
    return _TRUE if at == label else _WRONG if at == choice else _OTHER


def _png(image: np.ndarray) -> str:
    pixels = 255 - image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    stream = io.BytesIO()
    shown = Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
    # A page of large photographs would take a hundred megabytes.
    shown.thumbnail((_LARGEST, _LARGEST))
    shown.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
