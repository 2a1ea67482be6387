"""The check that likelihood, network and data go together, before any work; it needs the data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ppl_bnn.data import Split, Table, first_inputs
from ppl_bnn.data.augmentation import AUGMENTATIONS
from ppl_bnn.errors import UserError
from ppl_bnn.experiment.config import Config
from ppl_bnn.inference.memory import is_out_of_memory
from ppl_bnn.inputs import Inputs, lead
from ppl_bnn.models import Model
from ppl_bnn.models.evaluating import evaluating, forked_random
from ppl_bnn.models.labels import failing
from ppl_bnn.models.likelihoods import Likelihood
from ppl_bnn.models.likelihoods.parse import num_outputs, parse_likelihood


def likelihood_and_outputs(config: Config, num_classes: int) -> tuple[Likelihood, int]:
    """The run's likelihood, and the number of network outputs that it needs.

    Args:
        num_classes: of the targets, 0 for numbers.

    Raises:
        UserError: the likelihood does not fit such targets.
    """
    likelihood = parse_likelihood(config.model.likelihood)
    try:
        return likelihood, num_outputs(likelihood, num_classes)
    except UserError as error:
        raise UserError(
            f"model.likelihood {config.model.likelihood} does not fit data.name {config.data.name}: {error}; choose "
            "another, such as normal"
        ) from None


def checked_reading(config: Config, model: Model, train: Split, test: Split, needed: int) -> Callable[[Tensor], Tensor]:
    """How the likelihood reads targets: a function from targets [N] as they are stored to what the model observes.

    Args:
        needed: the number of outputs that the likelihood needs.

    Raises:
        UserError: settings for images with a table; a network that fails on these inputs; network outputs or targets
            that the likelihood does not take.
    """
    _check_settings(config, train)
    device = next(iter(model.parameters())).device
    first = first_inputs(train, 2, device)
    with evaluating(model), forked_random(lead(first)), fitting(config, first):
        # Only their shape counts: the prior's draws may overflow.
        outputs = torch.zeros_like(model.outputs(first)).cpu()
        latents = {name: value.cpu() for name, value in model.likelihood.latents().items()}

    def read(targets: Tensor) -> Tensor:
        return model.likelihood.observed(targets, outputs, **latents)

    names = f"model.likelihood {config.model.likelihood}"
    try:
        model.likelihood.check(outputs, **latents)
        for split in (train, test):
            read(split.targets)
    except UserError as error:
        if outputs.dim() == 2 and outputs.shape[1] == needed:
            raise UserError(f"{names} does not fit data.name {config.data.name}: {error}") from None
        raise UserError(
            f"model.name {config.model.name} gives outputs [N, {', '.join(map(str, outputs.shape[1:]))}], and {names} "
            f"needs [N, {needed}] for data.name {config.data.name}: use model.name mlp, which follows the likelihood"
        ) from None
    return read


@contextmanager
def fitting(config: Config, x: Inputs) -> Iterator[None]:
    """Context manager of a forward pass of inputs [n, ...]. Raises UserError where the run's network fails on them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What goes wrong in a network of the user's own is the user's to mend.
        raise UserError(
            f"model.name {config.model.name} does not fit data.name {config.data.name}: {failing(x, error)}"
        ) from error


def _check_settings(config: Config, data: Split) -> None:
    # Images have three dimensions, whether they are in memory or in files.
    if isinstance(data.shape, tuple) and len(data.shape) == 3:
        return
    named = config.train.augment if config.train.augment in AUGMENTATIONS else "none"
    for name, value, off in (("channels_last", config.channels_last, False), ("train.augment", named, "none")):
        if value != off:
            kind = "a table" if isinstance(data, Table) else f"inputs of shape {data.shape}"
            raise UserError(f"{name} is for images, and data.name {config.data.name} is {kind}: leave it out")
