"""Pruning results by network: which of them are trainings of the same one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppl_bnn.errors import UserError
from ppl_bnn.results import idata as inference_data
from ppl_bnn.results import netcdf
from ppl_bnn.results.figures.layout import Groups

_DECIDES_PRUNING = ("scope", "criterion", "structure", "finetune_epochs", "finetune_lr", "checkpoint")


def read_networks(
    results: Sequence[Path] | Mapping[str, Sequence[Path]], *, same_number: bool = True
) -> tuple[str, dict[str, list[Groups]]]:
    """Read ``pruning.nc`` files: (title of their data and of how they were pruned, {network: its trainings}).

    Files are trainings of one network where they differ in `train.seed` alone: the same settings of training and
    pruning, and the same layers. Files of versions up to 0.1.0 do not hold the settings of training; there the run's
    name decides. The chains of a merged result are trainings of one network. A network has the name of its first run,
    with the path where two have the same.

    Args:
        results: the files, or {name of a network: the files of its trainings} to say which belong together.
        same_number: whether all must have the same number of test images.

    Raises:
        UserError: no file, a result of another stage, or files of different data.
        FileError: a file that cannot be read.
    """
    given = list(results.items()) if isinstance(results, Mapping) else [("", results)]
    paths = [path for _, files in given for path in files]
    if not paths or not all(files for _, files in given):
        raise UserError("give at least one pruning.nc (for each network)")
    attrs = {path: netcdf.read_attrs(path) for path in paths}
    read = {path: netcdf.groups_of(inference_data.load(path)) for path in paths}
    title = str(attrs[paths[0]]["title"])
    for path, groups in read.items():
        if "pruning" not in groups:
            raise UserError(f"{path} is not a pruning.nc, which this figure is drawn from")
        fewer = same_number and groups["pruning"].sizes["image"] != read[paths[0]]["pruning"].sizes["image"]
        if fewer or attrs[path]["title"] != title:
            raise UserError(f"{path} has other images than {paths[0]}: {attrs[path]['title']} and {title}")
    if isinstance(results, Mapping):
        networks = {name: list(files) for name, files in given}
    else:
        networks = _by_network(paths, attrs, read)
    trainings = {name: [one for path in files for one in _trainings(read[path])] for name, files in networks.items()}
    return title + _how_pruned(list(attrs.values())), trainings


def trainings_note(networks: Mapping[str, Sequence[Groups]]) -> str:
    """What a title says of bands: nothing where every network was trained once."""
    most = max(len(trainings) for trainings in networks.values())
    several = f"{most} trainings" if len(networks) == 1 else "of several trainings"
    return f"; {several}: mean, and band from the least to the most" if most > 1 else ""


def legend_name(name: str, trainings: Sequence[object]) -> str:
    """A network's name in a legend, with the number of its trainings where there are several."""
    return f"{name} ({len(trainings)} trainings)" if len(trainings) > 1 else name


def _by_network(
    paths: Sequence[Path], attrs: Mapping[Path, Mapping[str, Any]], read: Mapping[Path, Groups]
) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        its, levels = attrs[path], _trainings(read[path])[0]["pruning"]
        weights = levels["weights_by_layer"].values.tolist()
        layers = list(zip(levels["layer"].values.tolist(), weights, strict=True))
        trained = its.get("training", {"run": its.get("run", "")})
        pruned = [_settings(its).get(name) for name in _DECIDES_PRUNING]
        found.setdefault(json.dumps([layers, trained, pruned], sort_keys=True), []).append(path)
    networks: dict[str, list[Path]] = {}
    for files in found.values():
        name = str(attrs[files[0]].get("run", ""))
        networks[name if name not in networks else f"{name} ({files[0]})"] = files
    return networks


def _trainings(groups: Groups) -> list[Groups]:
    # Merged results have a chain for each training.
    levels = groups["pruning"]
    chains = (
        [levels.isel(chain=chain) for chain in range(levels.sizes["chain"])] if "chain" in levels.dims else [levels]
    )
    return [{**groups, "pruning": chain} for chain in chains]


def _how_pruned(attrs: Sequence[Mapping[str, Any]]) -> str:
    # Where the results differ in it, no title can say it of all.
    settings = [_settings(its) for its in attrs]
    one = settings[0]
    if not one or any(other.get(name) != one[name] for other in settings for name in ("criterion", "structure")):
        return ""
    epochs = {other["finetune_epochs"] for other in settings}
    tuned = f", fine-tuned for {max(epochs)} epochs" if len(epochs) == 1 and max(epochs) else ""
    return f" by {one['criterion']} of {one['structure']}{tuned}"


def _settings(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(attrs.get("inputs", {}).get("settings", {}))
