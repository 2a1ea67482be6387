"""The check at the door: before the first step `fit` looks once at two examples, and refuses by name what is wrong."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ppl_bnn.devices import check_precision
from ppl_bnn.errors import UserError
from ppl_bnn.guides.estimators import Uses
from ppl_bnn.inference.elbo import GuideSites, Replay
from ppl_bnn.inference.gradient_check import check_gradients
from ppl_bnn.inference.memory import is_out_of_memory
from ppl_bnn.inference.norm_check import check_norms, note_single_values
from ppl_bnn.inference.observed import by_likelihood, check_observed, later_labels
from ppl_bnn.inputs import Inputs, lead, mapped, parts, rows
from ppl_bnn.models.evaluating import evaluating, forked_random, unchanged
from ppl_bnn.models.labels import as_tensor, failing, refuse_dtype
from ppl_bnn.models.modes import mode_setter
from ppl_bnn.models.param_store import own_parameters

# Pyro's own checks, but for the values that distributions are made with: NaN inputs are found and named by the step.
_CHECKS = {
    "validate_poutine": True, "validate_infer": True,
    "validate_distributions_pyro": False, "validate_distributions_torch": False,
}  # fmt: skip


class Training(NamedTuple):
    """What `fit` trains.

    Attributes:
        model, guide: as modules.
        x, y: inputs and labels [N, ...] in tensors; class labels are int64.
        params: the unconstrained values of ``pyro.param`` statements, by name; no module holds them.
        store: the state of Pyro's parameter store to train in, with these and the modules' own parameters.
        plain_sites: sites that have the plain draw under every estimator (`ppl_bnn.guides.estimators.Uses`).
        observed: the model's observed sites.
        labels: checks and converts the labels of later batches [B, ...].
    """

    model: nn.Module
    guide: nn.Module
    x: Inputs
    y: Tensor
    params: dict[str, Tensor]
    store: dict[str, Any]
    plain_sites: set[str]
    observed: list[str]
    labels: Callable[[Tensor], Tensor] = lambda y: y


def check_training(
    model: Callable, guide: Callable, x: Any, y: Any, *, batch_size: int, ranks: int = 1, seed: int = 0,
    precision: str = "float32",
    num_data: int | None = None, with_uses: bool = False, accumulate: int = 1,
    own_batches: bool = False,
) -> Training:  # fmt: skip
    """Run guide and model once on two examples in training mode; return everything as `fit` needs it.

    Parameters that exist only after a first call exist then. Nothing else has changed: random state, buffers, modes
    and the caller's parameter store are as they were.

    Args:
        model, guide: modules or functions, called with (x, y).
        x, y: tensors or numpy arrays [N, ...]; `x` may be a tuple or dict of them.
        batch_size: examples a step, on each of the `ranks`.
        seed: of the parameters that the first call makes.
        precision: ``bfloat16`` runs the model under torch.autocast.
        num_data: the number of examples, where `x` and `y` are only the first of them.
        with_uses: find `plain_sites`, by two more runs of the model.
        accumulate: batches an update.
        own_batches: which batches there are is not known: a loop of the user's own makes them.

    Raises:
        UserError: what would not train, or not what was meant; the message names it.
    """
    model, guide = (part if isinstance(part, nn.Module) else _Function(part) for part in (model, guide))
    parameters = [p for p in (*guide.parameters(), *model.parameters()) if p.is_floating_point() and not is_lazy(p)]
    like = parameters[0] if parameters else torch.empty(0)
    several = isinstance(x, tuple | Mapping)
    x = mapped(x, partial(as_tensor, name="x", like=like)) if several else as_tensor(x, "x", like=like)
    first = lead(x)
    like = first if first.is_floating_point() else torch.empty(0, device=first.device)
    y = as_tensor(y, "the labels or targets y", like=like)
    counts = [len(part) if part.dim() else "a number" for part in (*parts(x), y)]
    if len(set(counts)) > 1 or counts[0] in (0, "a number"):
        raise UserError(f"x and y need the same number of examples, at least 1; got {' and '.join(map(str, counts))}")
    count = num_data or len(first)
    if count < ranks:
        raise UserError(f"{count} examples are too few for {ranks} ranks: start fewer")
    _check_finite(model, guide)
    check_precision(first.device, precision)
    whole_batch = min(len(first), max(2, batch_size))
    look = partial(_look, model, guide, seed=seed, precision=precision, with_uses=with_uses)
    with _first_that_runs(look, [(rows(x, slice(few)), y[:few]) for few in (2, whole_batch)], parameters) as seen:
        _check_sites(model, seen)
        whole = ranks == 1 and batch_size >= count
        labels: Callable[[Tensor], Tensor] = lambda y: y  # noqa: E731
        for site in seen.model.nodes.values():
            if site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site):
                convert = by_likelihood(model, seen.model.nodes, seen.outputs)
                is_y = site["value"] is seen.y
                y = check_observed(site, seen.y, y, num_data=count, whole_batch=whole, convert=convert)
                labels = later_labels(site, convert) if is_y else labels
        if not own_batches:
            check_norms(seen.norms, count, batch_size * (accumulate if batch_size > 1 else 1), ranks)
        known = [*model.parameters(), *guide.parameters(), *seen.params.values(), *parts(x), y]
        check_gradients(model, seen.guide, seen.model, known)
    observed = [
        name
        for name, site in seen.model.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site)
    ]
    return Training(model, guide, x, y, seen.params, seen.store, seen.plain_sites, observed, labels)


@contextmanager
def _first_that_runs(
    look: Callable, batches: list[tuple[Inputs, Tensor]], parameters: list[nn.Parameter]
) -> Iterator["_Seen"]:
    """A look at two examples, or at a whole batch for a model that takes no other (a plate of a fixed size, say)."""
    with ExitStack() as scopes:
        try:
            seen = scopes.enter_context(look(*batches[0]))
        except UserError:
            raise
        except TypeError as error:
            if isinstance(batches[0][0], Tensor):
                raise
            kind = type(batches[0][0]).__name__
            raise UserError(
                f"x is a {kind} of tensors, and the network does not take it ({error}): a dict is passed by the names "
                "of forward's arguments, a tuple by position, and either as one argument where these do not fit"
            ) from error
        except (ValueError, RuntimeError, IndexError):
            x, y = batches[1]
            try:
                seen = scopes.enter_context(look(x, y))
            except (RuntimeError, IndexError) as error:
                refuse_dtype(x, parameters, lambda other: scopes.enter_context(look(other, y)))
                if is_out_of_memory(error):
                    raise
                raise failing(x, error) from error
        yield seen


class _Seen(NamedTuple):
    guide: dict[str, dict]
    model: Trace
    y: Tensor
    norms: list[str]
    params: dict[str, Tensor]
    store: dict[str, Any]
    outputs: Any
    plain_sites: set[str]


class _Function(nn.Module):
    """A Pyro function as a module without parameters of its own."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.function(*args, **kwargs)


