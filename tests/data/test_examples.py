"""Examples: every kind goes through one contract."""

import random
import warnings

import numpy as np
import pytest
import torch
from example_kinds import ITERABLES, KINDS, Pairs, Random, padded
from examples_conformance import conforms, equal
from small_training import X, Y, settings, small

from ppl_bnn import as_examples, fit, normalize
from ppl_bnn.data import TensorExamples
from ppl_bnn.data.examples import Streamed, read_batch, read_batches
from ppl_bnn.errors import UserError


class MapStyle(Pairs):
    """A data set that is `Examples` by itself."""

    def take(self, rows):
        x, y = zip(*(self[row] for row in rows.tolist()), strict=True)
        return torch.stack(x), torch.stack(y)

    def fingerprint(self):
        return str((float(self.x.double().sum()), self.y.tolist()))


def test_tensors_in_memory_conform():
    images = torch.rand(11, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    conforms(lambda other=False: TensorExamples(images + other, Y[:11]), count=11)
    taken, _ = TensorExamples(images, Y[:11]).take(torch.tensor([3, 1]))
    assert taken.is_contiguous(memory_format=torch.channels_last)


def test_a_map_style_data_set_with_take_conforms_and_passes_through():
    conforms(lambda other=False: MapStyle(X + other), count=50)
    examples = MapStyle()
    assert as_examples(examples) is examples


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_conforms_and_holds_the_examples(kind, tmp_path):
    made = []

    def make(other=False):
        made.append(KINDS[kind](tmp_path / str(len(made) * other), X + other, Y))
        return made[-1]

    conforms(make, count=50)
    x, y = make().take(torch.arange(50))
    assert torch.equal(y, Y)
    if "random" not in kind:
        assert torch.equal(x["features"] if isinstance(x, dict) else x, X)


@pytest.mark.parametrize("kind", ITERABLES)
def test_an_iterable_conforms_in_its_own_order(kind, tmp_path):
    # Nothing of it can be known before it is read.
    conforms(lambda other=False: ITERABLES[kind](tmp_path, X + other, Y), count=50, told_apart=False)
    x, y = ITERABLES[kind](tmp_path, X, Y).take(torch.arange(50))
    assert torch.equal(x.sort(0).values, X.sort(0).values)
    assert y.sum() == Y.sum()


def test_several_inputs_and_padded_sequences_conform():
    both = {"left": X[:, :2], "right": X[:, 2:], "y": Y}
    conforms(lambda other=False: as_examples({**both, "left": X[:, :2] + other}), count=50)
    conforms(lambda other=False: as_examples((X[:, :2] + other, X[:, 2:], Y)), count=50)
    x, y = as_examples(both).take(torch.tensor([4, 2]))
    assert x.keys() == {"left", "right"}
    assert torch.equal(x["left"], X[[4, 2], :2])
    assert torch.equal(y, Y[[4, 2]])
    items = [(torch.arange(1.0 + row % 5), Y[row]) for row in range(50)]
    x, _ = as_examples(items, collate_fn=padded).take(torch.tensor([2, 0]))
    assert x.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_random_items_depend_on_key_and_number_and_leave_the_generators_alone():
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002
    rows = torch.tensor([3, 1, 4, 1])
    found = []
    for workers in (0, 1, 2):
        examples = as_examples(Random(), num_workers=workers)
        found.append(list(examples.stream([rows, rows, rows], key=[1, 1, 2])))
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    first, again, other = (x - X[rows] for x, _ in found[0])
    assert torch.equal(first, again)
    torch.testing.assert_close(first[1], first[3])
    assert len({round(float(shift), 4) for shift in torch.cat([first[:3], other[:3]])[:, 0]}) == 6
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_pixels_move_in_uint8_and_are_normalized_on_the_device():
    pixels = torch.randint(0, 256, (12, 3, 4, 4), dtype=torch.uint8)
    seen = []

    def transform(x):
        seen.append((x.dtype, x.device.type))
        return normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(x)

    examples = as_examples([(image, 0) for image in pixels], transform=transform)
    x, y = read_batch(examples, torch.tensor([5, 2]), "cpu", dtype=torch.float64)
    assert seen == [(torch.uint8, "cpu")]
    expected = (pixels[[5, 2]] / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, expected.double())
    assert y.tolist() == [0, 0]
    assert normalize(0.5, 0.5)(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2
    for mean, std, message in [(0.0, 0.0, "std positive"), ((0.1, 0.2), 1.0, "2 channels, and x is")]:
        with pytest.raises(ValueError, match=message):
            normalize(mean, std)(pixels)


def test_labels_are_checked_in_each_batch_and_the_example_is_named():
    examples = MapStyle(X, torch.where(torch.arange(50) == 41, 7, Y))

    def labels(y):
        if (y > 1).any():
            raise UserError("a label is 7")
        return y

    stream = read_batches(examples, torch.arange(50).split(10), "cpu", labels=labels)
    assert len([next(stream) for _ in range(4)]) == 4
    with pytest.raises(UserError, match=r"^example 41: a label is 7$"):
        next(stream)


def test_streams_of_workers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = as_examples(Pairs(), num_workers=2)
        assert isinstance(examples, Streamed)
        assert len(list(examples.stream(torch.arange(50).split(8)))) == 7


def test_labels_beside_examples_and_tensors_without_labels_are_refused():
    with pytest.raises(ValueError, match="x is a MapStyle, which has its labels"):
        fit(*small(), MapStyle(), Y, **settings())
    with pytest.raises(ValueError, match="needs the labels or targets y beside the tensor x, got None"):
        fit(*small(), X, **settings())
    with pytest.raises(ValueError, match="the same number of examples, at least 1; got 0 and 0"):
        fit(*small(), X[:0], Y[:0], **settings())
