"""Folders of images as data: real digits as PNG files, in memory and decoded as they are asked for."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_bnn.data import Files, Images, first_inputs, load
from ppl_bnn.data.examples import read_batches
from ppl_bnn.data.fingerprints import without_times
from ppl_bnn.errors import FileError, UserError

NOTHING = 1e-6


def write(folder, images):
    """PNG files of images, by their class; the name tells the number of the image."""
    for at in range(len(images)):
        place = folder / images.classes[int(images.labels[at])]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[at, 0].numpy()).save(place / f"{at:03}.png")


@pytest.fixture(scope="module")
def digits(mnist, tmp_path_factory):
    """A folder of 80 training and 30 test digits."""
    root = tmp_path_factory.mktemp("digits")
    train, test = mnist
    write(root / "train", train.first(80))
    write(root / "val", test.first(30))
    return root


@pytest.fixture
def copied(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "copied")
    return tmp_path / "copied"


def read(folder, **settings):
    return load("folder", file=folder, progress=False, **settings)


def inputs(split):
    return first_inputs(split, len(split))


def test_a_folder_of_digits_has_their_pixels(digits, mnist):
    train, test = read(digits)
    assert isinstance(train, Images)
    assert (len(train), len(test), train.shape, train.classes) == (80, 30, (1, 28, 28), tuple("0123456789"))
    assert (train.title, train.split, test.split) == (digits.name, "train", "test")
    expected = mnist[0].first(80)
    own, there = train.pixels.flatten(1).numpy(), expected.pixels.flatten(1).numpy()
    own_order, order = np.lexsort(own.T), np.lexsort(there.T)
    assert np.array_equal(own[own_order], there[order])
    assert torch.equal(train.labels[own_order], expected.labels[order])
    # Not class after class.
    assert len(train.first(20).labels.unique()) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_images_decoded_as_they_are_asked_for_are_the_same(digits, workers):
    memory, disk = read(digits), read(digits, max_memory=NOTHING, workers=workers)
    for one, other in zip(memory, disk, strict=True):
        assert isinstance(other, Files)
        assert (one.shape, one.classes) == (other.shape, other.classes)
        assert torch.equal(one.targets, other.targets)
        # Bytes until they are on the device.
        assert other.examples().take(torch.tensor([0]))[0].dtype == torch.uint8
        found = list(read_batches(other.examples(), torch.arange(len(other)).split(16), "cpu"))
        assert torch.equal(torch.cat([x for x, _ in found]), one.inputs())
        assert torch.equal(torch.cat([y for _, y in found]), one.targets)


def test_images_on_disk_are_known_by_names_sizes_labels_and_times(copied):
    def found():
        return read(copied, max_memory=NOTHING, workers=0)[0].first(40).fingerprint(whole=False)

    known = found()
    assert found() == known
    image = next((copied / "train" / "7").iterdir())
    os.utime(image, (0, 0))
    touched = found()
    assert touched != known
    assert without_times(touched) == without_times(known)
    image.write_bytes(image.read_bytes() + b" ")
    assert without_times(found()) != without_times(known)
    image.write_bytes(image.read_bytes()[:-1])
    assert without_times(found()) == without_times(known)
    image.rename(copied / "train" / "7" / "x.png")
    assert without_times(found()) != without_times(known)


def test_one_tree_is_divided(digits):
    for settings in ({}, {"max_memory": NOTHING, "workers": 0}):
        train, test = read(digits / "train", test_fraction=0.25, **settings)
        assert (len(train), len(test)) == (60, 20)
        whole = inputs(read(digits)[0]).flatten(1).sum(1).sort().values
        assert torch.equal(torch.cat([inputs(train), inputs(test)]).flatten(1).sum(1).sort().values, whole)


def test_a_second_folder_of_test_images_is_said_to_be_left_out(copied, caplog):
    shutil.copytree(copied / "val", copied / "test")
    read(copied)
    assert f"the images in {copied / 'test'} are the test set, and those in 'val' are left out" in caplog.text


def test_a_test_folder_may_lie_elsewhere_and_have_fewer_classes(digits, copied):
    shutil.rmtree(copied / "val" / "0")
    train, test = read(digits / "train", test_file=copied / "val")
    assert test.classes == train.classes
    assert 0 not in test.labels
    assert set(test.labels.tolist()) <= set(range(1, 10))


def test_images_are_scaled_to_a_size(copied):
    Image.new("L", (60, 30), 128).save(copied / "train" / "3" / "wide.png")
    train, _ = read(copied, image_size=20)
    assert train.shape == (1, 20, 20)


def test_colours_are_three_channels(copied):
    Image.new("RGBA", (28, 28), (255, 0, 51, 255)).save(copied / "train" / "0" / "0.png")
    train, _ = read(copied)
    assert train.shape == (3, 28, 28)
    assert inputs(read(copied, max_memory=NOTHING, workers=0)[0]).shape == (81, 3, 28, 28)
    red = train.pixels[train.pixels[:, 1].flatten(1).sum(1) == 0]
    assert red[0, :, 0, 0].tolist() == [255, 0, 51]


def refused(folder, message, **settings):
    with pytest.raises(UserError, match=message) as refusal:
        read(folder, **settings)
    assert "\n" not in str(refusal.value)


def test_an_image_that_cannot_be_read_is_named(copied):
    broken = next((copied / "train" / "7").iterdir())
    broken.write_bytes(broken.read_bytes()[:80])
    refused(copied, f"the image {broken} cannot be read: .*; repair or remove it")
    train, _ = read(copied, max_memory=NOTHING, workers=0)
    with pytest.raises(UserError, match=f"the image {broken} cannot be read"):
        list(read_batches(train.examples(), torch.arange(len(train)).split(16), "cpu"))
    Image.fromarray(np.full((28, 28), 40_000, np.uint16)).save(broken)
    refused(copied, f"the image {broken} has more than 8 bits for a pixel: convert it")
    broken.write_text("no image")
    refused(copied, f"the image {broken} cannot be read")


def test_folders_that_hold_no_data_are_refused(copied, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not there")
    refused(copied / "val" / "0", "has no folders: each class needs one")
    refused(copied, "data.test_fraction has no effect, as there is .*val: leave it out", test_fraction=0.5)
    refused(
        copied, "the folders of data.name folder are classes: use --model.likelihood categorical", targets="numbers"
    )
    refused(copied, "data.test_file .*nowhere is not there", test_file=tmp_path / "nowhere")
    (copied / "val" / "cats").mkdir()
    refused(copied, r"cats has no images \(.jpg, .*\): remove the folder, or put images into it")
    Image.new("L", (28, 28)).save(copied / "val" / "cats" / "1.png")
    refused(
        copied, "val has the class 'cats', of which there are no training images: there are '0', '1', '2' and 7 more"
    )
    shutil.copytree(copied / "train" / "3", tmp_path / "one" / "3")
    refused(tmp_path / "one", "has images of one class alone, 3: there is nothing to learn")
    with pytest.raises(FileError, match="is not a folder"):
        read(next((copied / "train" / "3").iterdir()))


def test_images_of_different_sizes_need_a_size(copied):
    Image.new("L", (30, 28)).save(copied / "train" / "0" / "0.png")
    refused(copied, r"images have different sizes, 28x28 of .* and 28x30 of .*0.png: set data.image_size")
