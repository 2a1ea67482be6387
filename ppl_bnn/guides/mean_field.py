"""The mean-field Normal guide: q(w) = prod_j Normal(w_j | loc_j, scale_j) over the sites of a Pyro model."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_bnn.errors import UserError
from ppl_bnn.guides.normal import SMALLEST_SCALE, FactorizedNormal, inverse_scale
from ppl_bnn.models.listeners import attribute
from ppl_bnn.models.sites import element_support, latent_sites
from ppl_bnn.native.normals import draw_seed, normals, stream_of

InitLoc = float | str | Mapping[str, Tensor] | Callable[[str, torch.Size], Tensor]


class MeanFieldNormal(PyroModule):
    """A Normal with its own loc and scale for every weight of every latent site of `model`.

    scale = softplus(unconstrained_scale) + 1.2e-7, as TensorFlow Probability has it: softplus alone underflows to 0 in
    float32, where |loc| / scale would be infinite.

    Every parameter exists once the guide is built, so ``state_dict``, optimizers and broadcasts work before the
    first step. Building it runs the model once, with all weights 0, so that no draw of the prior can overflow in the
    network. Frozen parameters of the model stay frozen.

    Args:
        model: any Pyro model whose latent sites are real-valued.
        *args: arguments to run the model with once, to find its sites (one example is enough: ``x[:1], y[:1]``).
        init_loc: the standard deviation of loc around 0 (TensorFlow Probability's default is 0.1); ``"he"`` for
            sqrt(2 / fan_in); a mapping from site to tensor, such as the ``state_dict`` of a trained deterministic
            twin; or a function of (site, shape).
        init_scale: the scale to start from, > 0 (TensorFlow Probability's default is softplus(-3) = 0.0486).
        init_jitter: standard deviation of unconstrained_scale around that start (its default there is 0.1).
        init_relative_scale: start from scale = this * |loc| instead (MOPED: Krishnan et al. 2020, section 3), never
            below a hundredth of `init_scale`.
        **kwargs: keyword arguments for the model.

    Raises:
        UserError: a latent site that is not real-valued, an `init_loc` that lacks a site or has another shape,
            or an `init_scale` that is not positive.
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
        for site, example in _latent_sites(model, *args, **kwargs).items():
            self._sites[site] = example.shape
            loc = _initial_loc(init_loc, site, example)
            _set(self.loc, site, nn.Parameter(loc))
            scale = torch.full_like(loc, init_scale)
            if init_relative_scale is not None:
                scale = (init_relative_scale * loc.abs()).clamp_min(init_scale / 100)
            jitter = init_jitter * torch.randn_like(example)
            _set(self.unconstrained_scale, site, nn.Parameter(inverse_scale(scale) + jitter))
        # Masks of a pruned guide, as buffers: they go where it goes, and into its checkpoints.
        self.keep = PyroModule()

    @property
    def sites(self) -> list[str]:
        """The latent sites, in the model's order."""
        return list(self._sites)

    @property
    def is_pruned(self) -> bool:
        """Whether a weight's scale is exactly 0, as that of pruned weights is."""
        return any(bool((self.loc_scale(site)[1] == 0).any()) for site in self._sites)

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

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the masks of a pruned guide's state, and drop them for the state of a guide that is not pruned."""
        names = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        if any(name.startswith("keep.") for name in names):
            if not any(True for _ in self.keep.buffers()):
                self._set_masks({site: torch.ones(shape, dtype=torch.bool) for site, shape in self._sites.items()})
        elif names.issuperset(f"{part}.{site}" for site in self._sites for part in ("loc", "unconstrained_scale")):
            self.keep = PyroModule()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every site. `infer` carries the distribution to the estimators, which decide how it is used."""
        draw = {}
        for site in self._sites:
            q = self.distribution(site)
            draw[site] = pyro.sample(site, q, infer={"posterior": q})
        return draw

    @torch.no_grad()
    def draw(self, index: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw number `index` of the weights, {site: [*shape]}: the same for the same (seed, index), in any order."""
        return {site: torch.addcmul(*self.loc_scale(site), noise) for site, noise in self.noise(index, seed=seed)}

    @torch.no_grad()
    def noise(self, index: int, *, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Draw number `index` site by site as the standard normal numbers [*shape] it is made of.

        A number depends on seed, index, the site's name and its position in the contiguous site: not on dtype, device,
        memory layout or other sites.
        """
        key = draw_seed(seed, index)
        for site, shape in self._sites.items():
            noise = normals(key, shape.numel(), _get(self.loc, site), stream=stream_of(site))
            yield site, noise.view(shape)

    @torch.no_grad()
    def log_prob(self, draw: Mapping[str, Tensor]) -> Tensor:
        """log q(draw) in nats, a float64 scalar."""
        # In double precision: the sum runs over all the weights, and only the differences between draws count.
        sites = (float(self.distribution(site).log_prob(draw[site].double())) for site in self._sites)
        return torch.tensor(sum(sites), dtype=torch.double)

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


def _latent_sites(model: Callable[..., object], *args: object, **kwargs: object) -> dict[str, Tensor]:
    sites = latent_sites(model, *args, **kwargs)
    for name, site in sites.items():
        if (support := element_support(site["fn"])) is not constraints.real:
            raise UserError(
                f"site {name!r} has support {support}, and the mean-field Normal guide needs real-valued sites; "
                "if it is the observed variable, pass its values too: MeanFieldNormal(model, x[:1], y[:1])"
            )
    return {name: site["value"] for name, site in sites.items()}


def _initial_loc(init_loc: InitLoc, site: str, example: Tensor) -> Tensor:
    if isinstance(init_loc, str):
        if init_loc != "he":
            raise UserError(f"init_loc must be a number, 'he', a mapping or a function, got {init_loc!r}")
        fan_in = max(1, example[0].numel()) if example.dim() > 1 else 1
        return torch.randn_like(example) * (math.sqrt(2 / fan_in) if example.dim() > 1 else 0.0)
    if isinstance(init_loc, int | float):
        return torch.randn_like(example) * init_loc
    if isinstance(init_loc, Mapping):
        if site not in init_loc:
            raise UserError(f"init_loc has no tensor for site {site!r}; it has {sorted(init_loc)}")
        loc = init_loc[site]
    else:
        loc = init_loc(site, example.shape)
    if loc.shape != example.shape:
        raise UserError(f"init_loc of site {site!r} has shape {list(loc.shape)}, the site has {list(example.shape)}")
    return loc.detach().clone().to(example)


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
