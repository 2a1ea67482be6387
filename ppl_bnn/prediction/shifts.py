"""Shifts: graded changes of inputs, by kind of data. A predictive that is to be trusted notices them.

A shift is a function of (inputs, severity) that returns inputs of the same shape. One that is random may have a third
parameter, `rows`: the numbers int64 [N] of the examples, where the inputs are some of a larger set. Random numbers are
functions of an example's number alone, whatever batch it comes in. Without `rows` the inputs are the whole set.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_bnn.errors import UserError
from ppl_bnn.inputs import Inputs, lead, mapped, parts
from ppl_bnn.native.normals import philox

# (inputs, severity) -> inputs, or (inputs, severity, rows) -> inputs.
Shift = Callable[..., Any]
# Streams of random numbers: one for each input tensor, and another where a shift needs two.
_SECOND = 1 << 16
# Numbers made at once, which bounds the memory.
_BLOCK = 1 << 20

# Images in [0, 1] -------------------------------------------------------------------------------------------------


def rotation(x: Tensor, degrees: float) -> Tensor:
    """Images [N, channels, height, width] turned counter-clockwise; the corners that come in are 0."""
    # Imported here: torchvision takes 3 seconds that training should not wait for.
    from torchvision.transforms.v2 import functional as transforms

    return transforms.rotate(x, degrees, interpolation=transforms.InterpolationMode.BILINEAR)


def noise(x: Tensor, scale: float, rows: Tensor | None = None) -> Tensor:
    """Images in [0, 1] with Gaussian noise of this standard deviation, the same noise for every call, clamped."""
    if rows is None:
        normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    else:
        normal = _normal(x.shape, rows, 0)
    return (x + scale * normal.to(x.device)).clamp(0, 1)


def blur(x: Tensor, scale: float) -> Tensor:
    """Images blurred by a Gaussian whose standard deviation is `scale` pixels."""
    from torchvision.transforms.v2 import functional as transforms

    return transforms.gaussian_blur(x, [2 * math.ceil(3 * scale) + 1] * 2, [scale] * 2)


SHIFTS: dict[str, Shift] = {"rotation": rotation, "noise": noise, "blur": blur}

# Tables, sequences, tokens, and several inputs of such kinds ----------------------------------------------------------


def shifts_of(train_x: Inputs, *, columns: Mapping[str, Sequence[int]] | None = None) -> dict[str, Shift]:
    """The shifts that fit inputs of this kind, {name: shift}; units and values are those of the training inputs.

    Each shift changes the input tensors that it fits and leaves the others as they are:

    - rows of numbers [N, D]: ``feature_noise`` (Gaussian, the severity in standard deviations of each column),
      ``missing`` (each column of each row with this probability is set to the training mean) and ``shuffled`` (each
      column of each row with this probability has the value of another training row, drawn for each column: at 1 the
      columns keep their distributions and lose their dependence; Shi and Horvath 2006, sec. 2.1);
    - sequences [N, T, D]: ``feature_noise``, ``dropped`` (each time step with this probability is 0), ``truncated``
      (this share of the steps, the last, is 0) and ``shuffled`` (each step with this probability changes places);
    - numbers of more dimensions: ``feature_noise``, by channel;
    - whole numbers [N, T], tokens: ``dropped`` and ``truncated`` likewise, and ``replaced`` or ``shuffled`` (each token
      with this probability becomes one of those of the training inputs, drawn by their frequency).

    Args:
        train_x: training inputs, some thousands of them or all.
        columns: of rows of numbers, {name: the columns of [N, D] that change together}: those of a one-hot category.
            Noise leaves several together as they are (default: each column by itself).
    """
    kinds = [_Part(part, place, columns or {}) for place, part in enumerate(parts(train_x))]
    names = dict.fromkeys(name for kind in kinds for name in kind.shifts)
    return {name: _of_parts(kinds, name) for name in names}


def tilted(values: Tensor, severity: float) -> Tensor:
    """Positions [N] of examples whose distribution is tilted by exp(severity * values), for a covariate shift.

    p(y | x) stays, and p(x) does not (Tibshirani et al. 2019, sec. 3.2): of a Normal column with standard deviation 1
    the mean moves by `severity`. Examples repeat in proportion to their weights (systematic resampling), without random
    numbers.

    Args:
        values: of each example the column, in training standard deviations, [N].
    """
    weights = (severity * values.double().cpu()).softmax(0)
    at = (torch.arange(len(values), dtype=torch.double) + 0.5) / len(values)
    return torch.searchsorted(weights.cumsum(0), at).clamp_max(len(values) - 1)


def applied(shift: Shift, x: Inputs, severity: float, rows: Tensor | None = None) -> Inputs:
    """The shifted inputs.

    Raises:
        UserError: what the shift returns has another shape.
    """
    random = rows is not None and "rows" in inspect.signature(shift).parameters
    found: Inputs = shift(x, severity, rows=rows) if random else shift(x, severity)
    before, after = ([list(part.shape) for part in parts(of)] for of in (x, found))
    if before != after:
        raise UserError(f"a shift must return inputs of the same shape, {before}; got {after}")
    return found


class _Part:
    """The shifts of one input tensor."""

    def __init__(self, train: Tensor, place: int, columns: Mapping[str, Sequence[int]]) -> None:
        self.train, self.place = train, place
        self.shifts: dict[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {}
        if train.is_floating_point() and train.dim() == 2:
            groups = [list(of) for of in columns.values()] or [[at] for at in range(train.shape[1])]
            self.group = torch.zeros(train.shape[1], dtype=torch.int64)
            for number, of in enumerate(groups):
                self.group[of] = number
            together = torch.tensor([len(of) > 1 for of in groups])[self.group]
            self.mean, self.scale = train.mean(0).cpu(), train.std(0, correction=0).cpu().masked_fill(together, 0)
            self.shifts = {"feature_noise": self._noise, "missing": self._missing, "shuffled": self._other_rows}
        elif train.is_floating_point() and train.dim() > 2:
            # Of features or channels: behind the time steps, but in front of an image's pixels.
            feature = 1 if train.dim() == 4 else 2
            others = [at for at in range(train.dim()) if at != feature]
            self.scale = train.std(others, correction=0, keepdim=True)[0].cpu()
            steps = {"dropped": self._dropped, "truncated": self._truncated, "shuffled": self._other_steps}
            self.shifts = {"feature_noise": self._noise, **(steps if train.dim() == 3 else {})}
        elif train.dim() == 2 and train.dtype not in (torch.bool, torch.uint8):
            self.shifts = {
                "dropped": self._dropped, "truncated": self._truncated, "replaced": self._replaced,
                "shuffled": self._replaced,
            }  # fmt: skip

    def _noise(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        normal = _normal(x.shape, rows, self.place)
        return x + severity * (self.scale * normal).to(x)

    def _missing(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        return torch.where(self._chosen_columns(severity, x, rows), self.mean.to(x), x)

    def _other_rows(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        from_row = _uniform(self._groups(x), rows, self.place + _SECOND) * len(self.train)
        from_row = from_row.long().clamp_max(len(self.train) - 1)[:, self.group].to(self.train.device)
        other = self.train.gather(0, from_row).to(x)
        return torch.where(self._chosen_columns(severity, x, rows), other, x)

    def _chosen_columns(self, severity: float, x: Tensor, rows: Tensor | None) -> Tensor:
        chosen = _uniform(self._groups(x), rows, self.place) < severity
        return chosen[:, self.group].to(x.device)

    def _groups(self, x: Tensor) -> tuple[int, int]:
        return len(x), int(self.group.max()) + 1

    def _dropped(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        dropped = (_uniform(x.shape[:2], rows, self.place) < severity).to(x.device)
        return x.masked_fill(dropped.view(*x.shape[:2], *[1] * (x.dim() - 2)), 0)

    def _truncated(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        kept = x.shape[1] - round(severity * x.shape[1])
        return torch.cat([x[:, :kept], torch.zeros_like(x[:, kept:])], 1)

    def _other_steps(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        chosen = _uniform(x.shape[:2], rows, self.place) < severity
        keys = _uniform(x.shape[:2], rows, self.place + _SECOND)
        # The chosen steps come first, in random order, and go to the chosen places, in order.
        shuffled = keys.masked_fill(~chosen, 2).argsort(dim=1, stable=True)
        places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        order = torch.arange(x.shape[1]).expand(x.shape[:2]).scatter(1, places, shuffled).to(x.device)
        return x.gather(1, order.view(*x.shape[:2], *[1] * (x.dim() - 2)).expand_as(x))

    def _replaced(self, x: Tensor, severity: float, rows: Tensor | None) -> Tensor:
        known = self.train.flatten()
        chosen = _uniform(x.shape, rows, self.place) < severity
        which = (_uniform(x.shape, rows, self.place + _SECOND) * len(known)).long().clamp_max(len(known) - 1)
        return torch.where(chosen.to(x.device), known[which.to(known.device)].to(x), x)


def _of_parts(kinds: Sequence[_Part], name: str) -> Shift:
    def shift(x: Inputs, severity: float, rows: Tensor | None = None) -> Inputs:
        each = iter(kinds)

        def of_part(part: Tensor) -> Tensor:
            own = next(each).shifts.get(name)
            return part if own is None else own(part, severity, rows)

        lead(x)
        found: Inputs = mapped(x, of_part)
        return found

    return shift


def _normal(shape: Sequence[int], rows: Tensor | None, stream: int) -> Tensor:
    """Normal(0, 1) numbers [N, ...], a function of an example's number, the place in it and the stream."""
    u, v = _uniforms(shape, rows, stream)
    # Box and Muller (1958); 1 - u is above 0.
    return (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()


def _uniform(shape: Sequence[int], rows: Tensor | None, stream: int) -> Tensor:
    """Numbers [N, ...] in [0, 1), likewise."""
    return _uniforms(shape, rows, stream)[0]


def _uniforms(shape: Sequence[int], rows: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
    """Two independent numbers in [0, 1) for each place of [N, ...], float32 on the CPU."""
    rows = torch.arange(shape[0]) if rows is None else rows.cpu()
    each = math.prod(shape[1:])
    found = torch.empty(2, len(rows), each)
    for some in torch.arange(len(rows)).split(max(1, _BLOCK // max(1, each))):
        row = rows[some].repeat_interleave(each)
        place = torch.arange(each).repeat(len(some))
        words, _ = philox(torch.stack((place, torch.full_like(place, stream))), torch.stack((row, row >> 32)), (0, 0))
        found[:, some] = ((words >> 8).float() * 2**-24).view(2, len(some), each)
    return found[0].view(*shape), found[1].view(*shape)
