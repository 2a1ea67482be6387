"""What `predict` and `predictor` check before the first draw: the posterior is the network's, inputs and labels fit."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior, parameters_of
from ppl_bnn.models.classifier import Classifier
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.labels import refuse_dtype
from ppl_bnn.models.likelihoods import Categorical, Likelihood
from ppl_bnn.models.param_store import own_parameters


def network_of(net: nn.Module) -> tuple[nn.Module, Likelihood]:
    """The network and the likelihood of a `Classifier`; of a bare network, itself and Categorical."""
    return (net.net, net.likelihood) if isinstance(net, Classifier) else (net, Categorical())


def check_prediction(
    net: nn.Module, posterior: Posterior, x: Tensor, likelihood: Likelihood, *, seed: int = 0
) -> Tensor:
    """Refuse by name what would fail or predict nonsense; return the outputs [n, *] of draw 0 for n <= 2 examples.

    Raises:
        UserError: `x` is no tensor [N, ...] of finite numbers or has no examples; a parameter is on the meta device
            or not finite; the posterior lacks a random site of the network, has another, or has one of another
            shape; a dtype of `x` that the forward pass does not take; outputs that the likelihood cannot take.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 and below 2^63, got {seed!r}")
    check_inputs(x)
    _check_parameters("the network", dict([*net.named_parameters(), *net.named_buffers()]))
    _check_parameters("the posterior", parameters_of(posterior))
    draw = posterior.draw(0, seed=seed)
    _check_parameters("draw 0 of the posterior", draw)
    outputs = _checked_outputs(net, draw, x[:2])
    likelihood.check(outputs)
    return outputs


def checked_targets(y: object, x: Tensor, outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """The observed y [N, ...] as the likelihood takes it. Raises UserError for other values or another length."""
    if y is None:
        raise UserError("predict needs the labels y of x; for new inputs without labels use predictor(net, guide, x)")
    found = likelihood.observed(y, outputs)
    if len(found) != len(x):
        raise UserError(f"x and y need the same number of examples, at least 1; got {len(x)} and {len(found)}")
    return found


def check_inputs(x: object) -> None:
    """Raise UserError unless x is a tensor [N, ...] of N >= 1 examples, all finite."""
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}".removeprefix("builtins.")
        hint = {"numpy": "pass torch.as_tensor(x)", "pandas": "pass torch.as_tensor(x.to_numpy())"}
        advice = hint.get(kind.partition(".")[0], "networks of one input tensor can be predicted with")
        raise UserError(f"x must be one tensor [N, ...], got a {kind}: {advice}")
    if x.dim() == 0 or len(x) == 0:
        raise UserError(f"x must be a tensor of at least 1 example [N, ...], got shape {list(x.shape)}")
    if (x.is_floating_point() or x.is_complex()) and not x.isfinite().all():
        bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten() if x.dim() > 1 else (~x.isfinite()).nonzero()
        raise UserError(
            f"x must be finite; {len(bad)} examples have NaN or infinite values, the first is {int(bad[0])}"
        )


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


def _checked_outputs(net: nn.Module, draw: Mapping[str, Tensor], x: Tensor) -> Tensor:
    sites = _GivenSites(draw)
    with evaluating(net), forked_random(x), poutine.block(), own_parameters(), sites:
        try:
            outputs = net(x)
        except RuntimeError:
            refuse_dtype(x, (*net.parameters(), *draw.values()), net)
            raise
    if sites.lacking:
        raise UserError(f"the posterior has no draws for the network's random sites {_some(sites.lacking)}; {_ADVICE}")
    if others := sorted(draw.keys() - sites.given):
        raise UserError(f"the posterior has sites that the network lacks, {_some(others)}; {_ADVICE}")
    if not isinstance(outputs, Tensor):
        raise UserError(f"the network must return one tensor [N, ...], got a {type(outputs).__name__}")
    if outputs.dim() == 0 or len(outputs) != len(x):
        raise UserError(f"the network must return one row an example, got {list(outputs.shape)} for {len(x)} examples")
    return outputs


class _GivenSites(Messenger):
    """Gives random sites their drawn values. By Pyro, which sees the sites of any network, not of our layers alone."""

    def __init__(self, draw: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.draw, self.given = draw, set[str]()
        self.lacking: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if name not in self.draw:
            self.lacking.append(name)
            return
        shape, value = msg["fn"].shape(), self.draw[name]
        if value.shape != shape:
            raise UserError(
                f"site {name!r} is {list(shape)} in the network and {list(value.shape)} in the posterior; {_ADVICE}"
            )
        self.given.add(name)
        msg["value"], msg["is_observed"] = value, True


_ADVICE = "build the guide of this network: MeanFieldNormal(model, x[:1], y[:1])"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
