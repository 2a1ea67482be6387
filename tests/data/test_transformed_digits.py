"""The transformed digits: infimnist's indices, the transform against one pixel by pixel, and a cache that mends."""

import hashlib
import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from ppl_bnn.data import named as data
from ppl_bnn.data import sources as data_sources
from ppl_bnn.data import transformed_digits
from ppl_bnn.data.transformed_digits import SHIFTS, deform, displacement_fields, recipe, tangent_images
from ppl_bnn.errors import FileError

# As infimnist has it: up, down, left, right, up+left, up+right, down+left, down+right, none.
ROWS_DOWN = (-1, 1, 0, 0, -1, -1, 1, 1, 0)
COLUMNS_RIGHT = (0, 0, -1, 1, -1, 1, -1, 1, 0)


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist[0].pixels[:, 0].numpy()


@pytest.fixture(scope="module")
def fields():
    return displacement_fields()


def make(digits, indices, **options):
    return transformed_digits.transformed_digits(digits, np.array(indices), progress=False, **options)


def moved(image, down, right):
    """The image [28, 28] shifted by at most a pixel, zeros moving in."""
    image = np.roll(image, (down, right), axis=(0, 1))
    if down:
        image[0 if down > 0 else -1] = 0
    if right:
        image[:, 0 if right > 0 else -1] = 0
    return image


def kernels(width=1.0, bits=12):
    """The smoothing and the slope filter, from their formulas."""
    radius = math.floor(3 * width)
    taps = [math.exp(-(d * d) / (2 * width**2)) for d in range(-radius, radius + 1)]
    smooth = [round(tap / sum(taps) * 2**bits) / 2**bits for tap in taps]
    ramp = sum(d * d * tap for d, tap in enumerate(smooth, -radius))
    return smooth, [round(d * tap / ramp * 2**bits) / 2**bits for d, tap in enumerate(smooth, -radius)]


def slow_image(digit, right, up, shift):
    """One image, a pixel at a time in Python numbers."""
    smooth, slope = kernels()
    radius, image = len(smooth) // 2, np.zeros((28, 28), np.uint8)
    for row in range(28):
        for column in range(28):
            to_the_right = downwards = 0.0
            for down in range(-radius, radius + 1):
                for across in range(-radius, radius + 1):
                    if 0 <= row + down < 28 and 0 <= column + across < 28:
                        grey = int(digit[row + down, column + across])
                        to_the_right += grey * smooth[down + radius] * slope[across + radius]
                        downwards += grey * slope[down + radius] * smooth[across + radius]
            moved = int(digit[row, column]) - (right[row, column] * to_the_right - up[row, column] * downwards)
            there = row + ROWS_DOWN[shift], column + COLUMNS_RIGHT[shift]
            if 0 <= there[0] < 28 and 0 <= there[1] < 28:
                image[there] = int(min(max(moved, 0), 255))
    return image


@pytest.mark.parametrize(
    ("index", "k1", "k2", "digit", "shift"),
    [
        (70_000, 1010, 987, 0, 2),
        (70_001, 1275, 1254, 1, 6),
        (129_999, 774, 511, 59_999, 0),
        (169_999, 530, 1123, 39_999, 8),
    ],
)
def test_the_indices_are_infimnists(index, k1, k2, digit, shift):
    found = recipe(np.array([index]))
    assert (found.right[0], found.up[0], found.digit[0], found.shift[0]) == (k1, k2, digit, shift)


def test_the_indices_wrap_at_32_bits_and_use_every_field_and_shift():
    indices = np.arange(70_000, 170_000)
    found = recipe(indices)
    np.testing.assert_array_equal(found.right[::997], [((int(i) * 131071) & 0xFFFFFFFF) % 1521 for i in indices[::997]])
    assert set(found.right) == set(range(1521))
    assert set(found.up) == set(range(1522))
    assert tuple(zip(ROWS_DOWN, COLUMNS_RIGHT, strict=True)) == SHIFTS
    assert min(Counter(found.shift.tolist()).values()) > 10_000
    with pytest.raises(ValueError, match="start at index 70000, got 69999; those below are MNIST itself"):
        recipe(np.array([70_000, 69_999]))


