"""What `predict` and `predictor` check before the first draw: the posterior is the network's, inputs and labels fit."""

from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppl_bnn.errors import UserError, some
from ppl_bnn.guides.posterior import Posterior, WithLocalLatents, parameters_of
from ppl_bnn.inputs import Inputs, count, lead, mapped, parts, rows
from ppl_bnn.models.labels import failing, not_finite, refuse_dtype
from ppl_bnn.models.likelihoods import Categorical
from ppl_bnn.models.model import Model, one_tensor
from ppl_bnn.prediction.observed_site import observed_site
from ppl_bnn.prediction.running import ADVICE, GivenSites, Target, arguments, given_latents, required, run_with


def check_prediction(
    model: Callable[..., Any], posterior: Posterior, x: Inputs, y: object = None, *, seed: int = 0,
    site: str | None = None, own_model: str | None = None,
) -> Target:  # fmt: skip
    """Refuse by name what would fail or predict nonsense; return what is predicted.

    Args:
        model: a `Model`, whose likelihood is its own; a network of class logits; or a user's own Pyro model.
        y: observed values, for a Pyro model that cannot run without.
        site: which observed site of a Pyro model; not needed where it has one.
        own_model: what cannot take a user's own Pyro model, if so, for the message.

    Raises:
        UserError: `x` is no tensor [N, ...] of finite numbers (or tuple or dict of such), or has no examples; a
            parameter is on the meta device or not finite; the posterior lacks a random site of the model, has another,
            or has one of another shape; inputs, or a dtype of them, that the forward pass does not take; outputs that
            the likelihood cannot take; an observed site that is missing.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 and below 2^63, got {seed!r}")
    check_inputs(x)
    if isinstance(model, nn.Module):
        _check_parameters("the network", dict([*model.named_parameters(), *model.named_buffers()]))
    _check_parameters("the posterior", parameters_of(posterior))
    # A copy, for a network that changes its input in place.
    few = mapped(rows(x, slice(2)), torch.clone)
    draw = dict(posterior.draw(0, seed=seed))
    _check_parameters("draw 0 of the posterior", draw)
    if isinstance(posterior, WithLocalLatents) and isinstance(few, Tensor):
        draw |= posterior.draw_local(0, few, seed=seed)
    outputs, sites = _run(model, draw, few, y)
    if isinstance(model, Model):
        net, likelihood, latents = model.net, model.likelihood, given_latents(model.likelihood, draw)
    elif not sites.observable:
        net, likelihood, latents = cast(nn.Module, model), Categorical(), {}
    else:
        if own_model is not None:
            raise UserError(f"{own_model} takes a Model or a network, not a Pyro model of your own; use predict")
        target = observed_site(model, sites.observable, site, few)
        _check_moments(target)
        return target
    if site is not None:
        raise UserError(f"site {site!r} is for a Pyro model of your own; a Model has one observed site: leave it out")
    outputs = one_tensor(outputs)
    if outputs.dim() == 0 or len(outputs) != count(few):
        raise UserError(
            f"the network must return one row an example, got {list(outputs.shape)} for {count(few)} examples"
        )
    likelihood.check(outputs, **latents)
    target = Target(net, likelihood, outputs.to(torch.promote_types(outputs.dtype, torch.float32)), latents)
    _check_moments(target)
    return target


def _refuse_one_input(model: Callable[..., Any]) -> None:
    """Raise UserError if a network has several inputs, and got one tensor."""
    needed = required(model.net if isinstance(model, Model) else model)
    if isinstance(model, nn.Module) and len(needed) > 1:
        names = ", ".join(repr(one) for one in needed)
        raise UserError(f"x is one tensor, and the network takes {names}: give a dict of these, or a tuple beside y")


def checked_y(y: object, x: Inputs, target: Target) -> Tensor | None:
    """The observed y [N, ...] as the likelihood takes it; None for None.

    Raises:
        UserError: other values, or another length than `x`.
    """
    if y is None:
        return None
    found = target.likelihood.observed(y, target.outputs, **target.latents)
    if len(found) != count(x):
        raise UserError(f"x and y need the same number of examples, at least 1; got {count(x)} and {len(found)}")
    return found


def check_inputs(x: object, *, first: int = 0) -> None:
    """Raise UserError unless x is a tensor [N, ...], or a tuple or dict of such, of N >= 1 examples, all finite.

    Args:
        first: number of the first example, for the message.
    """
    if not isinstance(x, Tensor | tuple | dict):
        kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}".removeprefix("builtins.")
        hint = {"numpy": "pass torch.as_tensor(x)", "pandas": "pass torch.as_tensor(x.to_numpy())"}
        advice = hint.get(kind.partition(".")[0], "or a tuple or dict of tensors")
        raise UserError(f"x must be one tensor [N, ...], got a {kind}: {advice}")
    if isinstance(x, Tensor) and x.dim() == 0:
        raise UserError(f"x must be a tensor of at least 1 example [N, ...], got shape {list(x.shape)}")
    if count(x) == 0:
        raise UserError(f"x must be a tensor of at least 1 example [N, ...], got shape {list(lead(x).shape)}")
    for name, part in _named(x, "x"):
        if bad := not_finite(part, first=first):
            raise UserError(f"{name} must be finite; {bad}")


def _named(x: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    else:
        for key, part in x.items() if isinstance(x, Mapping) else enumerate(x):
            yield from _named(part, f"{name}[{key!r}]")


def positions(keep: Any, count: int) -> Tensor:
    """The positions [K] of examples to keep, int64 on the CPU: all of them for None, those that a mask [N] marks.

    Raises:
        UserError: positions outside 0 .. count - 1, or no positions.
    """
    if keep is None:
        return torch.arange(count, device="cpu")
    kept = torch.as_tensor(keep).cpu()
    if kept.dtype == torch.bool and kept.shape == (count,):
        kept = kept.nonzero().flatten()
    kept = kept.long() if not kept.numel() else kept
    whole = kept.dim() == 1 and not (kept.is_floating_point() or kept.is_complex() or kept.dtype == torch.bool)
    if not whole or (kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < count):
        raise UserError(f"keep must be positions [K] from 0 to {count - 1}, or a mask [{count}]; got {keep!r:.80}")
    return kept.long()


def _check_parameters(owner: str, parameters: Mapping[str, Tensor]) -> None:
    for name, value in parameters.items():
        if value.is_meta:
            raise UserError(f"{name!r} of {owner} is on the meta device and has no values: load or train it first")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"{name!r} of {owner} has NaN or infinite values, so every prediction would be NaN: "
                "train again (a smaller lr, say) or restore an earlier checkpoint"
            )


def _check_moments(target: Target) -> None:
    """Raise UserError for a distribution without mean or variance, such as Cauchy's."""
    if not target.outputs.isfinite().all():
        return
    try:
        parts = target.likelihood.parts(target.outputs, **target.latents)
        lacking = [name for name, part in parts.items() if part.isnan().any()]
    except NotImplementedError:
        lacking = ["mean or variance"]
    if lacking:
        name = getattr(target.likelihood, "family", type(target.likelihood).__name__)
        low, high = float(target.outputs.min()), float(target.outputs.max())
        raise UserError(
            f"the distribution of y ({name}) has no {' and no '.join(lacking)}, by which draws are summarized, at draw "
            f"0, whose outputs are from {low:g} to {high:g}: choose one that has, or override `parts` in a Likelihood"
        )


