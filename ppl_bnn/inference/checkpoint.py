"""Checkpoints: one safetensors file each, written atomically, verified when read, holding tensors and JSON only."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ppl_bnn.errors import FileError
from ppl_bnn.files import written_atomically
from ppl_bnn.models.random_network import load_points, point_state, priors_of
from ppl_bnn.safe_tensors import as_written, checksum, read_verified, shape_difference

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A training state: ``step``, its tensors by dotted name, and `meta`, everything about it that is JSON."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def history(self) -> list[dict[str, float]]:
        """What `fit` returns of the epochs until then: one record an epoch."""
        found: list[dict[str, float]] = self.meta.get("history", [])
        return found

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, with the prefix taken off: ``part("guide")``."""
        start = prefix + "."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def load_checkpoint(path: str | Path, step: str | int = "last", *, model: Callable, guide: Callable) -> Checkpoint:
    """Load a saved step of a training into `model` and `guide`, which are built as they were for that training.

    Values of ``pyro.param`` statements go into Pyro's parameter store. A guide whose parameters its first call makes,
    such as Pyro's autoguides, and a function with such statements, must have been called once. Nothing in the file can
    run code. Where it is refused, nothing is changed.

    Args:
        path: an out folder (the `folder` of `fit`), a folder of checkpoints, or one checkpoint.
        step: the number of steps, ``step-00001234``, or ``last``.

    Returns:
        The checkpoint: its `step`, and the training's `history` until then.

    Raises:
        FileError: no such checkpoint (the message lists those that are there), a damaged one, or one of another
            network or prior.
    """
    found = load(located(Path(path), str(step)))
    store = pyro.get_param_store().get_state()["params"]
    params = {name: store[name] for name in found.part("params") if name in store}
    modules = [part if isinstance(part, nn.Module) else nn.Module() for part in (model, guide)]
    restore(found, model=modules[0], guide=modules[1], params=params)
    return found


def located(path: Path, step: str = "last") -> Path:
    """The file of a saved step, in an out folder or a folder of checkpoints; of a file, the file itself.

    Raises:
        FileError: no such checkpoint, or a file beside the name of a step.
    """
    if path.is_dir():
        return find(path / "checkpoints" if (path / "checkpoints").is_dir() else path, step)
    if step != "last":
        raise FileError(f"{path} is not a folder, in which to find {step!r}: give an out folder, or the file alone")
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, from its header alone, unverified; nothing of a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["ppl_bnn"])["meta"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}
    return found


def save(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    guide: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    meta: dict[str, Any] | None = None,
    keep: int | None = None,
    random: dict[str, Tensor] | None = None,
    params: Mapping[str, Tensor] | None = None,
    name: str | None = None,
) -> Path:
    """Write ``folder/step-00001234.safetensors`` with parameters, optimizer state and the random generators' state.

    Args:
        folder: created if need be.
        step: number of optimizer steps done.
        meta: anything that JSON holds, returned by `load` as it was.
        keep: number of other checkpoints to keep, the last ones, beside step 0; older ones are then deleted.
        random: the random generators' states, if not those of this process alone (`random_state`).
        params: unconstrained values of ``pyro.param`` statements by name.
        name: of the file, in place of ``step-00001234``.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched.
    """
    tensors = tensors_of(model, guide, params or {})
    if random is None:
        random = random_state(
            next((value.device for value in tensors.values() if not value.is_cpu), torch.device("cpu"))
        )
    tensors |= {f"random.{kind}": value for kind, value in random.items()}
    groups: list[dict[str, Any]] = []
    if optimizer is not None:
        state = optimizer.state_dict()
        groups = state["param_groups"]
        for index, entries in state["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    tensors = as_written(tensors)
    text = json.dumps(
        {"format": FORMAT, "step": step, "groups": groups, "meta": meta or {}, "priors": priors_of(model)}
    )
    path = folder / f"{name or f'step-{step:08d}'}.safetensors"
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"ppl_bnn": text, "crc32": str(checksum(tensors, text))})
        except SafetensorError as error:
            # safetensors reports a full disk as an error of its own.
            raise OSError(f"{path} could not be written: {error}") from error
    if keep is not None:
        for old in [other for other in saved(folder) if step_of(other) > 0][:-keep]:
            old.unlink(missing_ok=True)
    return path


