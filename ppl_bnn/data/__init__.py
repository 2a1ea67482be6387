"""Labelled examples in batches: the named data sets and how their images are augmented.

May import: native, the ground.
"""

from ppl_bnn.data.examples import Examples, TensorExamples
from ppl_bnn.data.images import Images
from ppl_bnn.data.named import DATASETS, IMAGE_SETS, Split, described, load
from ppl_bnn.data.tables import Table

__all__ = ["DATASETS", "IMAGE_SETS", "Examples", "Images", "Split", "Table", "TensorExamples", "described", "load"]