def test_the_transform_is_the_formula_pixel_by_pixel(digits, fields):
    # One of each shift.
    parts = recipe(np.arange(70_000, 70_060))
    chosen = [int(np.flatnonzero(parts.shift == shift)[0]) for shift in range(9)]
    images = make(digits, [70_000 + at for at in chosen])
    for image, at in zip(images, chosen, strict=True):
        right, up = fields[parts.right[at]], fields[parts.up[at]]
        np.testing.assert_array_equal(image, slow_image(digits[parts.digit[at]], right, up, parts.shift[at]))


def test_pixels_shifted_out_do_not_come_in_again_on_the_other_side(digits):
    full = np.full_like(digits, 255)
    image = make(full, [129_999])[0]
    assert recipe(np.array([129_999])).shift[0] == 0
    assert (image[-1] == 0).all()
    assert (image[5:-5, 5:-5] == 255).all()


def test_without_a_field_it_is_the_shifted_digit(digits, monkeypatch):
    monkeypatch.setattr(transformed_digits, "displacement_fields", lambda: np.zeros((1522, 28, 28)))
    indices = np.arange(70_000, 70_100)
    parts = recipe(indices)
    for image, digit, shift in zip(make(digits, indices), parts.digit, parts.shift, strict=True):
        np.testing.assert_array_equal(image, moved(digits[digit], ROWS_DOWN[shift], COLUMNS_RIGHT[shift]))


def test_the_first_field_moves_to_the_right_and_the_second_upwards():
    row, column = np.mgrid[:28, :28]
    blob = (255 * np.exp(-((row - 13) ** 2 + (column - 14) ** 2) / 50)).astype(np.uint8)[None]
    one, none = np.ones((28, 28)), np.zeros((28, 28))
    for right, up, there in ((one, none, (0, 1)), (-one, none, (0, -1)), (none, one, (-1, 0)), (none, -one, (1, 0))):
        difference = deform(blob, right, up)[0] - moved(blob[0], *there).astype(float)
        assert np.abs(difference)[2:-2, 2:-2].max() < 8  # a wrong direction or axis: above 20


def test_tangent_images_are_slopes():
    row, column = np.mgrid[:28, :28]
    right, down = tangent_images((2 * row + 5 * column).astype(np.uint8)[None])
    np.testing.assert_allclose(right[0, 3:-3, 3:-3], 5, rtol=2e-3)
    np.testing.assert_allclose(down[0, 3:-3, 3:-3], 2, rtol=2e-3)


def test_fields_are_smooth_and_about_a_pixel(fields):
    assert fields.shape == (1522, 28, 28)
    rms = np.sqrt((fields**2).mean())
    assert rms == pytest.approx(1, abs=0.02)
    assert abs(fields.mean()) < 0.02
    # The borders move as the middle does.
    np.testing.assert_allclose(np.sqrt((fields**2).mean(0)), 1, atol=0.1)
    # White noise smoothed by a Gaussian of width 4 correlates as one of width 4 sqrt(2), along both axes.
    for lag in (1, 4, 8):
        expected = math.exp(-(lag**2) / (4 * 4**2))
        assert (fields[:, lag:] * fields[:, :-lag]).mean() == pytest.approx(expected, abs=0.03)
        assert (fields[:, :, lag:] * fields[:, :, :-lag]).mean() == pytest.approx(expected, abs=0.03)
    neighbours = (fields[1:] * fields[:-1]).mean()
    assert abs(neighbours) < 0.02


def test_the_same_digits_everywhere_and_in_any_chunks(digits, fields):
    # The arithmetic is exact: these hold for every machine.
    assert zlib.crc32((fields * 256).astype("<i2").tobytes()) == 3485527601
    indices = np.arange(70_000, 70_107)
    images = make(digits, indices)
    assert zlib.crc32(images.tobytes()) == 3473521745
    for chunk in (1, 50, 107):
        np.testing.assert_array_equal(make(digits, indices, chunk=chunk), images)
    np.testing.assert_array_equal(make(digits, indices[::-1]), images[::-1])
    assert make(digits, np.arange(0)).shape == (0, 28, 28)


