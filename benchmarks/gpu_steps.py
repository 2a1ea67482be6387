"""Training steps in turns on the device: ours and ivon-opt beside the deterministic network's, in each mode."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pyro
import torch

from gpu_cells import Cell, Clock, NotHere, Plan, Row, why
from gpu_modes import NAMES, contender
from gpu_networks import synchronize
from turns import in_turns

NETWORKS = ("vgg16", "resnet18")
PRECISIONS = ("float32", "bfloat16")
# The most important first: time may run out.
ORDER = (
    (512, "eager"), (128, "eager"), (512, "graph"), (128, "graph"), (1024, "eager"), (1024, "graph"),
    (512, "compiled"), (128, "compiled"), (1024, "compiled"),
)  # fmt: skip
TOY_ORDER = ((4, "eager"), (4, "graph"))
# A turn is several steps without a wait for the device in between, as in a training.
STEPS_A_TURN = 3
SMALLEST_SECONDS = 0.5
ROUNDS = 20
FEWEST_ROUNDS = 4


def cells(plan: Plan) -> Iterator[Cell]:
    """Compare the steps of a network, a batch size, a precision and a mode in turns, a cell each."""
    networks, order = (NETWORKS[:1], TOY_ORDER) if plan.toy else (NETWORKS, ORDER)
    for (batch, mode), precision, name in product(order, PRECISIONS, networks):
        minimum = 20 if mode == "compiled" else 6
        yield Cell(f"{name}, {batch}, {precision}, {mode}", minimum, partial(steps, plan, name, batch, precision, mode))


def steps(plan: Plan, network: str, batch: int, precision: str, mode: str, clock: Clock) -> Iterator[Row]:
    """Time all steps in turns; ratios are to the deterministic one in the same mode."""
    pyro.enable_validation(False)
    torch.manual_seed(0)
    device = torch.device(plan.device)
    where = {"network": network, "batch": batch, "precision": precision, "mode": mode}
    turns: dict[str, Callable[[], object]] = {}
    for name in NAMES:
        clock.say(f"building {name}")
        try:
            step = contender(plan, name, mode, network_name=network, batch=batch, precision=precision).step
            turns[name] = _warm(partial(_several, step, 1 if plan.toy else STEPS_A_TURN), device, clock)
        except Exception as error:
            if name == "deterministic":
                raise
            # The others can be compared without it.
            yield where | {"step": name, "note": why(error)}
    clock.say("timing")
    per_turn = 1 if plan.toy else STEPS_A_TURN
    found = in_turns(turns, _rounds(plan, turns, device, clock), wait=partial(synchronize, device))
    for name, own in found.items():
        ratios = [a / b for a, b in zip(own, found["deterministic"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        seconds = statistics.median(own) / per_turn
        yield where | {
            "step": name, "median ms": 1000 * seconds, "ratio": middle, "quartiles": f"{low:.3f}, {high:.3f}",
            "images/s": batch / seconds, "rounds": len(own), "note": "",
        }  # fmt: skip
    if mode == "compiled":
        torch.compiler.reset()


def _several(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()


def _warm(turn: Callable[[], object], device: torch.device, clock: Clock) -> Callable[[], object]:
    turn()
    synchronize(device)
    if clock.left() < 1:
        raise NotHere("no time left")
    turn()
    synchronize(device)
    return turn


def _rounds(plan: Plan, turns: dict[str, Callable[[], object]], device: torch.device, clock: Clock) -> int:
    """Return how many rounds are timed: 20, more where steps are short, or fewer where time is."""
    started = time.perf_counter()
    for turn in turns.values():
        turn()
        synchronize(device)
    each = time.perf_counter() - started
    if plan.toy:
        return FEWEST_ROUNDS
    fit = int(clock.left() / each)
    if fit < FEWEST_ROUNDS:
        raise NotHere(f"no time left: a round takes {each:.1f} s")
    return min(fit, max(ROUNDS, int(SMALLEST_SECONDS * len(turns) / each)))
