"""The steps of Adam, RMSprop and IVON over the buffers of a flat posterior, and their other parameters."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_bnn.inference.ivon import IVON, initial_variance, move_points

if TYPE_CHECKING:
    from ppl_bnn.inference.updates import Update


def step_count(like: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A count of steps, where the optimizer has its own."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.zeros((), dtype=torch.float32, device=like.device if on_device else "cpu")


Others = list[tuple[Tensor, dict[str, Any]]]


def _no_scalars(update: "Update") -> dict[Any, float]:
    return {}


How = tuple[Callable[["Update", Others], None] | None, Callable[["Update"], dict[Any, float]]]
NOTHING: How = None, _no_scalars


def _states(optimizer: torch.optim.Optimizer, others: Others, names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    found = []
    for parameter, _ in others:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = step_count(parameter, optimizer)
            state |= {name: torch.zeros_like(parameter) for name in names}
        found.append(state)
    return found


def _adam(update: "Update", others: Others) -> None:
    flat, names = update.flat, ("exp_avg", "exp_avg_sq")
    assert flat is not None
    (loc1, loc2), (u1, u2) = ([update.buffer(name, of_loc=of_loc) for name in names] for of_loc in (True, False))
    steps, states = update.steps(), _states(update.optimizer, others, names)
    counts = [steps, *(state["step"] for state in states)]
    torch._foreach_add_(counts, 1)
    if update.bad is not None:
        torch._foreach_sub_(counts, [update.bad] * len(counts))
    arithmetic, groups = flat.arithmetic, update.groups()
    rows = [
        (arithmetic.loc, arithmetic.to_loc, loc1, loc2, steps, groups[0]),
        (arithmetic.u, arithmetic.to_u, u1, u2, steps, groups[1]),
        *((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
          for (p, group), state in zip(others, states, strict=True)),
    ]  # fmt: skip
    for number, group in enumerate(update.optimizer.param_groups):
        if own := [row[:5] for row in rows if row[5] is group]:
            parameters, gradients, averages, squares, counts = map(list, zip(*own, strict=True))
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                parameters, gradients, averages, squares, [], counts, lr=update.scalars[number],
                beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
                found_inf=update.bad,
            )  # fmt: skip


def _rmsprop(update: "Update", others: Others) -> None:
    flat = update.flat
    assert flat is not None
    averages = [update.buffer("square_avg", of_loc=of_loc) for of_loc in (True, False)]
    states = _states(update.optimizer, others, ("square_avg",))
    torch._foreach_add_([update.steps(), *(state["step"] for state in states)], 1)
    arithmetic, groups = flat.arithmetic, update.groups()
    rows = [
        (arithmetic.loc, arithmetic.to_loc, averages[0], groups[0]),
        (arithmetic.u, arithmetic.to_u, averages[1], groups[1]),
        *((p, p.grad, state["square_avg"], group) for (p, group), state in zip(others, states, strict=True)),
    ]
    for number, group in enumerate(update.optimizer.param_groups):
        if own := [row[:3] for row in rows if row[3] is group]:
            parameters, gradients, squares = map(list, zip(*own, strict=True))
            torch._foreach_mul_(squares, group["alpha"])
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["alpha"])
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_mul_(gradients, -update.scalars[number])
            torch._foreach_addcdiv_(parameters, gradients, roots)


def _ivon(update: "Update", others: Others) -> None:
    flat, optimizer = update.flat, update.optimizer
    assert flat is not None
    momentum, group = update.buffer("momentum", of_loc=True), update.groups()[0]
    if update.factors is None:
        pairs = zip(flat.locs, flat.unconstrained_scales, strict=True)
        update.factors = [1 / float(initial_variance(optimizer.state[loc], u)) for loc, u in pairs]
    alive = None if update.bad is None else 1 - update.bad
    rate, c = update.scalars["rate"], update.scalars["c"]
    flat.arithmetic.ivon_step(momentum, rate, update.factors, c, 1 - group["beta1"], alive)
    for rest in optimizer.param_groups[2:]:
        points = [parameter for parameter, own in others if own is rest]
        if alive is None:
            move_points(optimizer, points, rest)  # type: ignore[arg-type]
        elif points:
            _move_points_there(update, points, rate * alive, (1 - rest["beta1"]) * alive)


def _move_points_there(update: "Update", points: list[Tensor], rate: Tensor, share: Tensor) -> None:
    """`move_points` on a device, all at once, where factors of 0 leave everything as it is."""
    momentum = update.point_buffer("momentum", points)
    gradient = torch.cat([point.grad.reshape(-1) for point in points]).nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]
    moved = momentum.lerp_(gradient, share).mul(rate)
    parts = moved.split([point.numel() for point in points])
    torch._foreach_sub_(points, [part.view(point.shape) for part, point in zip(parts, points, strict=True)])


def _ivon_scalars(update: "Update") -> dict[Any, float]:
    group = update.groups()[0]
    # It knows the number of steps of a training that is resumed.
    update.buffer("momentum", of_loc=True)
    steps = update.steps()
    steps += 1
    return {
        "rate": group["lr"] / (1 - group["beta1"] ** int(steps)),
        "c": (1 - group["beta2"]) / update.optimizer.param_groups[0]["kl_per_datum"],
    }


def _learning_rates(update: "Update") -> dict[Any, float]:
    return {number: group["lr"] for number, group in enumerate(update.optimizer.param_groups)}


def elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is what `IN_BUFFERS` computes: without the settings that others may have chosen."""
    if type(optimizer) is torch.optim.Adam and not all(group["fused"] for group in optimizer.param_groups):
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    off = ("weight_decay", "amsgrad", "maximize", "momentum", "centered", "decoupled_weight_decay")
    return not any(group.get(name) for group in optimizer.param_groups for name in off)


# What works element by element, so that weights may lie in buffers of any shape.
IN_BUFFERS: dict[type, How] = {
    torch.optim.Adam: (_adam, _learning_rates),
    torch.optim.RMSprop: (_rmsprop, _learning_rates),
    IVON: (_ivon, _ivon_scalars),
}
# What leaves everything as it is where `Update.bad` is 1.
SKIPPING = (_adam, _ivon)
