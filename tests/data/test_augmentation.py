"""Random crops and mirror images, pixel by pixel."""

import torch

from ppl_bnn.data.augmentation import AUGMENTATIONS, crop_flip


def shifted(image, down, right, mirrored):
    """What one image becomes, done by hand."""
    height, width = image.shape[1:]
    padded = torch.zeros(image.shape[0], height + 8, width + 8)
    padded[:, 4 : 4 + height, 4 : 4 + width] = image
    crop = padded[:, down : down + height, right : right + width]
    return crop.flip(2) if mirrored else crop


def test_every_image_is_a_shift_and_mirror_of_its_own_and_all_of_them_occur():
    x = torch.rand(1, 3, 6, 5).expand(4000, -1, -1, -1)
    found = crop_flip(x)
    candidates = {
        shifted(x[0], down, right, mirrored).numpy().tobytes(): (down, right, mirrored)
        for down in range(9)
        for right in range(9)
        for mirrored in (False, True)
    }
    drawn = [candidates[image.contiguous().numpy().tobytes()] for image in found]
    assert len(set(drawn)) == len(candidates) == 162
    for at, values in enumerate((9, 9, 2)):
        counts = torch.tensor([int(draw[at]) for draw in drawn]).bincount(minlength=values)
        expected = 4000 / values
        # Chi-square with `values` - 1 degrees of freedom stays below 30 but for one case in two thousand.
        assert ((counts - expected) ** 2 / expected).sum() < 30


def test_none_changes_nothing():
    x = torch.rand(2, 1, 4, 4)
    assert AUGMENTATIONS["none"](x) is x
