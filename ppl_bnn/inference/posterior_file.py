"""A posterior as one file: all that draws and predictions need, as safetensors with JSON metadata, mapped when read.

It is here and not in a guide's own methods: a prediction needs the model's point estimates and buffers too, and guides
know nothing of files.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ppl_bnn.errors import FileError, UserError
from ppl_bnn.files import written_atomically
from ppl_bnn.guides import MeanFieldNormal, StoredPosterior
from ppl_bnn.guides.latents import parameter_name
from ppl_bnn.models.evaluating import forked_random
from ppl_bnn.models.random_network import load_points, point_state, random_sites
from ppl_bnn.safe_tensors import as_written, checksum, read_verified, shape_difference

FORMAT = "ppl_bnn posterior 2"
# The first format was of pruned posteriors alone, and had no latents.
_FIRST, _KEY = "ppl_bnn pruned posterior 1", "pruned"
_MEAN_FIELD, _STORED = MeanFieldNormal.__name__, StoredPosterior.__name__
_PARTS = ("loc", "unconstrained_scale")
# Distances between neighbouring weights, in the narrowest of these that holds them.
_WIDTHS = (torch.uint8, torch.uint16, torch.int32)


def save_posterior(
    path: str | Path, model: Callable[..., object], posterior: MeanFieldNormal | StoredPosterior
) -> None:
    """Write a posterior and the model's point estimates and buffers: what `load_posterior` reads draws the same.

    Of a pruned posterior the file holds the weights that are left, and where they are: a bitmap, or the distance from
    one to the next, whichever is smaller for the site. Values of ``pyro.param`` statements are left out.

    Args:
        path: the file, such as ``posterior.safetensors``.
        model: the Pyro model of the posterior.
        posterior: a `MeanFieldNormal`, pruned or not, or a `StoredPosterior`.

    Raises:
        UserError: another kind of posterior.
        OSError: it could not be written; a file that was there is as it was.
    """
    if isinstance(posterior, MeanFieldNormal):
        tensors, described = _mean_field(posterior)
    elif isinstance(posterior, StoredPosterior):
        tensors = {f"samples.{site}": values for site, values in posterior.samples.items()}
        described = {"kind": _STORED, "samples": list(posterior.samples), "latents": posterior.latents}
        described["num_chains"] = posterior.num_chains
    else:
        raise UserError(
            f"a posterior file takes a {_MEAN_FIELD} or a {_STORED}, got {type(posterior).__name__}: keep draws of it, "
            f"{_STORED}({{site: torch.stack([posterior.draw(i)[site] for i in range(100)]) for site in "
            "posterior.sites})"
        )
    tensors |= {f"model.{name}": value for name, value in _points(model).items()}
    tensors = as_written(tensors)
    text = json.dumps({"format": FORMAT, **described})
    with written_atomically(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: text, "crc32": str(checksum(tensors, text))})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load_posterior(path: str | Path, model: Callable[..., object], *args: object) -> MeanFieldNormal | StoredPosterior:
    """Read a posterior that draws what was saved; `model` gets the point estimates and buffers saved with it.

    Nothing in the file can run code. Where it is refused, nothing is changed.

    Args:
        path: a file of `save_posterior`, or a run's ``pruned.safetensors``.
        model: built as it was for the saved posterior.
        *args: what the model runs with, as for `MeanFieldNormal`: one example is enough (``x[:1], y[:1]``).
            Stored draws need none.

    Raises:
        FileError: missing, truncated, altered, of another kind, or of another network (naming the site and shapes).
    """
    path = Path(path)
    tensors, content = _read(path)
    if content["kind"] == _STORED:
        posterior: MeanFieldNormal | StoredPosterior = _stored(path, model, tensors, content)
    else:
        # Its start is drawn.
        with forked_random(*args):
            guide = MeanFieldNormal(model, *args)
        _check_sites(path, content["sites"], {site: guide.loc_scale(site)[0] for site in guide.sites})
        _check_latents(path, content, guide)
        posterior = _filled(guide, tensors, content)
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if difference := shape_difference(state, _points(model)):
        raise FileError(f"{path} is from another network: {difference}")
    if isinstance(model, nn.Module):
        load_points(model, state)
    return posterior


def _points(model: Callable[..., object]) -> dict[str, Tensor]:
    return point_state(model) if isinstance(model, nn.Module) else {}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise FileError(f"{path} is not there; save_posterior writes one, and pruning.save_fraction a pruned one")
    tensors, content = read_verified(path, _KEY, name=str(path), kind="posterior", advice="write it again")
    if content["format"] == _FIRST:
        content |= {"kind": _MEAN_FIELD, "latents": {}}
    elif content["format"] != FORMAT:
        raise FileError(f"{path} has format {content['format']!r}; this version reads {FORMAT!r}")
    return tensors, content


def _mean_field(guide: MeanFieldNormal) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a guide, and how they are stored."""
    tensors, sites = {}, {}
    for site in guide.sites:
        keep = guide.loc_scale(site)[1] > 0
        coding = "all"
        if not keep.all():
            tensors[f"index.{site}"], coding = _encode(keep.flatten().cpu())
        sites[site] = {"shape": list(keep.shape), "nonzero": int(keep.sum()), "index": coding}
        for part in _PARTS:
            tensors[f"{part}.{site}"] = guide.get_parameter(f"{part}.{site}")[keep]
    names = {site: parameter_name(site) for site in guide.latents}
    tensors |= {f"{part}.{name}": guide.get_parameter(f"{part}.{name}") for name in names.values() for part in _PARTS}
    latents = {site: list(tensors[f"loc.{name}"].shape) for site, name in names.items()}
    return tensors, {"kind": _MEAN_FIELD, "sites": sites, "latents": latents}


