"""Transformed digits after infinite MNIST (Loosli, Canu and Bottou 2007): infimnist-compatible indexing, own fields.

An index i >= 70000 identifies one image. It is MNIST's training digit a, deformed by two smooth random displacement
fields and shifted by at most a pixel. The deformation is first-order Taylor, along the digit's tangent images.

    a  = (i - 10000) mod 60000
    k1 = ((i 131071) mod 2^32) mod 1521,  k2 = (k1 + 1 + 2 i) mod 1522
    image = shift_{k1 mod 9}(floor(clamp(base - (F[k1] T0 - F[k2] T1), 0, 255)))

a, k1, k2 and the shift are those of infimnist. Its field file is not available, so the images differ from infimnist's.

Taps and fields are rounded to multiples of powers of two. Then all arithmetic is exact in float64; the comments count
the bits. So the images are the same on every machine, in any order of additions.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ppl_bnn.errors import UserError

SIDE = 28
NUM_FIELDS = 1522
NUM_DIGITS = 60_000
FIRST_INDEX = 70_000
# (rows down, columns to the right) of k1 mod 9.
SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0))

_FIELD_WIDTH = 4.0  # pixels
_FIELD_RMS = 1.0  # pixels
_FIELD_SEED = 2007
_TANGENT_WIDTH = 1.0  # pixels


def transformed_digits(
    digits: NDArray[np.uint8], indices: NDArray[np.int64], *, progress: bool = True, chunk: int = 1000
) -> NDArray[np.uint8]:
    """Make the images of `indices`.

    Args:
        digits: uint8 [60000, 28, 28], MNIST's training digits in their order.
        indices: int64 [N], each at least 70000. Smaller indices are MNIST itself.
        progress: show a progress bar.
        chunk: number of images made at a time. It only changes the memory, about 100 kB an image.

    Returns:
        uint8 [N, 28, 28]. The label of image n is that of digit ``recipe(indices).digit[n]``.

    Raises:
        UserError: other digits than 60,000 of 28x28 bytes, or an index below 70000.
    """
    if digits.shape != (NUM_DIGITS, SIDE, SIDE) or digits.dtype != np.uint8:
        raise UserError(
            f"transformed digits are made of MNIST's training digits, uint8 {[NUM_DIGITS, SIDE, SIDE]}; "
            f"got {digits.dtype} {list(digits.shape)}"
        )
    parts, fields = recipe(indices), displacement_fields()
    images = np.empty((len(indices), SIDE, SIDE), np.uint8)
    with tqdm(total=len(indices), disable=not progress, desc="transforming digits", unit="image") as bar:
        for start in range(0, len(indices), chunk):
            at = slice(start, start + chunk)
            deformed = deform(digits[parts.digit[at]], fields[parts.right[at]], fields[parts.up[at]])
            images[at] = _shift(deformed, parts.shift[at])
            bar.update(len(deformed))
    return images


@dataclass(frozen=True)
class Recipe:
    """How each image is made, int64 [N] each.

    Attributes:
        digit: a, in 0..59999, the training digit.
        right: k1, in 0..1520, the field that moves it to the right.
        up: k2, in 0..1521, the field that moves it upwards.
        shift: position in SHIFTS.
    """

    digit: NDArray[np.int64]
    right: NDArray[np.int64]
    up: NDArray[np.int64]
    shift: NDArray[np.int64]


def recipe(indices: NDArray[np.int64]) -> Recipe:
    """Split `indices` (int64 [N], each at least 70000) into the parts of a recipe.

    Raises:
        UserError: an index below 70000.
    """
    i = np.asarray(indices, np.int64)
    if len(i) and i.min() < FIRST_INDEX:
        raise UserError(f"transformed digits start at index {FIRST_INDEX}, got {i.min()}; those below are MNIST itself")
    # infimnist multiplies in 32 bits.
    k1 = (i * 131_071) % 2**32 % (NUM_FIELDS - 1)
    return Recipe(digit=(i - 10_000) % NUM_DIGITS, right=k1, up=(k1 + 1 + 2 * i) % NUM_FIELDS, shift=k1 % len(SHIFTS))


def displacement_fields() -> NDArray[np.float64]:
    """Make F [1522, 28, 28], in pixels: uniform noise smoothed by a Gaussian, with RMS 1 over fields and pixels.

    The values are multiples of 1/256 below 8: 11 bits.
    """
    taps = _gaussian(_FIELD_WIDTH)
    side = SIDE + len(taps) - 1
    shape = (NUM_FIELDS, side, side)
    # numpy promises not to change the bit generator's own stream. Each word holds 8 numbers.
    words = np.random.PCG64(_FIELD_SEED).random_raw(-(-math.prod(shape) // 8)).astype("<u8")
    noise = words.view(np.int8)[: math.prod(shape)].reshape(shape).astype(np.float64) + 0.5
    # The noise extends beyond the image by the filter's radius, so that the borders move as much as the middle.
    rms = np.sqrt((256**2 - 1) / 12) * (taps**2).sum()
    fields: NDArray[np.float64] = np.rint(_filter(noise, taps, taps) / rms * _FIELD_RMS * 256) / 256
    return fields


def tangent_images(base: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return T0 and T1 [N, 28, 28] of `base` (uint8 [N, 28, 28]): slopes right and down, in grey levels a pixel.

    They are Gaussian derivative filters: the derivative of a Gaussian along one axis, and the Gaussian along the other.
    Outside the image everything is 0. The values are multiples of 2^-24 below 2^8: 32 bits.
    """
    taps = _gaussian(_TANGENT_WIDTH)
    radius = len(taps) // 2
    distance = np.arange(-radius, radius + 1)
    # The taps of a correlation with the image, scaled so that a ramp of slope 1 gives 1.
    slope = _rounded(distance * taps / (distance**2 * taps).sum())
    padded = np.pad(base, ((0, 0), (radius, radius), (radius, radius))).astype(np.float64)
    return _filter(padded, taps, slope), _filter(padded, slope, taps)


