"""Examples: tensors in memory and a map-style data set of the user's own go through one contract and one training."""

import pytest
import torch
from examples_conformance import conforms
from small_training import X, Y, assert_same_state, settings, small, state

from ppl_bnn import fit
from ppl_bnn.data import TensorExamples
from ppl_bnn.errors import Interrupted


class MapStyle:
    """A map-style data set, item by item, as a user would write one."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __getitem__(self, row):
        return self.x[row], self.y[row]

    def __len__(self):
        return len(self.x)

    def take(self, rows):
        x, y = zip(*(self[row] for row in rows.tolist()), strict=True)
        return torch.stack(x), torch.stack(y)

    def fingerprint(self):
        return str((float(self.x.double().sum()), self.y.tolist()))


def test_tensors_in_memory_conform():
    conforms(lambda other=False: TensorExamples(X, 1 - Y if other else Y), count=50)
    images = torch.rand(11, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    conforms(lambda other=False: TensorExamples(images + other, Y[:11]), count=11)
    taken, _ = TensorExamples(images, Y[:11]).take(torch.tensor([3, 1]))
    assert taken.is_contiguous(memory_format=torch.channels_last)


def test_a_map_style_data_set_conforms():
    conforms(lambda other=False: MapStyle(X + other), count=50)


@pytest.mark.parametrize("examples", [TensorExamples(X, Y), MapStyle()], ids=lambda examples: type(examples).__name__)
def test_a_training_on_examples_is_the_training_on_their_tensors_and_resumes(examples, tmp_path):
    whole = small()
    fit(*whole, X, Y, **settings())
    one = small()
    fit(*one, examples, **settings())
    assert_same_state(state(*whole), state(*one))
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        fit(*small(), examples, **settings(), folder=tmp_path, should_stop=lambda: next(asked) == 9)
    resumed = small(seed=5)
    fit(*resumed, examples, **settings(), folder=tmp_path)
    assert_same_state(state(*whole), state(*resumed))


def test_labels_beside_examples_and_tensors_without_labels_are_refused():
    with pytest.raises(ValueError, match="x is a MapStyle, which has its labels"):
        fit(*small(), MapStyle(), Y, **settings())
    with pytest.raises(ValueError, match="needs the labels or targets y beside the tensor x, got None"):
        fit(*small(), X, **settings())
    with pytest.raises(ValueError, match="the same number of examples, at least 1; got 0 and 0"):
        fit(*small(), X[:0], Y[:0], **settings())
