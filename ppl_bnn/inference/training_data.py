"""The data that `fit` is given: checked at the door, and read in batches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ppl_bnn.data import Examples, TensorExamples, as_examples
from ppl_bnn.data.as_examples import in_memory
from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.data.examples import read_batch
from ppl_bnn.data.tensors import is_plain
from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.inference import data_parallel
from ppl_bnn.inference.door import Training, check_training
from ppl_bnn.inference.reading import Reader
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.inputs import lead

# Inputs and labels in memory, as they were given.
Given = tuple[Any, Any]


def given_data(x: Any, y: Any) -> Examples | Given:
    """The data as `Examples`; tensors and arrays in memory as they are, for the check at the door converts them.

    Raises:
        UserError: no labels beside inputs; what `as_examples` refuses.
    """
    if in_memory(x) and y is not None:
        return x, y
    if not isinstance(x, tuple | Mapping) and in_memory(x):
        kind = "tensor" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"fit needs the labels or targets y beside the {kind} x, got None")
    return as_examples(x, y)


def batch_size_of(data: Examples | Given, given: int | None) -> int:
    """The examples a step on each rank: as given, else as a DataLoader has it, else the default."""
    if given is not None:
        return given
    of_loader: int | None = None if isinstance(data, tuple) else getattr(data, "batch_size", None)
    return of_loader or TrainSettings.batch_size


def checked_data(
    model: Callable, guide: Callable, data: Examples | Given, settings: TrainSettings, ranks: Communicator
) -> tuple[Training, Reader]:
    """What is trained, after the check at the door, and its data.

    The labels of tensors on the model's device are all checked here. Of other data the first batch is looked at, and
    the labels of each batch are checked when it is read.
    """
    seed = data_parallel.rank_seed(settings.seed, ranks.rank)
    how: dict[str, Any] = {
        "batch_size": settings.batch_size, "ranks": ranks.size, "precision": settings.precision, "seed": seed,
        "with_uses": settings.estimator != "plain", "accumulate": settings.accumulate,
    }  # fmt: skip
    like = _first_parameter(model, guide)
    if isinstance(data, tuple) or _as_trained(data, like):
        x, y = data if isinstance(data, tuple) else (data.x, data.y)
        checked = check_training(model, guide, x, y, **how)
        own = TensorExamples(checked.x, checked.y)
        examples: Examples = own if isinstance(data, tuple) else replace(data, x=checked.x, y=checked.y)
        device, labels, dtype = lead(checked.x).device, None, None
    else:
        examples = data
        device, dtype = (torch.device("cpu"), None) if like is None else (like.device, like.dtype)
        few = torch.arange(min(len(examples), max(2, settings.batch_size)))
        x, y = read_batch(examples, few, device, dtype=dtype, labels=lambda y: y)
        checked = check_training(model, guide, x, y, num_data=len(examples), **how)
        labels = checked.labels
    if settings.augment in AUGMENTATIONS and settings.augment != "none" and not isinstance(checked.x, Tensor):
        raise UserError(
            f"augment {settings.augment} is for inputs that are one tensor; these are a {type(checked.x).__name__}: "
            "leave it out"
        )
    step_size = settings.batch_size * settings.accumulate
    return checked, Reader(examples, step_size, settings.seed, ranks, device, labels, dtype)


def _as_trained(data: Examples, like: Tensor | None) -> TypeGuard[TensorExamples]:
    """Whether examples are plain tensors with labels, on the model's device."""
    return is_plain(data) and data.y is not None and (like is None or lead(data.x).device == like.device)


def _first_parameter(*parts: Callable) -> Tensor | None:
    """The first parameter in floating point of the model, else of the guide."""
    own = (value for part in parts if isinstance(part, nn.Module) for value in part.parameters())
    return next((value for value in own if not is_lazy(value) and value.is_floating_point()), None)
