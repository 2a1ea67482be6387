"""What `fit` needs of several ranks: one state to start from, own noise, and numbers of a step that all agree on."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppl_bnn.data.fingerprints import without_times
from ppl_bnn.distributed import Communicator
from ppl_bnn.errors import UserError
from ppl_bnn.inference.checkpoint import Checkpoint, random_state, restore, restore_random
from ppl_bnn.inference.elbo import Terms
from ppl_bnn.inference.settings import TrainSettings
from ppl_bnn.models.random_network import point_parameters, point_state
from ppl_bnn.native.normals import draw_seed

log = logging.getLogger(__name__)


class Agreed(NamedTuple):
    """Steps as all ranks see them, and what is to be done next.

    Attributes:
        found: of each step, its terms and right answers over the global batch.
    """

    found: list[tuple[Terms, float]]
    stop: bool
    save: bool


def agree(communicator: Communicator, found: Sequence[tuple[Terms, float]], *, stop: bool, save: bool) -> Agreed:
    """One message: of each step the terms' means over the ranks, and whether any of them wants to stop or save.

    A loss is NaN or infinite for all where it is for one.
    """
    if communicator.size == 1:
        return Agreed(list(found), stop, save)
    numbers = [number for terms, correct in found for number in (terms.loss, terms.nll, terms.kl, correct)]
    *numbers, stops, saves = communicator.sum(*numbers, stop, save, kind="step")
    steps = [numbers[at : at + 4] for at in range(0, len(numbers), 4)]
    means = [(Terms(*(part / communicator.size for part in parts)), correct) for *parts, correct in steps]
    return Agreed(means, stops > 0, saves > 0)


def report(communicator: Communicator, text: str, loss: float) -> str:
    """What the rank that went bad has to say, or rank 0 where all their losses are finite."""
    if communicator.size == 1:
        return text
    bad = communicator.gather(torch.tensor([not math.isfinite(loss)], dtype=torch.int64))[:, 0].tolist()
    root = bad.index(1) if 1 in bad else 0
    return f"{communicator.share(text, root=root)}, on rank {root} of {communicator.size}"


def log_messages(ranks: Communicator, steps: int) -> None:
    """Log how many sums the ranks made a step, and how large they were."""
    sums = [calls for kind, calls in ranks.calls.items() if kind != "broadcast"]
    each, megabytes = (sum(n) / steps for n in zip(*((c.count, c.bytes / 1e6) for c in sums), strict=True))
    log.info("%d ranks over %s: %.1f allreduces and %.1f MB a step", ranks.size, ranks.name, each, megabytes)


def rank_seed(seed: int, rank: int) -> int:
    """The seed of a rank's noise and augmentation: rank 0 has that of a single process, each other one of its own."""
    # Beyond every epoch's index, whose seeds order the examples.
    return draw_seed(seed, 2**32 + rank) if rank else seed


def forward_order(model: nn.Module, guide: nn.Module) -> list[nn.Parameter]:
    """All parameters, layer by layer in the model's order; a guide's beside those of the layer its site belongs to.

    Gradients come in the reverse of it. It depends on names alone, so it is the same on every rank.
    """
    places = {name: place for place, (name, _) in enumerate(getattr(model, "net", model).named_modules())}

    def place(name: str) -> int:
        # loc.conv1_1.weight, net.conv1_1.bias: what is left of conv1_1 says whose it is.
        parts = name.split(".")[:-1]
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        return next((places[tail] for tail in tails if tail in places), len(places))

    named = [*point_parameters(model).items(), *guide.named_parameters()]
    order = sorted((place(name), number) for number, (name, _) in enumerate(named))
    return [named[number][1] for _, number in order]


