"""Which data a result is of: a dict, and the sentences of version 0.1.0 read into one."""

import pytest
import torch

from ppl_bnn.data import Files, Images, TensorExamples
from ppl_bnn.experiment.identity import identity, read_identity
from ppl_bnn.experiment.provenance import RANKED, read_inputs

IMAGES = Images(torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2), torch.tensor([0, 1]), ("0", "1"), "MNIST", "test")


def test_images_are_known_by_title_split_count_and_checksum():
    known = identity(IMAGES, checksum=False)
    assert known == {"title": "MNIST", "split": "test", "count": 2, "checksum": None}
    sums = [identity(images, checksum=True)["checksum"] for images in (IMAGES, IMAGES, IMAGES.first(1))]
    assert sums[0] == sums[1] != sums[2]
    assert len(sums[0]) == 8
    assert read_identity(known) == known


def test_data_on_disk_are_known_by_a_fingerprint():
    examples = TensorExamples(torch.zeros(4, 2), torch.arange(4))
    data = Files(examples, torch.arange(4), (2,), "Mine", "train")
    known = identity(data, checksum=True)
    assert known == {"title": "Mine", "split": "train", "count": 4, "fingerprint": examples.fingerprint()}
    assert identity(data.first(3), checksum=True) != identity(data, checksum=True)
    assert read_identity(known) == known


@pytest.mark.parametrize(
    ("sentence", "known"),
    [
        ("60000 images of MNIST", ("MNIST", "train", 60000, None)),
        ("200 test images of MNIST (5,000-digit subset)", ("MNIST (5,000-digit subset)", "test", 200, None)),
        ("100 validation images of 0.1M transformed digits", ("0.1M transformed digits", "validation", 100, None)),
        ("8 images of CIFAR-10 (JPEG) (CRC-32 0123abcd)", ("CIFAR-10 (JPEG)", "train", 8, "0123abcd")),
    ],
)
def test_a_sentence_of_version_0_1_0_is_read(sentence, known):
    assert tuple(read_identity(sentence).values()) == known


def test_inputs_of_version_0_1_0_are_read():
    old = {"checkpoint": 12, "data": "200 test images of MNIST", "images ranked by predictive.nc": True}
    new = {"checkpoint": 12, "data": {"title": "MNIST", "split": "test", "count": 200, "checksum": None}, RANKED: True}
    younger = {
        "predict.compact": "auto",
        "model.likelihood": "categorical",
        "shift.ood": {},
        "settings": {"compact": "auto", "keep_images": None, "save_snr": False},
    }
    assert read_inputs(old) == read_inputs(new) == younger | new
