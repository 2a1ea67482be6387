"""Which data a result was made from: title, split, count, and what tells it from others."""

import re
from collections.abc import Mapping
from typing import Any

from ppl_bnn.data import Split

# Version 0.1.0 wrote a sentence: "10000 test images of MNIST", "8 images of CIFAR-10 (JPEG) (CRC-32 0123abcd)".
_SENTENCE = re.compile(r"(\d+) (?:(\w+) )?images of (.+?)(?: \(CRC-32 ([0-9a-f]{8})\))?")

Identity = dict[str, Any]


def identity(data: Split, *, checksum: bool) -> Identity:
    """Title, split and count of `data`; with `checksum`, where the title does not tell, the CRC-32 of all values.

    Data that are not in memory have a fingerprint in place of the checksum.
    """
    known = {"title": data.title, "split": data.split, "count": len(data)}
    if not data.in_memory:
        return {**known, "fingerprint": data.fingerprint(whole=False)}
    return {**known, "checksum": data.fingerprint(whole=checksum)}


def read_identity(saved: str | Mapping[str, Any]) -> Identity:
    """A saved identity, written by this version or version 0.1.0. A sentence without a split means training images."""
    if not isinstance(saved, str):
        return dict(saved)
    match = _SENTENCE.fullmatch(saved)
    if match is None:
        return {"title": saved}
    count, split, title, checksum = match.groups()
    return {"title": title, "split": split or "train", "count": int(count), "checksum": checksum}