@contextmanager
def _look(
    model: nn.Module, guide: nn.Module, x: Inputs, y: Tensor, *, seed: int, precision: str, with_uses: bool
) -> Iterator[_Seen]:
    # A copy, for a network that changes its input in place.
    few = mapped(x, torch.clone), y
    set_mode, norms = mode_setter(model), []  # type: ignore[var-annotated]
    with ExitStack() as scopes:
        scopes.enter_context(own_parameters())
        scopes.enter_context(forked_random(x, y))
        scopes.enter_context(torch.enable_grad())
        scopes.enter_context(pyro.settings.context(**_CHECKS))
        scopes.enter_context(torch.autocast(y.device.type, torch.bfloat16, enabled=precision == "bfloat16"))
        torch.manual_seed(seed)
        if any(is_lazy(part) for each in (model, guide) for part in (*each.parameters(), *each.buffers())):
            # In evaluation mode, in which batch norm's new statistics stay what they start as.
            with evaluating(model):
                guide(*few)
                model(*few)
        _check_initialized(model, guide)
        scopes.enter_context(unchanged(model, guide))
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                note = note_single_values(path, len(y), norms)
                hook = module.register_forward_pre_hook(note, with_kwargs=True)
                scopes.callback(hook.remove)
        set_mode(True)
        with GuideSites() as sampled:
            guide(*few)
        # As a context, it adds no lines to a message.
        with _SameShapes(sampled.sites), poutine.trace() as recorded:
            outputs = model(*few)
        store: dict[str, Any] = pyro.get_param_store().get_state()  # type: ignore[assignment]
        own = {id(parameter) for part in (model, guide) for parameter in part.parameters()}
        params = {name: value for name, value in store["params"].items() if id(value) not in own}
        uses = _uses(model, sampled.sites, *few) if with_uses else set()
        yield _Seen(sampled.sites, recorded.trace, few[1], norms, params, store, outputs, uses)


