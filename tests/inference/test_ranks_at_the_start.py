"""Ranks that cannot train together say so before the first step."""

import pytest
from ranks import Ranks
from small_ranks import X, Y, settings, small

from ppl_bnn import fit


def start_unlike(communicator):
    messages = []
    rank = communicator.rank
    for changes, inputs, labels in (
        ({"lr": 0.01 + rank}, X, Y),
        ({"bucket_mb": 1.0 + rank}, X, Y),
        ({}, X.roll(rank), Y),
        ({}, X, Y.roll(rank)),
        ({}, X[:1], Y[:1]),
    ):
        with pytest.raises(ValueError) as error:
            fit(*small(), inputs, labels, **settings(**changes), communicator=communicator)
        messages.append(str(error.value))
    return messages


def test_ranks_that_cannot_train_together_say_so(tmp_path):
    for messages in Ranks(tmp_path, 2, start_unlike).results():
        unlike = "the ranks were not started alike: settings, inputs or labels of rank 1 differ from rank 0's"
        assert messages == [*[unlike] * 4, "1 examples are too few for 2 ranks: start fewer"]
