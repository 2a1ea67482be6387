"""A pruned posterior as a file of its non-zeros: safetensors with JSON metadata, mapped into memory when it is read."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ppl_bnn.errors import FileError
from ppl_bnn.files import written_atomically
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.models.random_network import load_points, point_state
from ppl_bnn.safe_tensors import as_written, checksum, read_verified, shape_difference

FORMAT = "ppl_bnn pruned posterior 1"
# Distances between neighbouring weights, in the narrowest of these that holds them.
_WIDTHS = (torch.uint8, torch.uint16, torch.int32)


def save_pruned(path: Path, *, model: nn.Module, guide: MeanFieldNormal) -> None:
    """Write loc and unconstrained scale of the weights that are left, and the model's deterministic tensors.

    Where the weights are is a bitmap, or the distance from one to the next, whichever is smaller for the site.

    Raises:
        OSError: it could not be written; a file that was there is as it was.
    """
    tensors = {f"model.{name}": value for name, value in point_state(model).items()}
    sites = {}
    for site in guide.sites:
        keep = guide.loc_scale(site)[1] > 0
        tensors[f"index.{site}"], coding = _encode(keep.flatten().cpu())
        sites[site] = {"shape": list(keep.shape), "nonzero": int(keep.sum()), "index": coding}
        for part in ("loc", "unconstrained_scale"):
            tensors[f"{part}.{site}"] = guide.get_parameter(f"{part}.{site}")[keep]
    tensors = as_written(tensors)
    text = json.dumps({"format": FORMAT, "sites": sites})
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"pruned": text, "crc32": str(checksum(tensors, text))})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


@torch.no_grad()
def load_pruned(path: Path, *, model: nn.Module, guide: MeanFieldNormal) -> MeanFieldNormal:
    """Read a pruned posterior: the guide returned draws what was drawn, `model` gets its deterministic tensors.

    Args:
        guide: of the same model, in any state; it is not changed.

    Raises:
        FileError: missing, truncated, altered, of another kind, or of another network (naming the site and shapes).
    """
    if not path.exists():
        raise FileError(f"{path} is not there; pruning.save_fraction writes one")
    tensors, content = read_verified(path, "pruned", name=str(path), kind="pruned posterior", advice="write it again")
    if content["format"] != FORMAT:
        raise FileError(f"{path} has format {content['format']!r}; this version reads {FORMAT!r}")
    sites = content["sites"]
    for site in sorted(sites.keys() | set(guide.sites)):
        own = list(guide.loc_scale(site)[0].shape) if site in guide.sites else "absent"
        there = sites[site]["shape"] if site in sites else "absent"
        if own != there:
            raise FileError(f"{path} is from another network: site {site!r}: saved {there}, now {own}")
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if difference := shape_difference(state, point_state(model)):
        raise FileError(f"{path} is from another network: {difference}")
    load_points(model, state)
    keep = {}
    for site, found in sites.items():
        shape = torch.Size(found["shape"])
        keep[site] = _decode(tensors[f"index.{site}"], found["index"], shape.numel()).view(shape)
    loaded = guide.pruned(keep)
    for site in sites:
        for part in ("loc", "unconstrained_scale"):
            values = loaded.get_parameter(f"{part}.{site}")
            values.zero_()[keep[site].to(values.device)] = tensors[f"{part}.{site}"].to(values)
    return loaded


def _encode(keep: Tensor) -> tuple[Tensor, str]:
    position = keep.nonzero().flatten()
    distances = position.diff(prepend=position.new_full((1,), -1)) - 1
    width = next(kind for kind in _WIDTHS if not len(distances) or int(distances.max()) <= torch.iinfo(kind).max)
    if width.itemsize * len(distances) < len(keep) / 8:
        return distances.to(width), "distances"
    return torch.from_numpy(np.packbits(keep.numpy())), "bitmap"


def _decode(index: Tensor, coding: str, count: int) -> Tensor:
    if coding == "bitmap":
        return torch.from_numpy(np.unpackbits(index.numpy(), count=count)).bool()
    keep = torch.zeros(count, dtype=torch.bool)
    keep[(index.long() + 1).cumsum(0) - 1] = True
    return keep
