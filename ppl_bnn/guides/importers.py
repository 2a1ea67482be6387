"""Imports a mean-field posterior from another library: reads plain arrays, reorders them, and puts them in place."""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from pyro import poutine
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ppl_bnn.errors import FileError, UserError
from ppl_bnn.guides.mean_field import MeanFieldNormal
from ppl_bnn.guides.normal import SMALLEST_SCALE, inverse_scale
from ppl_bnn.models.evaluating import evaluating
from ppl_bnn.models.param_store import own_parameters

LAYOUTS = ("tfp", "torch")
Layers = dict[str, dict[str, Tensor]]

# What an array means, by its names in TensorFlow Probability, bayesian-torch, Keras and torch.
_NAMES = {
    "loc": ("loc", "kernel_posterior_loc", "mu_kernel", "mu_weight"),
    "scale": ("scale",),
    "unconstrained_scale": (
        "unconstrained_scale", "kernel_posterior_untransformed_scale", "rho_kernel", "rho_weight",
    ),
    "bias": ("bias", "beta", "bias_loc", "bias_posterior_loc", "mu_bias"),
    "bias_scale": ("bias_scale",),
    "bias_unconstrained_scale": ("bias_unconstrained_scale", "bias_posterior_untransformed_scale", "rho_bias"),
    "weight": ("weight", "gamma"),
    "running_mean": ("running_mean", "moving_mean"),
    "running_var": ("running_var", "moving_variance"),
}  # fmt: skip
_MEANING = {name: meaning for meaning, names in _NAMES.items() for name in names}


def read_layers(path: Path) -> Layers:
    """Read {layer: {meaning: array}} in the file's order, from an ``.npz``, ``.h5``, ``.safetensors`` or ``.pt`` file.

    An array is named ``<layer>/<name>`` or ``<layer>.<name>``. Arrays with unknown names are left out. Nothing in the
    file is executed.

    Raises:
        FileError: the file cannot be read, is of another kind, would have to execute code, or holds no such array.
    """
    if not path.is_file():
        raise FileError(f"{path} is not there, or not a file")
    try:
        arrays = _read(path)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise FileError(f"{path} cannot be read: {_first_line(error)}") from None
    except (TypeError, AttributeError) as error:
        raise FileError(f"{path} holds other things than arrays: {_first_line(error)}") from None
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise FileError(
            f"{path} needs code to be run, or is damaged; save a state_dict of tensors ({reason})"
        ) from None
    layers: Layers = {}
    for key, array in arrays.items():
        # Keras writes dense/dense/kernel_posterior_loc:0.
        *parents, name = key.removesuffix(":0").replace("/", ".").split(".")
        if parents and name in _MEANING:
            layer = parents[-1] if len(set(parents)) == 1 else ".".join(parents)
            layers.setdefault(layer, {})[_MEANING[name]] = array
    if not layers:
        known = ", ".join(sorted(_MEANING))
        raise FileError(f"{path} has no array of a layer; its names should end in one of {known}, as in fc1/loc")
    return layers