def tensors_of(model: nn.Module, guide: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a training learns, by the names in a checkpoint: as it is, not copied."""
    tensors = {f"model.{name}": value for name, value in point_state(model).items()}
    tensors |= {f"guide.{name}": value for name, value in guide.state_dict().items()}
    return tensors | {f"params.{name}": value.detach() for name, value in params.items()}


def load(path: Path, *, advice: str = "delete it to resume from the one before it") -> Checkpoint:
    """Read and verify a checkpoint. Nothing in it can run code.

    Args:
        advice: what to do about a damaged one, for the message.

    Raises:
        FileError: missing, truncated, altered, or not a checkpoint.
    """
    if not path.exists():
        raise FileError(f"checkpoint {path} is not there; {_available(path.parent)}")
    tensors, content = read_verified(
        path,
        "ppl_bnn",
        name=f"checkpoint {path}",
        kind="checkpoint",
        advice=advice,
    )
    if content["format"] != FORMAT:
        raise FileError(f"checkpoint {path} has format {content['format']}; this version of ppl_bnn reads {FORMAT}")
    meta = {
        **content["meta"],
        "groups": content["groups"],
        "priors": content.get("priors", {}),
        "crc32": content["crc32"],
    }
    return Checkpoint(content["step"], tensors, meta)


def find(folder: Path, name: str = "last") -> Path:
    """The path of a saved step: ``last``, ``step-00001234``, or just ``1234``.

    Raises:
        FileError: no such checkpoint; the message lists the saved ones.
    """
    if name == "last":
        paths = saved(folder)
        if not paths:
            raise FileError(f"there is no checkpoint in {folder}; run the train stage first")
        return paths[-1]
    path = folder / f"{full_name(name)}.safetensors"
    if not path.is_file():
        raise FileError(f"there is no checkpoint {name!r} in {folder}; {_available(folder)}")
    return path


def full_name(name: str) -> str:
    """The name of a checkpoint's file without its suffix: ``step-00001234`` for ``1234``, and for itself."""
    stem = Path(name).name.removesuffix(".safetensors")
    step = stem.removeprefix("step-")
    return f"step-{int(step):08d}" if step.isdecimal() else stem


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    return sorted(path for path in folder.glob("step-*.safetensors") if path.stem.removeprefix("step-").isdecimal())


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def restore(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    guide: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy a checkpoint's state into a model, a guide and, if given, an optimizer and values of ``pyro.param``.

    Raises:
        FileError: the checkpoint is from another architecture or prior; the message names the first difference.
    """
    own_priors = priors_of(model)
    for site, prior in checkpoint.meta["priors"].items():
        if own_priors.get(site, prior) != prior:
            raise FileError(f"the checkpoint has another prior: {site!r}: saved {prior}, now {own_priors[site]}")
    for prefix, state in (("model", point_state(model)), ("guide", guide.state_dict())):
        if difference := shape_difference(checkpoint.part(prefix), state):
            raise FileError(f"the checkpoint is from another network: {prefix} tensor {difference}")
    values = checkpoint.part("params")
    if params is not None and (difference := shape_difference(values, dict(params))):
        raise FileError(f"the checkpoint is from another model or guide: pyro.param {difference}")
    load_points(model, checkpoint.part("model"))
    guide.load_state_dict(checkpoint.part("guide"))
    with torch.no_grad():
        for name, value in (params or {}).items():
            value.copy_(values[name])
    if optimizer is not None:
        entries: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, tensor in checkpoint.part("optimizer").items():
            index, key = name.split(".", 1)
            # In the parameter's own memory format: a fused optimizer walks both by address.
            like = parameters[int(index)]
            own_format = tensor if tensor.shape != like.shape else torch.empty_like(like).copy_(tensor)
            entries.setdefault(int(index), {})[key] = own_format
        optimizer.load_state_dict({"state": entries, "param_groups": checkpoint.meta["groups"]})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators, of the CPU and of `device`, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's random generators to states that `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def restore_random(checkpoint: Checkpoint, device: torch.device, rank: int = 0) -> None:
    """Set torch's random generators, of the CPU and of `device`, to where that rank had them when it was written."""
    end = f".{rank}" if rank else ""
    found = checkpoint.part("random")
    set_random_state({kind: found[kind + end] for kind in ("cpu", device.type) if kind + end in found}, device)


def _available(folder: Path) -> str:
    names = [path.stem for path in saved(folder)]
    return f"saved steps: {', '.join(names)}" if names else f"none is saved in {folder}"