@torch.no_grad()
def _filled(guide: MeanFieldNormal, tensors: Mapping[str, Tensor], content: dict[str, Any]) -> MeanFieldNormal:
    """A guide of the same model, in any state, with what was saved."""
    keep = {}
    for site, found in content["sites"].items():
        shape = torch.Size(found["shape"])
        keep[site] = _decode(tensors.get(f"index.{site}"), found["index"], shape.numel()).view(shape)
    if any(found["index"] != "all" for found in content["sites"].values()):
        guide = guide.pruned(keep)
    for site, mask in keep.items():
        for part in _PARTS:
            values = guide.get_parameter(f"{part}.{site}")
            values.zero_()[mask.to(values.device)] = tensors[f"{part}.{site}"].to(values)
    for name in map(parameter_name, content["latents"]):
        for part in _PARTS:
            guide.get_parameter(f"{part}.{name}").copy_(tensors[f"{part}.{name}"])
    return guide


def _stored(
    path: Path, model: Callable[..., object], tensors: Mapping[str, Tensor], content: dict[str, Any]
) -> StoredPosterior:
    own = {site: random.point for site, (_, random) in random_sites(model).items()}
    points = [*own.values(), *_points(model).values()]
    samples = {site: tensors[f"samples.{site}"] for site in content["samples"]}
    if points:
        samples = {site: values.to(points[0].device) for site, values in samples.items()}
    # A model that samples weights by hand does not tell their shapes.
    if own:
        saved = {site: values for site, values in samples.items() if site not in content["latents"]}
        _check_sites(path, {site: {"shape": list(values.shape[1:])} for site, values in saved.items()}, own)
    return StoredPosterior(samples, latents=content["latents"], num_chains=content["num_chains"])


def _check_sites(path: Path, saved: Mapping[str, dict[str, Any]], now: Mapping[str, Tensor]) -> None:
    for site in sorted(saved.keys() | now.keys()):
        own = list(now[site].shape) if site in now else "absent"
        there = saved[site]["shape"] if site in saved else "absent"
        if own != there:
            raise FileError(f"{path} is from another network: site {site!r}: saved {there}, now {own}")


def _check_latents(path: Path, content: dict[str, Any], guide: MeanFieldNormal) -> None:
    saved = content["latents"]
    if content["format"] == _FIRST and guide.latents:
        raise FileError(
            f"{path} was written by an earlier version, which left out the latent {guide.latents[0]!r}: write it again"
        )
    now = {site: guide.unconstrained_loc_scale(site)[0] for site in guide.latents}
    _check_sites(path, {site: {"shape": shape} for site, shape in saved.items()}, now)


def _encode(keep: Tensor) -> tuple[Tensor, str]:
    position = keep.nonzero().flatten()
    distances = position.diff(prepend=position.new_full((1,), -1)) - 1
    width = next(kind for kind in _WIDTHS if not len(distances) or int(distances.max()) <= torch.iinfo(kind).max)
    if width.itemsize * len(distances) < len(keep) / 8:
        return distances.to(width), "distances"
    return torch.from_numpy(np.packbits(keep.numpy())), "bitmap"


def _decode(index: Tensor | None, coding: str, count: int) -> Tensor:
    if index is None:
        return torch.ones(count, dtype=torch.bool)
    if coding == "bitmap":
        return torch.from_numpy(np.unpackbits(index.numpy(), count=count)).bool()
    keep = torch.zeros(count, dtype=torch.bool)
    keep[(index.long() + 1).cumsum(0) - 1] = True
    return keep
