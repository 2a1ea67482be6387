"""Any data as `Examples`: `as_examples`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from ppl_bnn.data.arrays import ArrayExamples, is_array, tensor_of
from ppl_bnn.data.datasets import DatasetExamples
from ppl_bnn.data.examples import Examples
from ppl_bnn.data.iterables import IterableExamples
from ppl_bnn.data.labelled import labelled
from ppl_bnn.data.splits import is_split
from ppl_bnn.data.tensors import TensorExamples
from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, mapped, parts

log = logging.getLogger(__name__)


def as_examples(
    data: Any, y: Any = None, *, target: str | int | None = None, collate_fn: Callable[[list], Any] | None = None,
    num_workers: int | None = None, transform: Callable[[Inputs], Inputs] | None = None,
    length: int | None = None,
) -> Examples:  # fmt: skip
    """Anything that holds examples, as `Examples`, which `fit`, `predict` and the others take in place of x and y.

    ======================================  ==========================================================================
    `data`                                  how it is read
    ======================================  ==========================================================================
    tensors, numpy arrays [N, ...]          in memory; floating-point arrays get torch's default dtype
    ``np.memmap``, h5py data sets           row by row, in a thread; never whole
    a tuple or dict of these                likewise; the label is the last element, or ``"y"``, unless `y` is given
    a map-style Dataset, a list of items    item by item, in worker processes
    a DataLoader                            its data set, ``collate_fn`` and workers, in an order of ours
    an iterable, with `length`              in its own order
    `Images`, a `Table` and the like        as the network takes them: pixels from 0 to 1
    `Examples`                              as they are
    ======================================  ==========================================================================

    Args:
        y: labels [N, ...], beside inputs in tensors or arrays.
        target: name or position of the label in a dict or tuple.
        collate_fn: makes a batch of a list of items of a Dataset; None stacks them.
        num_workers: processes that read a Dataset; None is the DataLoader's number, else 0.
        transform: of a batch's inputs, on the model's device, in training and prediction alike (`normalize`).
        length: number of examples of one pass through an iterable that has no len(). A DataLoader with `length` is
            iterated over as it is, in its sampler's order.

    Raises:
        UserError: data of another kind; no examples; arrays of different lengths; a DataLoader with a sampler of its
            own and no `length`; an argument that has no effect.
    """
    how: dict[str, Any] = {"collate_fn": collate_fn, "num_workers": num_workers}
    if is_split(data):
        data = data.examples()
    if all(hasattr(data, name) for name in ("take", "fingerprint")):
        _refuse(data, y=y, target=target, transform=transform, length=length, **how)
        return data  # type: ignore[no-any-return]
    if arrays(data):
        _refuse(data, length=length, **how)
        x, y = labelled(data, target) if y is None else (data, y)
        return _of_arrays(x, y, transform)
    if isinstance(data, DataLoader):
        _refuse(data, y=y)
        return _of_loader(data, target, transform, length, **how)
    if _is_iterable(data):
        _refuse(data, y=y)
        return _of_iterable(data, target, transform, length, **how)
    # A list beside y is meant as an array.
    if _is_map_style(data) and not (isinstance(data, list) and y is not None):
        _refuse(data, y=y, length=length)
        return _of_dataset(data, target, transform, collate_fn, num_workers or 0)
    advice = "pass x.to_numpy()" if hasattr(data, "to_numpy") else "convert it first"
    raise UserError(f"x must be one tensor or numpy array of N examples, got a {type(data).__name__}: {advice}")


def arrays(data: Any) -> bool:
    """Whether data are a tensor or array, or a tuple or dict of them."""
    if not isinstance(data, tuple | Mapping | Tensor) and not is_array(data):
        return False
    found = parts(data)
    return bool(found) and all(isinstance(part, Tensor) or is_array(part) for part in found)


def in_memory(data: Any) -> bool:
    """Whether data are tensors and numpy arrays alone, none of them mapped from a file."""
    return arrays(data) and all(
        isinstance(part, Tensor | np.ndarray) and not isinstance(part, np.memmap) for part in parts(data)
    )


def _of_arrays(x: Any, y: Any, transform: Callable | None) -> Examples:
    y = np.asarray(y) if isinstance(y, list) else y
    if y is not None and not arrays(y):
        raise UserError(f"the labels y must be one tensor or numpy array of N examples, got a {type(y).__name__}")
    if in_memory(x) and (y is None or in_memory(y)):
        return TensorExamples(mapped(x, _tensor), None if y is None else _tensor(y), transform)
    return ArrayExamples(x, y, transform)


def _tensor(part: Any) -> Tensor:
    if isinstance(part, Tensor):
        return part
    found = tensor_of(part)
    return found.to(torch.get_default_dtype()) if found.is_floating_point() else found


def _of_dataset(
    data: Any, target: str | int | None, transform: Callable | None, collate_fn: Callable | None, num_workers: int,
    batch_size: int | None = None, loading: Mapping[str, Any] | None = None,
) -> Examples:  # fmt: skip
    if type(data) is TensorDataset and collate_fn is None:
        return TensorExamples(*labelled(data.tensors, target), transform, batch_size)
    return DatasetExamples(data, collate_fn, target, num_workers, transform, batch_size, loading or {})


def _of_loader(
    loader: Any, target: str | int | None, transform: Callable | None, length: int | None, *,
    collate_fn: Callable | None, num_workers: int | None,
) -> Examples:  # fmt: skip
    if length is not None or isinstance(loader.dataset, IterableDataset):
        _refuse(loader, collate_fn=collate_fn, num_workers=num_workers)
        return IterableExamples(loader, _length(loader.dataset, length), target=target, batch_transform=transform)
    _check_order(loader)
    if loader.drop_last:
        log.warning("the DataLoader's drop_last has no effect: each epoch visits every example")
    own = None if loader.collate_fn is default_collate else loader.collate_fn
    loading = {"worker_init_fn": loader.worker_init_fn, "timeout": loader.timeout}
    workers = loader.num_workers if num_workers is None else num_workers
    if workers and loader.num_workers:
        loading |= {"prefetch_factor": loader.prefetch_factor}
        loading |= {"multiprocessing_context": loader.multiprocessing_context}
    return _of_dataset(loader.dataset, target, transform, collate_fn or own, workers, loader.batch_size, loading)


def _check_order(loader: Any) -> None:
    iterate = "iterate over it in its own order: as_examples(loader, length=...)"
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise UserError(
            "a DataLoader without a batch_size, or with a batch_sampler of its own, cannot have our order: give "
            f"batch_size, or {iterate}"
        )
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset):
        return
    name, advice = type(sampler).__name__, f"give fit the examples' weights=, or {iterate}"
    if name == "DistributedSampler":
        advice = "leave it out, as fit divides the examples between the ranks"
    raise UserError(
        f"the DataLoader has a {name} of its own, and the order of examples is ours, so that a training resumes "
        f"exactly, on any number of ranks: {advice}"
    )


def _of_iterable(
    data: Any, target: str | int | None, transform: Callable | None, length: int | None, *,
    collate_fn: Callable | None, num_workers: int | None,
) -> Examples:  # fmt: skip
    length = _length(data, length)
    if isinstance(data, Iterator):
        raise UserError("an iterator can be read once, and each epoch reads it anew: give an IterableDataset")
    return IterableExamples(data, length, collate_fn, target, num_workers or 0, transform)


def _length(data: Any, length: int | None) -> int:
    if length is not None:
        return length
    if hasattr(data, "__len__"):
        return len(data)
    raise UserError(
        f"the iterable {type(data).__name__} does not say how many examples it has: as_examples(data, length=...)"
    )


def _is_iterable(data: Any) -> bool:
    return isinstance(data, IterableDataset) or (
        isinstance(data, Iterable) and not any(hasattr(data, name) for name in ("__getitem__", "to_numpy"))
    )


def _is_map_style(data: Any) -> bool:
    odd = isinstance(data, str | bytes | Mapping) or hasattr(data, "to_numpy")
    return not odd and all(hasattr(data, name) for name in ("__getitem__", "__len__"))


def _refuse(data: Any, **given: Any) -> None:
    kind = type(data).__name__
    for name, value in given.items():
        if value is not None and name == "y":
            raise UserError(f"y goes with x in tensors or arrays; x is a {kind}, which has its labels: leave y out")
        if value is not None:
            raise UserError(f"{name} has no effect on a {kind}: leave it out")
