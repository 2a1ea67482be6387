"""One update of the parameters: over a flat posterior of all its weights at once, whatever the optimizer."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.guides.flat import FlatNormal
from ppl_bnn.inference.in_buffers import IN_BUFFERS, NOTHING, SKIPPING, How, elementwise, step_count


class NonFiniteGradient(ArithmeticError):
    """A gradient is NaN or infinite; nothing was updated."""


class Update:
    """Moves parameters by their gradients, which are then dropped.

    Where the optimizer works element by element (`IN_BUFFERS`), the weights of a flat posterior are updated in its
    buffers. The optimizer stays in charge: its learning rates are read at every step, and its ``state`` is what it
    would be, in tensors that are parts of buffers.

    Args:
        flat: the sites of the guide whose gradients `FlatNormal.gradients` gathers; None without such.
        clip_norm: clip the gradient's total norm to this.

    Attributes:
        bad: on a device 1 from the first update on that a gradient stopped, else 0; None before the first update.
    """

    bad: Tensor | None = None

    def __init__(
        self, optimizer: torch.optim.Optimizer, flat: FlatNormal | None = None, *, clip_norm: float | None = None
    ) -> None:
        self.optimizer, self.flat, self.clip_norm = optimizer, flat, clip_norm
        in_flat = {id(parameter) for parameter in (*flat.locs, *flat.unconstrained_scales)} if flat else set()
        # Groups by their numbers: `load_state_dict` makes new ones.
        every = [(p, number) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self._others = [(parameter, number) for parameter, number in every if id(parameter) not in in_flat]
        self._groups = {id(parameter): number for parameter, number in every if id(parameter) in in_flat}
        self._alike = len({(parameter.dtype, parameter.device) for parameter, _ in every}) == 1
        in_buffers = flat is not None and elementwise(optimizer) and self._in_two_groups() and self._alike
        how: How = IN_BUFFERS.get(type(optimizer), NOTHING) if in_buffers else NOTHING
        self._run, self._values = how
        self.scalars: dict[Any, Any] = {}
        self.factors: list[float] | None = None
        self._buffers: dict[tuple[str, bool], Tensor] = {}
        self._points: tuple[list[Tensor], Tensor] | None = None
        self._steps: Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the optimizer leaves everything as it is where `bad` is 1."""
        return self._run in SKIPPING

    def _in_two_groups(self) -> bool:
        """Whether the optimizer has loc of all sites in one group, and so the unconstrained scales."""
        assert self.flat is not None
        parts = self.flat.locs, self.flat.unconstrained_scales
        return all(len({self._groups.get(id(one)) for one in part}) == 1 for part in parts)

    def prepare(self) -> None:
        """Bring what changes from step to step, such as learning rates, to the device; call it before each update."""
        if self._steps is None and self._run is not None:
            assert self.flat is not None
            # A site that was frozen until now has made fewer steps than the others.
            counts = {float(self.optimizer.state[one].get("step", 0)) for one in self.flat.locs}
            if len(counts) > 1:
                self._run, self._values = NOTHING
                for one in (*self.flat.locs, *self.flat.unconstrained_scales):
                    if "step" in (state := self.optimizer.state[one]):
                        state["step"] = state["step"].clone()
        like = self.flat.arithmetic.loc if self.flat else None
        for name, value in self._values(self).items():
            if like is None or like.is_cpu:
                self.scalars[name] = value
            elif name not in self.scalars:
                self.scalars[name] = torch.full((), value, dtype=like.dtype, device=like.device)
            else:
                self.scalars[name].fill_(value)

    @torch.no_grad()
    def __call__(self, squares: float | Tensor = 0.0) -> None:
        """One update.

        Args:
            squares: the sum of the squares of the gradients in `flat`.

        Raises:
            NonFiniteGradient: a gradient is NaN or infinite. Nothing was updated, and they are still in place. On a
                device where the optimizer can skip an update (`SKIPPING`), it does, and `bad` tells.
        """
        groups = self.optimizer.param_groups
        others = [(parameter, groups[number]) for parameter, number in self._others if parameter.grad is not None]
        gradients: list[Tensor] = [parameter.grad for parameter, _ in others]  # type: ignore[misc]
        buffers = [self.flat.arithmetic.to_loc, self.flat.arithmetic.to_u] if self.flat else []
        squares = squares + _squares(gradients, alike=self._alike)
        if isinstance(squares, Tensor) and squares.is_cpu:
            squares = float(squares)
        if isinstance(squares, Tensor):
            self._check_later(squares)
        elif not math.isfinite(squares):
            # Before the update, so that neither the parameters nor the next checkpoint ever hold it.
            raise NonFiniteGradient
        if self.clip_norm is not None:
            _clip([*gradients, *buffers], squares, self.clip_norm)
        if self._run is not None:
            self._run(self, others)
        else:
            if self.flat:
                self.flat.give_gradients()
            self.optimizer.step()
            if self.flat:
                self.flat.drop_gradients()
        for parameter, _ in others:
            parameter.grad = None

    def _check_later(self, squares: Tensor) -> None:
        # 0 times what is not finite is NaN.
        bad = torch.ne(squares * 0, 0, out=torch.empty_like(squares))
        if self.bad is None:
            self.bad = bad
        else:
            torch.maximum(self.bad, bad, out=self.bad)
        if not self.skips and bool(self.bad):
            raise NonFiniteGradient

    def buffer(self, name: str, *, of_loc: bool) -> Tensor:
        """The optimizer's state of this name, of loc or of unconstrained scale, [n]; its own ``state`` has views."""
        assert self.flat is not None
        if (name, of_loc) not in self._buffers:
            parameters = self.flat.locs if of_loc else self.flat.unconstrained_scales
            self._buffers[name, of_loc] = whole = torch.zeros_like(self.flat.arithmetic.loc)
            for parameter, view in zip(parameters, self.flat.views(whole), strict=True):
                state = self.optimizer.state[parameter]
                if name in state:
                    view.copy_(state[name])
                state["step"] = self.steps(state.get("step"))
                state[name] = view
        return self._buffers[name, of_loc]

    def point_buffer(self, name: str, points: list[Tensor]) -> Tensor:
        """The optimizer's state of this name, of these parameters one after the other; its own ``state`` has views."""
        if self._points is None or [id(one) for one in self._points[0]] != [id(one) for one in points]:
            whole = torch.cat([torch.zeros_like(point).reshape(-1) for point in points])
            parts = whole.split([point.numel() for point in points])
            for point, part in zip(points, parts, strict=True):
                state = self.optimizer.state[point]
                if name in state:
                    part.copy_(state[name].reshape(-1))
                state["step"] = self.steps()
                state[name] = part.view(point.shape)
            self._points = points, whole
        return self._points[1]

    def steps(self, before: Tensor | None = None) -> Tensor:
        """The number of steps that the weights in `flat` have made, which their ``state`` shares."""
        if self._steps is None:
            assert self.flat is not None
            like = self.flat.arithmetic.loc
            self._steps = step_count(like, self.optimizer) if before is None else before.clone()
        return self._steps

    def groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The optimizer's groups of loc and of unconstrained scale."""
        assert self.flat is not None
        loc, u = self.flat.locs[0], self.flat.unconstrained_scales[0]
        return tuple(self.optimizer.param_groups[self._groups[id(one)]] for one in (loc, u))  # type: ignore[return-value]


def _squares(gradients: list[Tensor], *, alike: bool) -> float | Tensor:
    if not gradients:
        return 0.0
    if not alike:
        return torch.nn.utils.get_total_norm(gradients).square()
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def _clip(gradients: list[Tensor], squares: float | Tensor, clip_norm: float) -> None:
    if isinstance(squares, Tensor):
        torch._foreach_mul_(gradients, (clip_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0))
    elif squares > clip_norm**2:
        torch._foreach_mul_(gradients, clip_norm / (math.sqrt(squares) + 1e-6))
