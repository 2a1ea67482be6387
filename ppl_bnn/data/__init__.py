"""Labelled examples in batches: the named data sets and how their images are augmented.

May import: native, the ground.
"""

from ppl_bnn.data.examples import Examples, TensorExamples
from ppl_bnn.data.images import DATASETS, Images, load, title_and_shape

__all__ = ["DATASETS", "Examples", "Images", "TensorExamples", "load", "title_and_shape"]
