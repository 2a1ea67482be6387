"""CIFAR-10 as a file of JPEGs, made for a test."""

import io

import numpy as np
from PIL import Image


def jpegs(count=12):
    """The arrays of an .npz of `count` images, the last 4 of them test images, and their pixels."""
    rng = np.random.default_rng(0)
    images, stream, offsets = [], b"", [0]
    for _ in range(count):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        stream += buffer.getvalue()
        offsets.append(len(stream))
        images.append(pixels)
    return {
        "jpeg": np.frombuffer(stream, np.uint8),
        "offsets": np.array(offsets),
        "labels": np.arange(count, dtype=np.uint8) % 10,
        "is_test": np.arange(count) >= count - 4,
    }, images