@torch.no_grad()
def put_in_place(
    layers: Layers,
    net: nn.Module,
    guide: MeanFieldNormal,
    example: Tensor,
    *,
    layout: str,
    names: Sequence[str] | None = None,
    batch_norm_eps: float | None = None,
) -> list[str]:
    """Copy an imported posterior into a network's point estimates and its guide. Return the warnings.

    Args:
        layers: from `read_layers`.
        example: one input [1, ...]. It shows which dense layers take a flattened image.
        layout: ``tfp``: kernels are [in, out] and [height, width, in, out], and images are flattened as
            [height, width, channel]. ``torch``: [out, in], [out, in, height, width] and [channel, height, width].
        names: the file's layers in the order of the network's, if they have other names.
        batch_norm_eps: number that the other library's batch norm adds to the variance. The default is Keras's 0.001
            for ``tfp``, and torch's 0.00001 for ``torch``.

    Raises:
        UserError: the layers do not correspond; an array is missing, does not fit (the message has the layer and both
            shapes) or is not finite; or a scale is not positive. Then nothing is changed.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    eps = batch_norm_eps if batch_norm_eps is not None else 1e-3 if layout == "tfp" else 1e-5
    own = {path: module for path, module in net.named_modules() if _targets(path, module, guide)}
    pairs = _correspondence(list(layers), list(own), names)
    flat = _flattened_images(net, example) if layout == "tfp" else {}
    warnings, copies = [], []
    for path, theirs in pairs.items():
        arrays, module = dict(layers[theirs]), own[path]
        where = f"layer {path}" + (f" ({theirs} in the file)" if theirs != path else "")
        targets = _targets(path, module, guide)
        if "bias_scale" not in targets:
            noisy = [name for name in ("bias_scale", "bias_unconstrained_scale") if arrays.pop(name, None) is not None]
            if noisy:
                warnings.append(f"{where}: the bias is a point estimate here; its scale is dropped")
        for kind in ("scale", "bias_scale"):
            _settle_scale(arrays, kind, where)
        if differing := sorted(arrays.keys() ^ targets.keys()):
            side = "the file lacks" if differing[0] in targets else "the run's layer has no"
            raise UserError(f"{where}: {side} {differing[0]}; it needs {', '.join(targets)}, got {', '.join(arrays)}")
        for name, target in targets.items():
            if arrays[name].is_complex() or arrays[name].layout != torch.strided:
                raise UserError(f"{where}: {name} must be a dense array of real numbers")
            array = arrays[name].to(target.dtype)
            given = list(array.shape)
            if layout == "tfp" and array.dim() in (2, 4):
                array = _from_tfp(array, flat.get(path))
            if array.shape != target.shape:
                raise UserError(
                    f"{where}: {name} is {given} in the file, layout {layout}, which becomes {list(array.shape)}; "
                    f"the run needs {list(target.shape)}"
                )
            if not bool(torch.isfinite(array).all()):
                raise UserError(f"{where}: {name} holds NaN or infinite values")
            if name == "running_var":
                if bool((array < 0).any()):
                    raise UserError(f"{where}: {name} must be at least 0, its least is {float(array.min()):.3g}")
                array = array + (eps - module.eps)  # type: ignore[operator]
            copies.append((target, inverse_scale(array) if name in ("scale", "bias_scale") else array))
    for target, array in copies:
        target.copy_(array)
    return warnings


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise UserError("it is truncated, or no .npz at all")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            return {name: torch.from_numpy(array) for name, array in arrays.items() if _is_numeric(array)}
    if path.suffix in (".h5", ".hdf5"):
        found: dict[str, Tensor] = {}

        def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
            if isinstance(node, h5py.Dataset) and node.shape is not None and node.dtype.kind == "f":
                found[name] = torch.from_numpy(np.asarray(node[()]))

        with h5py.File(path) as file:
            file.visititems(visit)
        return found
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    raise UserError(f"{path.suffix or 'no suffix'} is none of .npz, .h5, .safetensors, .pt and .pth")


def _is_numeric(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiubc"


def _targets(path: str, module: nn.Module, guide: MeanFieldNormal) -> dict[str, Tensor]:
    """Return the tensor that each of a layer's arrays goes into, by its meaning. Scales go into unconstrained_scale."""
    prefix = f"{path}." if path else ""
    state = {
        name: value
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if name != "num_batches_tracked" and prefix + name not in guide.sites
    }
    for attribute, loc, scale in (("weight", "loc", "scale"), ("bias", "bias", "bias_scale")):
        if prefix + attribute in guide.sites:
            state[loc] = guide.loc.get_parameter(prefix + attribute)
            state[scale] = guide.unconstrained_scale.get_parameter(prefix + attribute)
    return state


def _correspondence(theirs: list[str], own: list[str], names: Sequence[str] | None) -> dict[str, str]:
    if names is None and sorted(theirs) == sorted(own):
        return {path: path for path in own}
    if names is None or len(names) != len(own) or sorted(names) != sorted(theirs):
        given = "" if names is None else f", and {', '.join(names)} were named"
        raise UserError(
            f"the file has the layers {', '.join(theirs)}, the run {', '.join(own)}{given}: "
            "name all of the file's, in the run's order, with --layers"
        )
    return dict(zip(own, names, strict=True))


def _settle_scale(arrays: dict[str, Tensor], kind: str, where: str) -> None:
    unconstrained = arrays.pop(kind.replace("scale", "unconstrained_scale"), None)
    if unconstrained is not None:
        if kind in arrays:
            raise UserError(f"{where}: the file has both {kind} and its unconstrained form; leave one out")
        arrays[kind] = nn.functional.softplus(unconstrained.double()) + SMALLEST_SCALE
    elif kind in arrays and bool((arrays[kind] <= SMALLEST_SCALE).any()):
        least = float(arrays[kind].min())
        raise UserError(f"{where}: {kind} must be above {SMALLEST_SCALE} everywhere, its least is {least:.3g}")


def _from_tfp(array: Tensor, image: tuple[int, int, int] | None) -> Tensor:
    if array.dim() == 4:
        return array.permute(3, 2, 0, 1)
    array = array.T
    if image is None or array.shape[1] != image[0] * image[1] * image[2]:
        return array
    channels, height, width = image
    # Keras flattens [height, width, channel], torch [channel, height, width].
    return array.reshape(-1, height, width, channels).permute(0, 3, 1, 2).flatten(1)


def _flattened_images(net: nn.Module, example: Tensor) -> dict[str, tuple[int, int, int]]:
    """Return {dense layer: (channels, height, width)} for dense layers whose input is a flattened image."""
    last: list[tuple[int, int, int] | None] = [None]
    found: dict[str, tuple[int, int, int]] = {}

    def look(path: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, nn.Flatten) and x.dim() == 4:
            last[0] = (x.shape[1], x.shape[2], x.shape[3])
        elif isinstance(module, nn.Linear) and last[0] is not None:
            found[path], last[0] = last[0], None

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: look(path, module, inputs[0]))  # type: ignore[misc]
        for path, module in net.named_modules()
    ]
    try:
        with evaluating(net), poutine.block(), own_parameters():
            net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
