"""Results of several models on the same test images, by name, for figures that show them side by side."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups


def load_runs(
    paths: Sequence[Path], names: Sequence[str] | None = None, *, kind: Literal["predictive", "pruning"]
) -> dict[str, Groups]:
    """Read results, all ``predictive.nc`` or all ``pruning.nc``, as {name: groups}.

    Args:
        kind: which of the two they must be.
        names: one for each result (default: its run's name, with the path where two have the same).

    Raises:
        UserError: no results, another number of names, one name twice, a result of the other kind, results of different
            images or classes, or a result without draws (of ``moments``, or of a single draw: a density needs two).
        FileError: a result that cannot be read.
    """
    if not paths:
        raise UserError("got no result to draw; give at least one")
    if names is not None and (len(names) != len(paths) or len(set(names)) < len(names)):
        raise UserError(f"give each of the {len(paths)} results a name of its own, got {list(names)}")
    runs: dict[str, Groups] = {}
    for place, path in enumerate(paths):
        idata = inference_data.load(path)
        groups = netcdf.groups_of(idata)
        if "posterior_predictive" not in groups or ("pruning" in groups) != (kind == "pruning"):
            raise UserError(f"{path} is not a {kind}.nc, which this figure is drawn from")
        if idata.attrs.get("method") == "moments":
            raise UserError(f"{path} has no draws, and a density is one of draws; predict with another method first")
        if (draws := inference_data.draws_in(groups)) < 2:
            raise UserError(f"{path} has {draws} draw, and a density needs at least 2; predict with more first")
        name = str(idata.attrs.get("run", path)) if names is None else names[place]
        runs[name if name not in runs else f"{name} ({path})"] = groups
    check_same_images(runs)
    return runs


def check_same_images(runs: Mapping[str, Groups]) -> None:
    """Raise UserError where the runs have other images or classes; one may have the first images of another alone."""
    (name, groups), *others = runs.items()
    classes = groups["posterior_predictive"]["class"].values.tolist()
    for other, its in others:
        shared = slice(min(groups["observed_data"].sizes["obs_id"], its["observed_data"].sizes["obs_id"]))
        same = all(
            np.array_equal(its[group][part][shared], groups[group][part][shared])
            for group, part in (("observed_data", "y"), ("constant_data", "image"))
        )
        if not same or its["posterior_predictive"]["class"].values.tolist() != classes:
            raise UserError(f"{name} and {other} are not of the same test images; predict both on the same data")


def check_images(images: Sequence[int], runs: Mapping[str, Groups]) -> None:
    """Raise UserError for no images, or for one that is not in the test set or has no draws in one of the runs."""
    if not len(images):
        raise UserError("got no image to show; give at least one image number")
    for name, groups in runs.items():
        known, total = groups["posterior_predictive"]["obs_id"].values, groups["observed_data"].sizes["obs_id"]
        for image in images:
            if image in known:
                continue
            if not 0 <= image < total or len(known) == total:
                raise UserError(f"image {image} has no draws; the images go from 0 to {total - 1}")
            some = ", ".join(str(one) for one in known[:10]) + (", ..." if len(known) > 10 else "")
            raise UserError(f"image {image} has no draws in {name or 'the result'}, which kept those of {some}")


def first_of_each_class(images: Iterable[int], labels: np.ndarray) -> dict[int, int]:
    """{class: the first of the images that is of it}, in the order of the images."""
    chosen: dict[int, int] = {}
    for image in images:
        chosen.setdefault(int(labels[image]), int(image))
    return chosen


def images_with_draws(runs: Mapping[str, Groups]) -> list[int]:
    """The numbers of the images that have draws in every run, ascending."""
    kept = [set(groups["posterior_predictive"]["obs_id"].values.tolist()) for groups in runs.values()]
    return sorted(set.intersection(*kept))
