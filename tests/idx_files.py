"""Small IDX files under MNIST's names."""

import hashlib

import numpy as np


def small_idx():
    """20 training and 10 test images of noise with their labels, as {file name: content}."""
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": _idx(rng.integers(0, 256, (20, 28, 28))),
        "train-labels-idx1-ubyte": _idx(np.arange(20) % 10),
        "t10k-images-idx3-ubyte": _idx(rng.integers(0, 256, (10, 28, 28))),
        "t10k-labels-idx1-ubyte": _idx(np.arange(10)),
    }


def md5s(files):
    """Of each file, in order."""
    return tuple(hashlib.md5(content).hexdigest() for content in files.values())


def _idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()
