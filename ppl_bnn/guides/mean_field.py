"""The mean-field Normal guide: q(w) = prod_j Normal(w_j | loc_j, scale_j) over the sites of a Pyro model.

A site that is no weight and not real-valued has a Normal on an unconstrained scale (`ppl_bnn.guides.latents`).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.latents import INIT_SCALE, Latent, check_plates, parameter_name
from ppl_bnn.guides.normal import SMALLEST_SCALE, FactorizedNormal, inverse_scale
from ppl_bnn.models.listeners import attribute
from ppl_bnn.models.sites import latent_sites, random_parameters
from ppl_bnn.native.normals import draw_seed, normals, stream_of

InitLoc = float | str | Mapping[str, Tensor] | Callable[[str, torch.Size], Tensor | None]


class MeanFieldNormal(PyroModule):
    """A Normal with its own loc and scale for every weight, and for every other latent site, of `model`.

    scale = softplus(unconstrained_scale) + 1.2e-7, as TensorFlow Probability has it: softplus alone underflows to 0 in
    float32, where |loc| / scale would be infinite.

    `sites` are the network's random weights. `latents` are all other latent sites: a noise scale, a temperature, a
    hyper-prior. In a model without Bayesian layers, which samples its weights by hand, every real-valued site is a
    weight. A latent of bounded support has the Normal on an unconstrained scale, through ``biject_to(support)``: its
    guide is that of Pyro's `AutoNormal`. It starts at the prior's median with scale 0.1 there. Latents are never
    pruned, and have no signal-to-noise ratio.

    Every parameter exists once the guide is built, so ``state_dict``, optimizers and broadcasts work before the
    first step. Building it runs the model once, with all weights 0, so that no draw of the prior can overflow in the
    network. Frozen parameters of the model stay frozen.

    Args:
        model: any Pyro model whose latent sites are continuous and not those of single examples.
        *args: arguments to run the model with once, to find its sites (one example is enough: ``x[:1], y[:1]``).
        init_loc: the standard deviation of a weight's loc around 0 (TensorFlow Probability's default is 0.1); ``"he"``
            for sqrt(2 / fan_in); a mapping from site to tensor, such as the ``state_dict`` of a trained deterministic
            twin; or a function of (site, shape). A mapping or function may have values of latents, in their support;
            it may lack them, or return None.
        init_scale: the scale of weights to start from, > 0 (TensorFlow Probability's default is softplus(-3) = 0.0486).
        init_jitter: standard deviation of a weight's unconstrained_scale around that start (its default there is 0.1).
        init_relative_scale: start weights from scale = this * |loc| instead (MOPED: Krishnan et al. 2020, section 3),
            never below a hundredth of `init_scale`.
        **kwargs: keyword arguments for the model.

    Raises:
        UserError: a discrete latent site, or a weight in the data plate; an `init_loc` that lacks a weight, has another
            shape, or lies outside a latent's support; or an `init_scale` that is not positive.
    """

    def __init__(
        self,
        model: Callable[..., object],
        *args: object,
        init_loc: InitLoc = 0.1,
        init_scale: float = 0.0486,
        init_jitter: float = 0.1,
        init_relative_scale: float | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if not (math.isfinite(init_scale) and init_scale > SMALLEST_SCALE):
            raise UserError(f"init_scale must be above {SMALLEST_SCALE} and finite, got {init_scale}")
        if init_jitter < 0:
            raise UserError(f"init_jitter must be at least 0, got {init_jitter}")
        if init_relative_scale is not None and not 0 < init_relative_scale < math.inf:
            raise UserError(f"init_relative_scale must be positive and finite, got {init_relative_scale}")
        self.loc, self.unconstrained_scale = PyroModule(), PyroModule()
        self._sites: dict[str, torch.Size] = {}
        found = latent_sites(model, *args, **kwargs)
        self._order = list(found)
        weights = random_parameters(found)
        self._latents = {site: Latent.of(message) for site, message in found.items() if site not in weights}
        for message in found.values():
            check_plates(message)
        for site in weights:
            example = found[site]["value"]
            self._sites[site] = example.shape
            loc = _initial_loc(init_loc, site, example)
            _set(self.loc, site, nn.Parameter(loc))
            scale = torch.full_like(loc, init_scale)
            if init_relative_scale is not None:
                scale = (init_relative_scale * loc.abs()).clamp_min(init_scale / 100)
            jitter = init_jitter * torch.randn_like(example)
            _set(self.unconstrained_scale, site, nn.Parameter(inverse_scale(scale) + jitter))
        for site, latent in self._latents.items():
            loc = latent.start(found[site], _given(init_loc, site, latent.shape))
            _set(self.loc, parameter_name(site), nn.Parameter(loc))
            scale = inverse_scale(torch.full_like(loc, INIT_SCALE))
            _set(self.unconstrained_scale, parameter_name(site), nn.Parameter(scale))
        # Masks of a pruned guide, as buffers: they go where it goes, and into its checkpoints.
        self.keep = PyroModule()

    @property
    def sites(self) -> list[str]:
        """The network's random weights, in the model's order."""
        return list(self._sites)

    @property
    def latents(self) -> list[str]:
        """The other latent sites, in the model's order."""
        return list(self._latents)

    @property
    def is_pruned(self) -> bool:
        """Whether a weight's scale is exactly 0, as that of pruned weights is."""
        return any(bool((self.loc_scale(site)[1] == 0).any()) for site in self._sites)

    @property
    def is_masked(self) -> bool:
        """Whether the guide has masks, as one that `pruned` made has."""
        return any(True for _ in self.keep.buffers())

    def loc_scale(self, site: str) -> tuple[Tensor, Tensor]:
        """loc and scale of one site, each of the site's shape; both exactly 0 where the guide was pruned."""
        found = self.distribution(site)
        return found.loc, found.scale

    def distribution(self, site: str) -> FactorizedNormal:
        """q of one site, over all its weights."""
        loc, unconstrained_scale = (_get(self._modules[part], site) for part in ("loc", "unconstrained_scale"))
        masks: PyroModule = self._modules["keep"]  # type: ignore[assignment]
        pruned = masks._modules or masks._buffers
        return FactorizedNormal(loc, unconstrained_scale, _get(masks, site) if pruned else None)

    def parameters_of(self, site: str) -> tuple[nn.Parameter, nn.Parameter]:
        """loc and unconstrained scale of one site, as they are trained."""
        loc, unconstrained_scale = (
            self.get_submodule(part).get_parameter(site) for part in ("loc", "unconstrained_scale")
        )
        return loc, unconstrained_scale

    def unconstrained_loc_scale(self, latent: str) -> tuple[Tensor, Tensor]:
        """loc and scale of a latent's unconstrained value: the logarithm, say, of a positive one."""
        name = parameter_name(latent)
        loc, unconstrained_scale = (_get(self._modules[part], name) for part in ("loc", "unconstrained_scale"))
        return loc, nn.functional.softplus(unconstrained_scale) + SMALLEST_SCALE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MeanFieldNormal":
        for latent in self._latents.values():
            latent.apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the masks of a pruned guide's state, and drop them for the state of a guide that is not pruned."""
        names = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        if any(name.startswith("keep.") for name in names):
            if not self.is_masked:
                self._set_masks({site: torch.ones(shape, dtype=torch.bool) for site, shape in self._sites.items()})
        elif names.issuperset(f"{part}.{site}" for site in self._sites for part in ("loc", "unconstrained_scale")):
            self.keep = PyroModule()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every site, in the model's order (Pyro's `TraceMeanField_ELBO` wants that).

        `infer` carries a weight's distribution to the estimators, which decide how it is used.
        """
        draw: dict[str, Tensor] = {}
        plates: dict[str, pyro.plate] = {}
        for site in self._order:
            if site in self._latents:
                draw[site] = self._latents[site].sample(*self.unconstrained_loc_scale(site), plates)
            else:
                q = self.distribution(site)
                draw[site] = pyro.sample(site, q, infer={"posterior": q})
        return draw

    @torch.no_grad()
    def draw(self, index: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw number `index` of weights and latents, {site: [*shape]}: of (seed, index) alone, in any order."""
        weights = {site: torch.addcmul(*self.loc_scale(site), noise) for site, noise in self.noise(index, seed=seed)}
        return weights | self.draw_latents(index, seed=seed)

    @torch.no_grad()
    def draw_latents(self, index: int, *, seed: int = 0, sign: float = 1.0) -> dict[str, Tensor]:
        """The latents of draw number `index`, {site: [*shape]}; their noise is made as that of weights is (`noise`).

        Args:
            sign: -1 for the draw's mirror image on the unconstrained scale.
        """
        key, draw = draw_seed(seed, index), {}
        for site, latent in self._latents.items():
            loc, scale = self.unconstrained_loc_scale(site)
            noise = normals(key, loc.numel(), loc, stream=stream_of(site)).view(loc.shape)
            draw[site] = latent.transform(torch.addcmul(loc, scale, noise, value=sign))
        return draw

    @torch.no_grad()
    def noise(self, index: int, *, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The weights of draw number `index`, site by site, as the standard normal numbers [*shape] they are made of.

        A number depends on seed, index, the site's name and its position in the contiguous site: not on dtype, device,
        memory layout or other sites.
        """
        key = draw_seed(seed, index)
        for site, shape in self._sites.items():
            noise = normals(key, shape.numel(), _get(self.loc, site), stream=stream_of(site))
            yield site, noise.view(shape)

    @torch.no_grad()
    def log_prob(self, draw: Mapping[str, Tensor]) -> Tensor:
        """log q(draw) in nats, a float64 scalar; of latents it is the density of the values in their support."""
        # In double precision: the sum runs over all the weights, and only the differences between draws count.
        sites = (float(self.distribution(site).log_prob(draw[site].double())) for site in self._sites)
        latents = (
            float(latent.log_prob(*self.unconstrained_loc_scale(site), draw[site]))
            for site, latent in self._latents.items()
        )
        return torch.tensor(sum(sites) + sum(latents), dtype=torch.double)

    def pruned(self, keep: Mapping[str, Tensor]) -> "MeanFieldNormal":
        """A copy whose weights outside `keep` ({site: bool [*shape]}) have loc 0 and scale 0 in every draw.

        Raises:
            UserError: a site is missing from `keep` or its mask has another shape.
        """
        for site, shape in self._sites.items():
            if site not in keep or keep[site].shape != shape:
                found = list(keep[site].shape) if site in keep else "none"
                raise UserError(f"site {site!r} needs a mask of shape {list(shape)}, got {found}")
        other = copy.deepcopy(self)
        other._set_masks(keep)
        return other

    @torch.no_grad()
    def as_prior(self) -> dict[str, Normal]:
        """This posterior as the prior of a network with the same sites, {site: Normal(loc, scale)}: sequential Bayes.

        For ``bayesian(net, prior=guide.as_prior())``, as copies that train no further. Sites that are no weights of the
        network (a noise scale, hyper-parameters) are left out.

        Raises:
            UserError: the guide is pruned: a weight that is fixed at 0 has no density that a prior could have.
        """
        if self.is_pruned:
            raise UserError(
                "a pruned posterior cannot be a prior: its weights at 0 have scale 0; take the prior before pruning, "
                "and prune the new posterior"
            )
        return {site: Normal(*(part.clone() for part in self.loc_scale(site))) for site in self.sites}

    def _set_masks(self, keep: Mapping[str, Tensor]) -> None:
        self.keep = PyroModule()
        for site in self._sites:
            _set(self.keep, site, keep[site].to(_get(self.loc, site).device, torch.bool))


def _initial_loc(init_loc: InitLoc, site: str, example: Tensor) -> Tensor:
    if isinstance(init_loc, str):
        if init_loc != "he":
            raise UserError(f"init_loc must be a number, 'he', a mapping or a function, got {init_loc!r}")
        fan_in = max(1, example[0].numel()) if example.dim() > 1 else 1
        return torch.randn_like(example) * (math.sqrt(2 / fan_in) if example.dim() > 1 else 0.0)
    if isinstance(init_loc, int | float):
        return torch.randn_like(example) * init_loc
    loc = _given(init_loc, site, example.shape)
    if loc is None:
        has = f"it has {sorted(init_loc)}" if isinstance(init_loc, Mapping) else "the function returned None"
        raise UserError(f"init_loc has no tensor for site {site!r}; {has}")
    if loc.shape != example.shape:
        raise UserError(f"init_loc of site {site!r} has shape {list(loc.shape)}, the site has {list(example.shape)}")
    return loc.detach().clone().to(example)


def _given(init_loc: InitLoc, site: str, shape: torch.Size) -> Tensor | None:
    """The value of a site in an `init_loc` that is a mapping or a function, if it has one."""
    if isinstance(init_loc, Mapping):
        return init_loc.get(site)
    return init_loc(site, shape) if callable(init_loc) else None


def _set(root: nn.Module, path: str, value: Tensor) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, PyroModule())
        root = getattr(root, parent)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)


def _get(root: PyroModule, path: str) -> Tensor:
    *parents, name = path.split(".")
    for parent in parents:
        root = root._modules[parent]
    return attribute(root, name)  # type: ignore[no-any-return]
