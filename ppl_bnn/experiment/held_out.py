"""The last training examples of a run, kept out of its training for validation."""

from ppl_bnn.data import Split
from ppl_bnn.errors import UserError


def held_out(train: Split, count: int) -> tuple[Split, Split | None]:
    """The training examples without the last `count`, and these; None for no count.

    Raises:
        UserError: no examples would be left to train on.
    """
    if count == 0:
        return train, None
    if count >= len(train):
        raise UserError(f"train.validation must be below the number of training examples, {len(train)}; got {count}")
    return train.rows(slice(len(train) - count)), train.rows(slice(len(train) - count, None), "validation")