def average_buffers(communicator: Communicator, model: nn.Module) -> None:
    """Replace batch norm's running statistics by their means over the ranks; other buffers become rank 0's."""
    if communicator.size > 1 and (buffers := list(model.buffers())):
        real = [buffer for buffer in buffers if buffer.is_floating_point()]
        communicator.broadcast(buffer for buffer in buffers if not buffer.is_floating_point())
        if real:
            flat = torch.cat([buffer.detach().double().cpu().reshape(-1) for buffer in real])
            communicator.start_sum(flat, "buffers", kind="batch norm")()
            for buffer, part in zip(real, flat.split([buffer.numel() for buffer in real]), strict=True):
                buffer.copy_(part.div_(communicator.size).view(buffer.shape))


def gather_random(communicator: Communicator, device: torch.device) -> dict[str, Tensor]:
    """Every rank's random generators: rank 0's under the names of a single process, rank k's under ``name.k``."""
    rows = {name: communicator.gather(value) for name, value in random_state(device).items()}
    return {f"{name}.{rank}" if rank else name: row for name, all_ in rows.items() for rank, row in enumerate(all_)}


def start(
    communicator: Communicator,
    state: Checkpoint | None,
    decisive: Mapping[str, Any],
    *,
    model: nn.Module,
    guide: nn.Module,
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    device: torch.device,
    folder: Path | None,
) -> Checkpoint | None:
    """Restore rank 0's checkpoint on every rank, or, where it has none, start from rank 0's model and guide.

    The ranks need not be as many as before. One that was not there draws noise of its own, new at that step.

    Args:
        params: the values of ``pyro.param`` statements, which no module holds.
        decisive: the settings that must be those of the checkpoint, and ``ranks``, which need not.
        folder: where the checkpoint is, for the message.

    Raises:
        UserError: the checkpoint is of a training with other settings; the message names the first.
    """
    state = share_state(communicator, state, model, guide, params)
    if state is None:
        return None
    # A setting that is younger than the checkpoint had its default.
    defaults = {known.name: known.default for known in fields(TrainSettings)}
    before = {"ranks": 1, **defaults, **state.meta["settings"]}
    _check_data(before.get("data"), decisive["data"], folder)
    for name, value in decisive.items():
        if name not in ("ranks", "data") and before.get(name) != value:
            raise UserError(
                f"{folder} holds a training with {name} {before.get(name)!r}, this one has {value!r}; "
                "use another folder, or the saved value"
            )
    restore(state, model=model, guide=guide, optimizer=optimizer, params=params)
    if communicator.rank < before["ranks"]:
        restore_random(state, device, communicator.rank)
    else:
        torch.manual_seed(draw_seed(rank_seed(decisive["seed"], communicator.rank), state.step))
    if communicator.is_main and before["ranks"] != communicator.size:
        log.info(
            "%d ranks instead of %d: from step %d on, they share the remaining examples of its epoch",
            communicator.size, before["ranks"], state.step,
        )  # fmt: skip
    return state


def _check_data(before: str | None, now: str, folder: Path | None) -> None:
    # Older checkpoints do not say.
    if before is None or before == now:
        return
    if without_times(before) == without_times(now):
        log.warning("the files of the data have other times than when this training began: %s, now %s", before, now)
        return
    raise UserError(
        f"{folder} holds a training on other data ({before}) than these ({now}); use another folder, or the same data"
    )


def share_state(
    communicator: Communicator,
    state: Checkpoint | None,
    model: nn.Module,
    guide: nn.Module,
    params: Mapping[str, Tensor] | None = None,
) -> Checkpoint | None:
    """Rank 0's checkpoint, to restore on every rank; without one, model and guide become rank 0's and None comes back.

    Only rank 0 needs to see the folder of checkpoints.
    """
    content = communicator.share(None if state is None else _described(state))
    if content is None:
        own = (value.detach() for value in (params or {}).values())
        communicator.broadcast([*point_state(model).values(), *guide.state_dict().values(), *own])
        return None
    if state is None:
        empty = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, kind, shape in content["tensors"]}
        state = Checkpoint(content["step"], empty, content["meta"])
    communicator.broadcast(state.tensors.values())
    return state


def _described(state: Checkpoint) -> Mapping[str, Any]:
    tensors = [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in state.tensors.items()
    ]
    return {"step": state.step, "meta": state.meta, "tensors": tensors}
