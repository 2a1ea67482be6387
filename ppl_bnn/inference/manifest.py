"""The manifest of a training: its layers in order, and what each is called in a checkpoint."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from ppl_bnn.files import write_text
from ppl_bnn.guides.latents import parameter_name
from ppl_bnn.guides.posterior import Posterior, latents_of
from ppl_bnn.models.priors import prior_text
from ppl_bnn.models.random_network import point_state, random_sites

MANIFEST = "manifest.json"


def write_manifest(
    folder: Path, model: nn.Module, guide: nn.Module, params: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``manifest.json`` into a folder, atomically; arguments as in `manifest`."""
    write_text(folder / MANIFEST, json.dumps(manifest(model, guide, params), indent=2) + "\n")


def manifest(model: nn.Module, guide: nn.Module, params: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Describe what a checkpoint of `model` and `guide` holds, as JSON.

    `parameters` lists it in one order, that of the model's modules. Each entry has a name, a kind and a shape:

    - ``random``: a site of a mean-field guide, with its prior, and the names of its loc and unconstrained scale among
      the checkpoint's tensors: scale = softplus(unconstrained scale) + 1.2e-7. A pruned site has a mask `keep` too.
    - ``latent``: another site of a mean-field guide, such as a noise scale, with the loc and unconstrained scale of its
      unconstrained value.
    - ``point estimate`` and ``buffer``: a parameter or a buffer of the model, with the name of its `tensor`.
    - ``guide`` and ``pyro.param``: what other guides learn, with the name of its `tensor`. These come last.

    `layers` has the random ones alone, by `site`, with their number of `weights`. `point_estimates` is {name: shape} of
    the model's tensors.

    Args:
        params: the values of ``pyro.param`` statements by name, which no module holds.
    """
    latents = {parameter_name(site): site for site in latents_of(guide)} if isinstance(guide, Posterior) else {}
    found = _random(model, guide)
    random = {site: entry for site, entry in found.items() if site not in latents}
    own = {name: list(value.shape) for name, value in point_state(model).items()}
    ordered = [
        *_in_the_models_order(model, random, own),
        *({"name": latents[site], "kind": "latent", **entry} for site, entry in found.items() if site in latents),
        *_others(guide, found),
        *({"name": name, "kind": "pyro.param", "shape": list(value.shape), "tensor": f"params.{name}"}
          for name, value in (params or {}).items()),
    ]  # fmt: skip
    return {
        "parameters": ordered,
        "layers": [{"site": site, **entry} for site, entry in random.items()],
        "weights": sum(entry["weights"] for entry in random.values()),
        "point_estimates": {f"model.{name}": shape for name, shape in own.items()},
    }


def _random(model: nn.Module, guide: nn.Module) -> dict[str, dict[str, Any]]:
    """The sites that have a loc and an unconstrained scale, in the guide's order."""
    state, priors = guide.state_dict(), {site: prior for _, site, prior in _priors(model)}
    found: dict[str, dict[str, Any]] = {}
    for name, loc in state.items():
        part, _, site = name.partition(".")
        if part == "loc" and f"unconstrained_scale.{site}" in state:
            entry = {"shape": list(loc.shape), "weights": loc.numel(), "prior": priors.get(site)}
            found[site] = entry | {
                part: f"guide.{part}.{site}"
                for part in ("loc", "unconstrained_scale", "keep")
                if f"{part}.{site}" in state
            }
    return found


def _priors(model: nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """(path of its module, site, prior) of each random parameter of the model's modules."""
    for site, (path, random) in random_sites(model).items():
        yield path.rpartition(".")[0], site, prior_text(random.prior)
    # Those of modules that Pyro's own means made.
    for path, module in model.named_modules():
        for attribute, prior in getattr(module, "_pyro_samples", {}).items():
            text = prior_text(prior) if isinstance(prior, TorchDistributionMixin) else None
            yield path, f"{module._pyro_name}.{attribute}".lstrip("."), text


def _in_the_models_order(
    model: nn.Module, random: Mapping[str, dict[str, Any]], own: Mapping[str, list[int]]
) -> list[dict[str, Any]]:
    learnt = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places: dict[str, list[dict[str, Any]]] = {path: [] for path, _ in model.named_modules(remove_duplicate=False)}
    at = {site: path for path, site, _ in _priors(model)}
    last: list[dict[str, Any]] = []
    for site, entry in random.items():
        # A weight that is no parameter of a module comes after all modules.
        (places[at[site]] if site in at else last).append({"name": site, "kind": "random", **entry})
    for name, shape in own.items():
        kind = "point estimate" if name in learnt else "buffer"
        places[name.rpartition(".")[0]].append({"name": name, "kind": kind, "shape": shape, "tensor": f"model.{name}"})
    return [entry for entries in (*places.values(), last) for entry in entries]


def _others(guide: nn.Module, random: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    known = {tensor for entry in random.values() for tensor in entry.values() if isinstance(tensor, str)}
    return [
        {"name": name, "kind": "guide", "shape": list(value.shape), "tensor": f"guide.{name}"}
        for name, value in guide.state_dict().items()
        if f"guide.{name}" not in known
    ]
