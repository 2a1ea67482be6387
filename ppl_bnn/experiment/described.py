"""What a run's network and guide are built from, as JSON, so that they can be built where the data are not."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ppl_bnn.data import Split
from ppl_bnn.errors import FileError
from ppl_bnn.inputs import Inputs, mapped

# A tensor of one example: "float32[1, 28, 28]".
_TENSOR = re.compile(r"(\w+)\[([\d, ]*)\]")


def described(data: Split, example: Inputs) -> dict[str, Any]:
    """The training data as JSON: dtype and shape of the inputs, names of the classes, and the number of examples.

    Args:
        example: inputs of one of them, [1, ...].
    """
    inputs = mapped(example, lambda part: f"{str(part.dtype).removeprefix('torch.')}{list(part.shape[1:])}")
    return {"inputs": inputs, "classes": list(data.classes), "num_data": len(data)}


def example_of(inputs: Any) -> Inputs:
    """Inputs [1, ...] of zeros, of the dtype and shape that `described` found.

    Raises:
        FileError: `inputs` does not describe any.
    """
    if isinstance(inputs, Mapping):
        return {name: example_of(part) for name, part in inputs.items()}  # type: ignore[misc]
    if isinstance(inputs, list):
        return tuple(example_of(part) for part in inputs)  # type: ignore[misc]
    match = _TENSOR.fullmatch(str(inputs))
    dtype = getattr(torch, match[1], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise FileError(f"the checkpoint describes inputs {inputs!r}, which this version of ppl_bnn cannot read")
    return torch.zeros(1, *map(int, filter(None, match[2].split(", "))), dtype=dtype)
