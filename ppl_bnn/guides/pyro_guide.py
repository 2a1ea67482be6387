"""Any Pyro guide as a `Posterior`: an autoguide, a PyroModule, or a function with ``pyro.param`` statements."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_bnn.errors import UserError
from ppl_bnn.guides.posterior import Posterior
from ppl_bnn.models.evaluating import evaluating, forked_random, seed_random
from ppl_bnn.models.param_store import own_parameters
from ppl_bnn.models.sites import latent_sites, random_parameters
from ppl_bnn.native.normals import draw_seed, stream_of


def as_posterior(
    guide: Posterior | Callable[..., object],
    x: Tensor,
    y: Tensor | None = None,
    *,
    model: Callable[..., object] | None = None,
) -> Posterior:
    """Return a posterior as it is, and a Pyro guide as a `PyroGuide`; the arguments are its.

    Raises:
        UserError: it is neither.
    """
    if isinstance(guide, Posterior):
        return guide
    if callable(guide):
        return PyroGuide(guide, x, y, model=model)
    raise UserError(
        f"the posterior is a {type(guide).__name__}: give one with sites and draw (ppl_bnn.guides.posterior), such as "
        "MeanFieldNormal, or a Pyro guide, which is called as guide(x, y)"
    )


class PyroGuide(nn.Module):
    """A Pyro guide's draws by number, as they are at the time of the draw: a guide that is trained on has new ones.

    Each sample statement is seeded by (seed, index, site name), so that a draw of a site that does not read the data
    depends on nothing else. Auxiliary sites are left out. Sites of single examples, in a plate as large as the batch,
    are drawn by `draw_local`. The guide runs in evaluation mode, without gradients, and leaves torch's generator and
    Pyro's parameter store alone. Values of its ``pyro.param`` statements are those of the caller's store, which copies
    of this posterior share; they do not follow ``.to()``.

    Args:
        guide: called as guide(x, y). One that was never called, as an autoguide before its training, is called here.
        x, y: examples [n, ...] and labels [n] or None, as for the model. The first and last are kept, to call the guide
            with for a draw, unless it takes no other number than n.
        model: tells weights from latents (`ppl_bnn.models.sites.random_parameters`); called as model(x, y). Without a
            model all sites count as weights.

    Raises:
        UserError: the guide lacks a site of the model.
    """

    def __init__(
        self,
        guide: Callable[..., object],
        x: Tensor,
        y: Tensor | None = None,
        *,
        model: Callable[..., object] | None = None,
    ) -> None:
        super().__init__()
        self.guide = guide
        few = x[[0, -1]], None if y is None else y[[0, -1]]
        try:
            sites = self._run(*few)
            local = _local(sites, 2) & _local(self._run(*(None if part is None else part[:1] for part in few)), 1)
        except (ValueError, RuntimeError, IndexError):
            # The guide may have a plate of a fixed size.
            few = x, y
            sites = self._run(*few)
            local = _local(sites, len(x))
        self.x: Tensor
        self.y: Tensor | None
        self.register_buffer("x", few[0], persistent=False)
        self.register_buffer("y", few[1], persistent=False)
        _check_plates(sites, local)
        self.local = [name for name in sites if name in local]
        weights = [name for name in sites if name not in local]
        if model is not None:
            latent = latent_sites(model, *few)
            # Without y, the observed site is among them.
            if y is not None and (lacking := [name for name in latent if name not in sites]):
                raise UserError(f"the guide has no site {lacking[0]!r}, which the model samples; it has {list(sites)}")
            weights = [name for name in random_parameters(latent) if name in weights]
        self.sites = weights
        self.latents = [name for name in sites if name not in local and name not in weights]

    @torch.no_grad()
    def draw(self, index: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw number `index` of weights and latents, {site: [*shape]}: of (seed, index) alone, in any order."""
        sites = self._run(self.x, self.y, index=index, seed=seed)
        return {name: sites[name]["value"].clone() for name in (*self.sites, *self.latents)}

    def draw_latents(self, index: int, *, seed: int = 0, sign: float = 1.0) -> dict[str, Tensor]:
        """The latents of draw number `index`, {site: [*shape]}.

        Raises:
            UserError: sign is not 1: a guide's draw has no mirror image.
        """
        if sign != 1:
            raise UserError("a mirror image needs a posterior with noise; a Pyro guide has none: draw independently")
        draw = self.draw(index, seed=seed) if self.latents else {}
        return {name: draw[name] for name in self.latents}

    def draw_local(self, index: int, x: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """The local latents of examples x [n, ...] in draw number `index`, {site: [n, ...]}; the guide has y = None.

        Their noise depends on an example's position in `x`: pass all examples at once, or another seed for each batch.
        """
        if not self.local:
            return {}
        sites = self._run(x, None, index=index, seed=seed, given=self.draw(index, seed=seed))
        return {name: sites[name]["value"].clone() for name in self.local}

    def _run(
        self,
        x: Tensor | None,
        y: Tensor | None,
        *,
        index: int = 0,
        seed: int = 0,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """The messages of the guide's sites, without auxiliary ones, in its draw of that number."""
        seeded = _Seeded(draw_seed(seed, index), given or {}, x)
        with evaluating(self.guide), forked_random(x), poutine.block(), own_parameters(), seeded:
            seed_random(seeded.key, x)
            self.guide(x, y)
        return seeded.sites

    def __deepcopy__(self, memo: dict[int, Any]) -> "PyroGuide":
        # The transforms of a flow keep tensors of their last call; those of a training step could not be copied.
        self.draw(0)
        parts = [part for part in self.modules() if isinstance(part, AutoGuide)]
        # An autoguide forgets its model and its list when it is copied, the original too. Its trace may hold gradients.
        references = [(part._model, part.master) for part in parts]
        memo |= {id(part.prototype_trace): part.prototype_trace for part in parts}
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        for part, (model, master) in zip(parts, references, strict=True):
            part._model, part.master = model, master
        copies = (part for part in other.modules() if isinstance(part, AutoGuide))
        for part, (model, _) in zip(copies, references, strict=True):
            part._model = model
        return other


class _Seeded(Messenger):
    """Pyro handler: seeds torch's generator for each sample statement, and notes the guide's sites."""

    def __init__(self, key: int, given: Mapping[str, Tensor], like: Tensor | None) -> None:
        super().__init__()
        self.key, self.given, self.like = key, given, like
        self.sites: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.given:
            msg["value"], msg["done"] = self.given[msg["name"]], True
        seed_random(self.key ^ stream_of(msg["name"]) >> 1, self.like)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("is_auxiliary")):
            self.sites[msg["name"]] = msg


def _local(sites: Mapping[str, dict[str, Any]], examples: int) -> set[str]:
    """The sites in a plate of so many examples."""
    return {name for name, site in sites.items() if any(frame.size == examples for frame in site["cond_indep_stack"])}


def _check_plates(sites: Mapping[str, dict[str, Any]], local: set[str]) -> None:
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            if name not in local and frame.full_size not in (None, frame.size):
                raise UserError(
                    f"the guide's site {name!r} lies in plate {frame.name!r} of size {frame.full_size}, of which a "
                    f"call sees {frame.size} whatever x is: give the autoguide create_plates for that plate"
                )
