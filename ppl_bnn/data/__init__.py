"""Labelled examples in batches: any data as examples, the named data sets, and how images are augmented.

May import: native, the ground.
"""

from ppl_bnn.data.as_examples import as_examples
from ppl_bnn.data.examples import Examples
from ppl_bnn.data.images import Images
from ppl_bnn.data.named import DATASETS, IMAGE_SETS, described, load
from ppl_bnn.data.pixels import normalize
from ppl_bnn.data.settings import DataSettings
from ppl_bnn.data.splits import Arrays, Files, Split, first_inputs
from ppl_bnn.data.tables import Table
from ppl_bnn.data.tensors import TensorExamples

__all__ = [
    "DATASETS", "IMAGE_SETS", "Arrays", "DataSettings", "Examples", "Files", "Images", "Split", "Table",
    "TensorExamples", "as_examples", "described", "first_inputs", "load", "normalize",
]  # fmt: skip
