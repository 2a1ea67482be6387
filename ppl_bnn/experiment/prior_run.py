"""The posterior of a finished run as the prior of another: ``model.prior_from``."""

from pathlib import Path
from typing import Any, NamedTuple

from pyro.distributions import Normal

from ppl_bnn.errors import FileError
from ppl_bnn.guides.normal import softplus
from ppl_bnn.inference import checkpoint

_ADVICE = "model.prior_from takes the out folder of a finished run, or one of its checkpoints"


class PriorRun(NamedTuple):
    """A run's posterior as a prior.

    Attributes:
        prior: {site: Normal(loc, scale)} of the network's random weights.
        origin: the step of the checkpoint and its checksum (crc32), which a run that has this prior remembers.
    """

    prior: dict[str, Normal]
    origin: dict[str, Any]


def read_prior(path: str) -> PriorRun:
    """The posterior in the last checkpoint of an out folder, or in a checkpoint.

    Raises:
        FileError: there is no such checkpoint, or it is damaged; the run is unfinished, its network deterministic, or
            its posterior pruned.
    """
    state = checkpoint.load(checkpoint.located(Path(path)), advice=_ADVICE)
    guide = state.part("guide")
    if any(name.startswith("keep.") for name in guide):
        raise FileError(
            f"model.prior_from {path} has a pruned posterior, whose weights at 0 have no density: {_ADVICE}"
        )
    if Path(path).is_dir() and state.step < state.meta.get("steps", 0):
        raise FileError(
            f"model.prior_from {path} is not finished (step {state.step} of {state.meta['steps']}): "
            "finish its training, or name the checkpoint itself"
        )
    # A posterior's other sites (hyper-parameters, a noise scale) are no weights. Version 0.1.0 had none, and no list.
    weights = state.meta["priors"] or [name[len("loc.") :] for name in guide if name.startswith("loc.")]
    sites = [name.removeprefix("net.") for name in weights]
    names = {site: (f"loc.{site}", f"unconstrained_scale.{site}") for site in sites}
    if not sites or any(name not in guide for pair in names.values() for name in pair):
        raise FileError(f"model.prior_from {path} has no Normal posterior of random weights; {_ADVICE}")
    prior = {site: Normal(guide[loc], softplus(guide[scale])) for site, (loc, scale) in names.items()}
    return PriorRun(prior, {"step": state.step, "crc32": state.meta["crc32"]})