def deform(base: NDArray[np.uint8], right: NDArray[np.float64], up: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Move each pixel of `base` (uint8 [N, 28, 28]) by `right` and `up` ([N, 28, 28] or [28, 28], pixels).

    To first order base(p - d) = base - d . slope. T1 is the slope downwards, which explains the sign of `up`.
    """
    t0, t1 = tangent_images(base)
    # The product has 43 bits, and the difference is exact too. So the truncation depends on no rounding.
    return np.clip(base - (right * t0 - up * t1), 0, 255).astype(np.uint8)


def _shift(images: NDArray[np.uint8], shift: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Move each image [N, 28, 28] by SHIFTS[shift] ([N]). Zeros fill the border."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    shifted = np.empty_like(images)
    for number, (down, right) in enumerate(SHIFTS):
        chosen = shift == number
        shifted[chosen] = padded[chosen, 1 - down : 1 - down + SIDE, 1 - right : 1 - right + SIDE]
    return shifted


def _gaussian(width: float) -> NDArray[np.float64]:
    """Return the taps of a Gaussian, out to 3 of its standard deviations `width`. Their sum is about 1."""
    radius = int(3 * width)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    return _rounded(taps / taps.sum())


def _rounded(taps: NDArray[np.float64]) -> NDArray[np.float64]:
    # Rounded to multiples of 2^-12, two passes over bytes have 24 fractional bits, and no sum is rounded.
    rounded: NDArray[np.float64] = np.rint(taps * 2**12) / 2**12
    return rounded


def _filter(images: NDArray[np.float64], down: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate images [N, H, W] with `down` along H and `right` along W, at the positions where both fit inside."""
    half = np.lib.stride_tricks.sliding_window_view(images, len(down), axis=1) @ down
    filtered: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(half, len(right), axis=2) @ right
    return filtered
