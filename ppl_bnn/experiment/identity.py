"""Which data a result was made from: title, split, count and, for a file of the user's own, a checksum."""

import re
import zlib
from collections.abc import Mapping
from typing import Any

from ppl_bnn.data import Images, Split

# Version 0.1.0 wrote a sentence: "10000 test images of MNIST", "8 images of CIFAR-10 (JPEG) (CRC-32 0123abcd)".
_SENTENCE = re.compile(r"(\d+) (?:(\w+) )?images of (.+?)(?: \(CRC-32 ([0-9a-f]{8})\))?")

Identity = dict[str, Any]


def identity(data: Split, *, checksum: bool) -> Identity:
    """Title, split and count of `data`; with `checksum`, where the title does not tell, the CRC-32 of all values."""
    crc32 = 0
    for values in data.stored if checksum else ():
        crc32 = zlib.crc32(memoryview(values.numpy().reshape(-1)), crc32)  # type: ignore[arg-type]
    return {
        "title": data.title,
        "split": data.split,
        "count": len(data),
        "checksum": f"{crc32:08x}" if checksum else None,
    }


def for_results(data: Split, attrs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """How results are told of their data: the images, if they are, and keywords, with the attributes `attrs`."""
    if isinstance(data, Images):
        return data, {"attrs": attrs}
    inputs = {"x": data.x, "feature_names": data.features, "classes": data.classes or None}
    return None, {**inputs, "attrs": {"title": data.title, "y_label": data.target, **attrs}}


def read_identity(saved: str | Mapping[str, Any]) -> Identity:
    """A saved identity, written by this version or version 0.1.0. A sentence without a split means training images."""
    if not isinstance(saved, str):
        return dict(saved)
    match = _SENTENCE.fullmatch(saved)
    if match is None:
        return {"title": saved}
    count, split, title, checksum = match.groups()
    return {"title": title, "split": split or "train", "count": int(count), "checksum": checksum}
