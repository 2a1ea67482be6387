"""What any implementation of `Examples` has to do; a test runs each one through `conforms`."""

from collections import Counter

import torch

from ppl_bnn.data.examples import Examples, Streamed, batches, is_in_order, read_batch, read_batches
from ppl_bnn.distributed import shard
from ppl_bnn.inputs import count, parts


def conforms(make, *, count, told_apart=True):
    """Run an implementation through the contract.

    Args:
        make: makes the examples, the same each time: ``make()``; ``make(other=True)`` makes as many different ones.
        count: how many.
        told_apart: whether the fingerprint tells those from these.
    """
    examples: Examples = make()
    assert len(examples) == count
    _takes_rows_in_the_order_asked(examples)
    _is_known_by_its_fingerprint(make, told_apart)
    _visits_each_example_once_an_epoch_on_any_number_of_ranks(examples)
    _resumes_with_exactly_the_rest(examples)
    if isinstance(examples, Streamed):
        _streams_what_it_takes(examples)
        _draws_by_key_and_number_alone(examples)


def equal(one, other):
    """Whether two batches, (x, y), are the same to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


def _takes_rows_in_the_order_asked(examples):
    rows = torch.tensor([2, 0, 1, 0])
    x, y = examples.take(rows)
    assert count(x) == len(y) == len(rows)
    for place, row in enumerate(rows.tolist()):
        own_x, own_y = examples.take(torch.tensor([row]))
        assert equal([part[place] for part in parts(x)], [part[0] for part in parts(own_x)])
        assert torch.equal(y[place], own_y[0])
    assert equal((x, y), examples.take(rows))


def _is_known_by_its_fingerprint(make, told_apart):
    assert isinstance(make().fingerprint(), str)
    assert make().fingerprint() == make().fingerprint()
    if told_apart:
        assert make().fingerprint() != make(other=True).fingerprint()


def _order(examples, *, size=1, batch=4, epoch=3, seed=5, skip=0):
    """The example numbers of an epoch, in order, as `size` ranks take them."""
    shuffle = not is_in_order(examples)
    for rows in batches(len(examples), batch * size, epoch=epoch, seed=seed, skip=skip, shuffle=shuffle):
        for rank in range(size):
            mine, weight = shard(rows, rank, size)
            yield from mine.tolist() if weight else []


def _visits_each_example_once_an_epoch_on_any_number_of_ranks(examples):
    order = list(_order(examples))
    assert order == list(_order(examples))
    if not is_in_order(examples):
        assert order != list(_order(examples, epoch=4))
        assert order != list(_order(examples, seed=6))
    for size in (1, 2, 3, 5):
        assert list(_order(examples, size=size)) == order
        assert Counter(_order(examples, size=size)) == Counter(range(len(examples)))


def _resumes_with_exactly_the_rest(examples):
    order = list(_order(examples))
    for done, size in ((4, 1), (8, 1), (8, 3), (len(examples), 2)):
        assert list(_order(examples, size=size, skip=done)) == order[done:]


def _streams_what_it_takes(examples):
    """Batch after batch, in two passes, and to one that stops in the middle."""
    order = torch.tensor(list(_order(examples)))
    asked = [*order.split(4), *order.split(4)]
    found = list(read_batches(examples, iter(asked), "cpu"))
    assert len(found) == len(asked)
    assert equal(found, [read_batch(examples, rows, "cpu") for rows in asked])
    stream = examples.stream(iter(asked))
    assert equal(next(stream), examples.take(asked[0]))
    stream.close()
    # Without anything before it.
    later = [rows[::2] for rows in asked[2:5]]
    assert equal(list(examples.stream(later)), [examples.take(rows) for rows in later])


def _draws_by_key_and_number_alone(examples):
    rows = torch.arange(8)
    (whole,) = examples.stream([rows], key=7)
    halves = list(examples.stream(rows.split(4), key=[7, 7]))
    for place, part in enumerate(parts(whole)):
        assert torch.equal(part, torch.cat([parts(half)[place] for half in halves]))
