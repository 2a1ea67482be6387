"""What any implementation of `Examples` has to do; a test runs each one through `conforms`."""

from collections import Counter

import torch

from ppl_bnn.data.examples import Examples, batches
from ppl_bnn.distributed import shard


def conforms(make, *, count):
    """Run an implementation through the contract.

    Args:
        make: makes the examples, the same each time: ``make()``; ``make(other=True)`` makes as many different ones.
        count: how many.
    """
    examples: Examples = make()
    assert len(examples) == count
    _takes_rows_in_the_order_asked(examples)
    _is_known_by_its_fingerprint(make)
    _visits_each_example_once_an_epoch_on_any_number_of_ranks(examples)
    _resumes_with_exactly_the_rest(examples)


def _takes_rows_in_the_order_asked(examples):
    rows = torch.tensor([2, 0, 1, 0])
    x, y = examples.take(rows)
    assert len(x) == len(y) == len(rows)
    for place, row in enumerate(rows.tolist()):
        own_x, own_y = examples.take(torch.tensor([row]))
        assert torch.equal(x[place], own_x[0])
        assert torch.equal(y[place], own_y[0])
    again_x, again_y = examples.take(rows)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)


def _is_known_by_its_fingerprint(make):
    assert isinstance(make().fingerprint(), str)
    assert make().fingerprint() == make().fingerprint()
    assert make().fingerprint() != make(other=True).fingerprint()


def _order(examples, *, size=1, batch=4, epoch=3, seed=5, skip=0):
    """The example numbers of an epoch, in order, as `size` ranks take them."""
    for rows in batches(len(examples), batch * size, epoch=epoch, seed=seed, skip=skip):
        for rank in range(size):
            mine, weight = shard(rows, rank, size)
            assert len(examples.take(mine)[0]) == len(mine)
            yield from mine.tolist() if weight else []


def _visits_each_example_once_an_epoch_on_any_number_of_ranks(examples):
    order = list(_order(examples))
    assert order == list(_order(examples))
    assert order != list(_order(examples, epoch=4))
    assert order != list(_order(examples, seed=6))
    for size in (1, 2, 3, 5):
        assert list(_order(examples, size=size)) == order
        assert Counter(_order(examples, size=size)) == Counter(range(len(examples)))


def _resumes_with_exactly_the_rest(examples):
    order = list(_order(examples))
    for done, size in ((4, 1), (8, 1), (8, 3), (len(examples), 2)):
        assert list(_order(examples, size=size, skip=done)) == order[done:]