def _run(model: Callable[..., Any], draw: Mapping[str, Tensor], x: Inputs, y: object) -> tuple[Any, GivenSites]:
    """Run the model on a few examples with a draw's values; refuse a draw that does not fit its random sites."""
    given = arguments(model, x, y)

    def in_dtype(other: Tensor) -> None:
        whole = isinstance(x, Tensor)
        inputs = other if whole else mapped(x, lambda part: part.to(other) if part.is_floating_point() else part)
        run_with(model, draw, inputs, (inputs, *given[1:]))

    try:
        outputs, sites = run_with(model, draw, x, given)
    except (RuntimeError, IndexError) as error:
        parameters = [*model.parameters()] if isinstance(model, nn.Module) else []
        for part in [x] if isinstance(x, Tensor) else [part for part in parts(x) if part.is_floating_point()]:
            refuse_dtype(part, (*parameters, *draw.values()), in_dtype)
        raise failing(x, error) from error
    except (TypeError, KeyError) as error:
        if isinstance(x, Tensor):
            _refuse_one_input(model)
            raise
        kind = f"a tuple of {len(x)}" if isinstance(x, tuple) else f"a dict of {some(x)}"
        raise UserError(
            f"{type(model).__name__} fails on x, {kind} ({type(error).__name__}: {error}): give it the inputs that its "
            "forward pass takes"
        ) from error
    if sites.lacking:
        raise UserError(f"the posterior has no draws for the network's random sites {some(sites.lacking)}; {ADVICE}")
    if others := sorted(draw.keys() - sites.given):
        raise UserError(f"the posterior has sites that the network lacks, {some(others)}; {ADVICE}")
    return outputs, sites
