"""What the model observes: its shape, its values and how often it counts, as the check at the door sees them."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.util import check_site_shape
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, constraints

from ppl_bnn.errors import UserError
from ppl_bnn.inference.elbo import Replay
from ppl_bnn.models.labels import class_labels
from ppl_bnn.models.model import Model
from ppl_bnn.models.priors import elementwise


def check_observed(
    site: dict, few: Tensor, y: Tensor, *, num_data: int, whole_batch: bool,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Check an observed site of the model run on `few`, the first of all the labels or targets `y` [N, ...].

    Args:
        site: Pyro's message.
        num_data: N.
        whole_batch: every step sees all the data.
        convert: what a likelihood of ours makes of `y`, or refuses.

    Returns:
        `y`, as the likelihood takes it: class labels are int64.

    Raises:
        UserError: outputs and observed values do not fit; a value that the distribution cannot have, anywhere in `y`;
            a scale that is not that of N examples.
    """
    if site["infer"].get("_deterministic"):
        return y
    name, fn, value = site["name"], site["fn"], site["value"]
    each, is_y = elementwise(fn, masks=True), value is few
    if isinstance(each, Categorical):
        classes = each.logits.shape[-1]
        if classes < 2:
            raise UserError(
                f"the network has {classes} output, and the Categorical likelihood of site {name!r} needs at least 2 "
                "outputs, one a class: give the last layer an output for each class"
            )
        if is_y:
            y = class_labels(y, classes, example_shape=fn.shape()[1:])
            value = y[: len(few)]
    elif convert is not None and is_y:
        y = convert(y)
        value = site["value"] = y[: len(few)]
    if not isinstance(fn, Unit) and value.shape != fn.shape():
        raise UserError(
            f"site {name!r}: for {len(few)} examples the outputs give a distribution of shape {list(fn.shape())} and "
            f"the targets have shape {list(value.shape)}: they must be equal; squeeze the outputs ([N, 1] -> [N]), or "
            "give the targets the outputs' shape and use .to_event(1)"
        )
    if isinstance(each, torch.distributions.Bernoulli) and not value.is_floating_point():
        raise UserError(
            f"site {name!r}: a Bernoulli likelihood needs labels 0.0 or 1.0 in floating point, got {value.dtype}: pass "
            "y.float()"
        )
    _check_num_data(site, len(few), num_data, whole_batch)
    try:
        check_site_shape({**site, "log_prob": torch.empty(fn.batch_shape)}, float("inf"))  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    _check_arguments(name, each)
    if site["mask"] is None:
        _check_support(name, type(each), fn.support, value, y if is_y else value)
    return y


def by_likelihood(model: nn.Module, sites: Mapping[str, dict], outputs: Any) -> Callable[[Tensor], Tensor] | None:
    """How the likelihood of a `Model` takes its observed values, or refuses them; None for other models.

    Args:
        sites: Pyro's messages of the model run on a few examples.
        outputs: of the network, for these.
    """
    if not isinstance(model, Model):
        return None
    likelihood = model.likelihood
    # Without their graph, for a function that may be kept.
    with torch.no_grad(), poutine.block(), Replay(dict(sites)):
        latents = {name: value.detach() for name, value in likelihood.latents().items()}
    few = outputs.detach()

    def convert(y: Tensor) -> Tensor:
        likelihood.check(few, **latents)
        return likelihood.observed(y, few, **latents).to(y.device)

    return convert


def later_labels(site: dict, convert: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """A function that checks and converts the labels or targets of later batches [B, ...], as `check_observed` does.

    Args:
        site: Pyro's message of the observed site, which has been checked for the first examples.
        convert: what a likelihood of ours makes of a batch's y, or refuses.
    """
    name, fn, first = site["name"], site["fn"], site["value"]
    each = elementwise(fn, masks=True)
    if isinstance(each, Categorical):
        return partial(class_labels, num_classes=each.logits.shape[-1], example_shape=fn.shape()[1:])
    if convert is not None:
        return convert
    kind, masked, shape, dtype = type(each), site["mask"] is not None, first.shape[1:], first.dtype

    def check(y: Tensor) -> Tensor:
        if y.shape[1:] != shape or y.is_floating_point() != dtype.is_floating_point:
            raise UserError(
                f"site {name!r}: targets of shape {list(y.shape[1:])} and dtype {y.dtype} an example, after first ones "
                f"of shape {list(shape)} and dtype {dtype}: they must be alike"
            )
        if not masked:
            _check_support(name, kind, None, y, y)
        return y.to(dtype)

    return check


def _check_num_data(site: dict, rows: int, n: int, whole_batch: bool) -> None:
    if not isinstance(site["scale"], Tensor) and math.isclose(site["scale"] * rows, n):
        return
    plates = {frame.name: frame.full_size or frame.size for frame in site["cond_indep_stack"]}
    if n in plates.values() or (whole_batch and (not plates or rows in plates.values())):
        return
    data = [frame.name for frame in site["cond_indep_stack"] if frame.size == rows]
    if data:
        raise UserError(
            f"the model's plate {data[0]!r} has size {plates[data[0]]} and there are {n} examples, so the likelihood "
            f"would count {plates[data[0]] / n:g} times: make num_data (the plate's size) {n}, with subsample=x"
        )
    if not isinstance(site["scale"], Tensor) and site["scale"] == 1:
        raise UserError(
            f"site {site['name']!r} is in no plate of {n} examples, so a batch would count as all the data: use "
            f'pyro.plate("data", {n}, subsample=x)'
        )


def _check_arguments(name: str, fn: Distribution) -> None:
    for argument, constraint in fn.arg_constraints.items():
        value = vars(fn).get(argument)
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        value = value.detach()
        # What is not finite is named by the step that meets it.
        if torch.isfinite(value).all() and not constraint.check(value).all():
            raise UserError(
                f"site {name!r}: {type(fn).__name__} needs {argument} to satisfy {constraint}, and the outputs give "
                f"{float(value.min()):g} to {float(value.max()):g}: transform them, by softplus or exp, say"
            )


def _check_support(name: str, kind: type, support: object, value: Tensor, y: Tensor) -> None:
    # Where it depends on no argument, of all examples; else of those the model ran with.
    own = inspect.getattr_static(kind, "support", None)
    everywhere = isinstance(own, constraints.Constraint) and not isinstance(own, property)
    constraint, checked = (own, y) if everywhere else (support, value)
    if not isinstance(constraint, constraints.Constraint) or constraints.is_dependent(constraint):
        return
    if not constraint.check(checked).all():  # type: ignore[no-untyped-call]
        low, high = float(checked.min()), float(checked.max())
        raise UserError(
            f"site {name!r}: {kind.__name__} has the support {constraint}, and the targets are from {low:g} to "
            f"{high:g}: drop or convert what lies outside"
        )
