"""safetensors files with a checksum: written dense, verified when read. They hold tensors and JSON, never code."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ppl_bnn.errors import FileError


def read_verified(
    path: Path, key: str, *, name: str, kind: str, advice: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and the JSON under `key` in its metadata with the verified checksum (crc32).

    Args:
        name, kind, advice: for the message: what the file is called, what it should be, and what to do.

    Raises:
        FileError: it cannot be read, is truncated, altered, or of another kind.
    """
    try:
        path.open("rb").close()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, crc32 = metadata[key], int(metadata["crc32"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
        content = json.loads(text)
    except PermissionError:
        raise FileError(f"{name} cannot be read: permission denied") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FileError(f"{name} is truncated or not a {kind} ({error}); {advice}") from None
    if crc32 != checksum(tensors, text):
        raise FileError(f"{name} is altered: its checksum differs; {advice}")
    return tensors, {**content, "crc32": crc32}


def as_written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: dense, on the CPU, each in its own memory (a layer may have two names)."""
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        found[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return found


def checksum(tensors: dict[str, Tensor], text: str) -> int:
    """CRC-32 of a text and of named tensors on the CPU."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()), total)  # type: ignore[arg-type]
    return total


def shape_difference(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> str | None:
    """``'fc1.weight': saved [10, 5], now absent`` for the first tensor by name that differs in shape, or None."""
    for name in sorted(saved.keys() | now.keys()):
        shapes = [list(side[name].shape) if name in side else "absent" for side in (saved, now)]
        if shapes[0] != shapes[1]:
            return f"{name!r}: saved {shapes[0]}, now {shapes[1]}"
    return None