def test_the_digits_are_changed_but_not_destroyed(digits):
    indices = np.arange(100_000, 101_000)
    parts, images = recipe(indices), make(digits, indices)
    back = [moved(image, -ROWS_DOWN[s], -COLUMNS_RIGHT[s]) for image, s in zip(images, parts.shift, strict=True)]
    flat = (np.reshape(x, (1000, -1)).astype(float) for x in (back, digits[parts.digit]))
    ours, bases = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in flat)
    similar = ours @ bases.T
    own = similar.diagonal()
    # Among a thousand digits its own is the nearest.
    assert (similar.argmax(1) == np.arange(1000)).mean() > 0.95
    assert own.min() > 0.75
    assert 0.92 < np.median(own) < 0.98
    assert own.max() < 0.999


def test_other_digits_are_refused(digits):
    with pytest.raises(ValueError, match=r"uint8 \[60000, 28, 28\]; got uint8 \[5000, 28, 28\]"):
        make(digits[:5000], [70_000])
    with pytest.raises(ValueError, match="got float32"):
        make(np.broadcast_to(np.float32(0), digits.shape), [70_000])


@pytest.fixture
def few(monkeypatch, tmp_path, data_dir, mnist, digits):
    """A data folder with the real MNIST, where digits100k is its first 200 images."""
    (tmp_path / "mnist").symlink_to((data_dir / "mnist").resolve())
    indices = range(70_000, 70_200)
    images = make(digits, indices)
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 200, 0, 0, 0, 28, 0, 0, 0, 28]) + images.tobytes()
    monkeypatch.setattr(data_sources, "_DIGITS100K", indices)
    monkeypatch.setattr(data_sources, "_DIGITS100K_MD5", hashlib.md5(raw).hexdigest())
    return tmp_path, images, tmp_path / "digits100k" / "transformed-images-idx3-ubyte"


def test_the_data_set_has_the_digits_labels_and_the_real_test_set(few, mnist):
    folder, images, _ = few
    train, test = data.load("digits100k", folder, progress=False)
    np.testing.assert_array_equal(train.pixels[:, 0], images)
    assert train.pixels.shape == (200, 1, 28, 28)
    # 70000 is made of MNIST's first training digit, and so on.
    assert torch.equal(train.labels, mnist[0].labels[:200])
    assert train.title == "0.1M transformed digits"
    assert (train.split, test.split) == ("train", "test")
    assert torch.equal(test.pixels, mnist[1].pixels)
    assert torch.equal(test.labels, mnist[1].labels)


def test_they_are_made_once(few, monkeypatch, capsys):
    folder, images, path = few
    data.load("digits100k", folder)
    assert "200/200" in capsys.readouterr().err
    assert path.stat().st_size == 16 + 200 * 784
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(data_sources, "transformed_digits", None)
    train, _ = data.load("digits100k", folder)
    np.testing.assert_array_equal(train.pixels[:, 0], images)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b""])
def test_a_damaged_file_is_made_anew_with_a_warning(few, damage, caplog):
    folder, images, path = few
    data.load("digits100k", folder, progress=False)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    train, _ = data.load("digits100k", folder, progress=False)
    assert "transformed-images-idx3-ubyte is corrupt" in caplog.text
    assert "making it again" in caplog.text
    np.testing.assert_array_equal(train.pixels[:, 0], images)
    assert path.read_bytes() == whole


def test_digits_that_came_out_otherwise_are_not_kept(few, monkeypatch):
    folder, _, path = few
    monkeypatch.setattr(transformed_digits, "_FIELD_SEED", 1)
    with pytest.raises(FileError, match=r"made here have MD5 .*, expected .*; please report it"):
        data.load("digits100k", folder, progress=False)
    assert not path.exists()


def test_without_all_of_mnist_there_are_none(tmp_path, monkeypatch):
    def refuse(name, target):
        raise OSError("offline")

    monkeypatch.setattr(data_sources, "_from_torchvision", refuse)
    with pytest.raises(FileError, match=r"needs all 60,000 training digits of MNIST: mnist could not be downloaded"):
        data.load("digits100k", tmp_path)
    assert not (tmp_path / "digits100k").exists()


def test_a_holdout_would_be_seen_in_training(tmp_path):
    with pytest.raises(ValueError, match=r"holdout must be 0 with 'digits100k', got 500: .* choose recipes on 'mnist'"):
        data.load("digits100k", tmp_path, holdout=500)