def _uses(model: nn.Module, sites: dict[str, dict], x: Inputs, y: Tensor) -> set[str]:
    with torch.no_grad(), poutine.block(), Uses() as uses, Replay(sites):
        for few in ([0, 1], [0, 1, 1]) if len(y) == 2 else (slice(None),):
            model(rows(x, few), y[few])
    return uses.plain_sites


class _SameShapes(Replay):
    """Gives the model the guide's values, unless they have other shapes."""

    def _pyro_sample(self, msg: dict) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.sites and msg["done"] and not site_is_subsample(msg):
            shapes = list(msg["value"].shape), list(msg["fn"].shape())
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"the guide's site {msg['name']!r} has shape {shapes[0]} and the model's has {shapes[1]}: "
                    "build the guide from this model"
                )


def _check_finite(model: nn.Module, guide: nn.Module) -> None:
    for owner, part in (("guide", guide), ("model", model)):
        for name, value in part.named_parameters():
            if not is_lazy(value) and not torch.isfinite(value).all():
                raise UserError(
                    f"the parameter {name} of the {owner} is not finite: it holds NaN or infinite values before the "
                    "first step; build it again, or load a good checkpoint"
                )


def _check_initialized(model: nn.Module, guide: nn.Module) -> None:
    for part in (model, guide):
        for name, value in (*part.named_parameters(), *part.named_buffers()):
            if isinstance(value, UninitializedParameter | UninitializedBuffer):
                raise UserError(
                    f"{name} is uninitialized after a call of the model: no forward pass reaches its layer; remove it"
                )


def _check_sites(model: nn.Module, seen: _Seen) -> None:
    latent = {
        name: site
        for name, site in seen.model.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }
    for name in (name for name in latent if name not in seen.guide):
        raise UserError(
            f"the guide has no site {name!r}, which the model samples in training mode, so it would stay at its prior: "
            "build the guide from this model (in the same mode)"
        )
    for name, site in seen.guide.items():
        if site_is_subsample(site) or site["is_observed"]:
            continue
        kind = type(site["fn"]).__name__
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise UserError(
                f"the guide samples {name!r}, which is no latent site of the model in training mode: "
                "build the guide from this model"
            )
        if not site["fn"].has_rsample:
            raise UserError(
                f"the guide samples {name!r} from a {kind}, which is not reparameterized, so its gradient would be "
                "wrong: use a distribution that has_rsample, such as Normal"
            )
    for path, module in model.named_modules():
        for attribute in getattr(module, "_pyro_samples", ()):
            name = f"{module._pyro_name}.{attribute}" if module._pyro_name else attribute
            if name not in seen.model.nodes:
                raise UserError(
                    f"no forward pass in training mode reaches the random parameter {attribute!r} of layer {path!r}: "
                    "remove the layer, or leave it deterministic"
                )
