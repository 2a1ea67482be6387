"""Labels: the class labels of an example, one or many, hard or soft, with weights of classes and ignored labels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

# What no label is.
_NONE = -(2**31)


class Labels(TorchDistribution):
    """The labels of one example, independent given logits [N, ..., C]: batch shape [N].

    Its log density is minus the sum over labels of ``torch.nn.functional.cross_entropy``. With class weights or soft
    labels it is no normalized density, but a weighted log likelihood. Samples have hard labels that all count.

    Args:
        logits: [N, ..., C].
        weight: of each class, [C].
        ignore_index: a label that adds nothing.
        soft: whether y is probabilities, [N, ..., C], instead of labels [N, ...].
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(
        self, logits: Tensor, *, weight: Tensor | None = None, ignore_index: int | None = None, soft: bool = False,
        validate_args: bool | None = None,
    ) -> None:  # fmt: skip
        self.logits, self.weight, self.ignore_index, self.soft = logits, weight, ignore_index, soft
        event = logits.shape[1:] if soft else logits.shape[1:-1]
        super().__init__(logits.shape[:1], event, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Labels 0 .. C - 1 and the ignored one; or probabilities."""
        if self.soft:
            return constraints.independent(_Probabilities(), len(self.event_shape) - 1)  # type: ignore[no-any-return]
        return constraints.independent(_Labels(self.logits.shape[-1], self.ignore_index), len(self.event_shape))  # type: ignore[no-any-return]

    def expand(self, batch_shape: Size, _instance: Any = None) -> "Labels":
        """The same labels for another N, which must be this one or stand for 1."""
        return Labels(
            self.logits.expand(*batch_shape, *self.logits.shape[1:]), weight=self.weight,
            ignore_index=self.ignore_index, soft=self.soft, validate_args=False,
        )  # fmt: skip

    def log_prob(self, value: Tensor) -> Tensor:
        """Weighted log probabilities of the labels that count, summed over each example, [N] nats."""
        logits = self.logits.movedim(-1, 1)
        if self.soft:
            losses = F.cross_entropy(logits, value.movedim(-1, 1).to(logits), self.weight, reduction="none")
        else:
            skipped = _NONE if self.ignore_index is None else self.ignore_index
            losses = F.cross_entropy(logits, value.long(), self.weight, ignore_index=skipped, reduction="none")
        return -losses.flatten(1).sum(1) if losses.dim() > 1 else -losses

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Labels [..., N, ...], or one-hot probabilities [..., N, ..., C]."""
        labels = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(Size(sample_shape))
        return F.one_hot(labels, self.logits.shape[-1]).to(self.logits) if self.soft else labels


class _Labels(constraints.Constraint):
    is_discrete = True

    def __init__(self, num_classes: int, ignore_index: int | None) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        known = (value % 1 == 0) & (value >= 0) & (value < self.num_classes)
        return known if self.ignore_index is None else known | (value == self.ignore_index)

    def __repr__(self) -> str:
        other = "" if self.ignore_index is None else f" or {self.ignore_index}"
        return f"labels 0..{self.num_classes - 1}{other}"


class _Probabilities(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        # Looser than torch's simplex: labels in single precision are rounded once for each class.
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-4)

    def __repr__(self) -> str:
        return "probabilities that add up to 1 over the last dimension"
