"""Crop and flip against slow loops, and the geometry of the boxes."""

import math

import numpy as np
import pytest
import torch

from clicktrain.data.augment import RESIZED_CROP_DRAWS, centred_box, crop_flip, resized_crop_box


def crop_flip_in_loops(images, generator, padding=4):
    """The same draws, pixel by pixel."""
    batch, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator).squeeze(2)
    flip = torch.rand(batch, 1, generator=generator).squeeze(1) < 0.5
    result = torch.zeros_like(images)
    for b in range(batch):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    row = y + int(top[b]) - padding
                    column = (width - 1 - x if flip[b] else x) + int(left[b]) - padding
                    if 0 <= row < height and 0 <= column < width:
                        result[b, c, y, x] = images[b, c, row, column]
    return result


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (5, 1, 7, 10), (1, 2, 3, 1)])
def test_crop_flip_equals_loops(shape):
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    before = images.clone()
    found = crop_flip(images, torch.Generator().manual_seed(8))
    assert torch.equal(found, crop_flip_in_loops(images, torch.Generator().manual_seed(8)))
    assert torch.equal(images, before)
    assert found.is_contiguous()


def test_crop_flip_reaches_every_offset_and_both_sides():
    """A lone pixel in the middle lands on each of 9x9 places, mirrored or not."""
    images = torch.zeros(4000, 1, 17, 17, dtype=torch.uint8)
    images[:, :, 8, 8] = 1
    images[:, :, 8, 9] = 2  # right of it, unless flipped
    out = crop_flip(images, torch.Generator().manual_seed(0))[:, 0]
    ones = (out == 1).nonzero()
    twos = (out == 2).nonzero()
    assert len(ones) == len(twos) == 4000
    places = {tuple(place) for place in ones[:, 1:].tolist()}
    assert places == {(y, x) for y in range(4, 13) for x in range(4, 13)}
    right = float((twos[:, 2] > ones[:, 2]).float().mean())
    assert right == pytest.approx(0.5, abs=0.03)


def test_resized_crop_boxes_are_inside_with_the_stated_area_and_ratio():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(3000):
        width, height = (int(n) for n in rng.integers(60, 200, 2))
        left, top, right, bottom = resized_crop_box(width, height, rng.random(RESIZED_CROP_DRAWS))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        ratio = (right - left) / (bottom - top)
        assert 0.7 < ratio < 1 / 0.7  # 3/4 .. 4/3 before edges are rounded
        shares.append((right - left) * (bottom - top) / (width * height))
    assert min(shares) > 0.07
    assert max(shares) > 0.9
    assert 0.4 < np.mean(shares) < 0.56  # 0.54 but for the boxes that did not fit


def test_resized_crop_falls_back_to_the_largest_centred_box():
    draws = np.full(RESIZED_CROP_DRAWS, 0.999)  # wants nearly everything at ratio 4/3
    assert resized_crop_box(300, 30, draws) == (130.0, 0.0, 170.0, 30.0)
    left, top, right, bottom = resized_crop_box(30, 300, draws)
    assert (left, right) == (0.0, 30.0)
    assert math.isclose(bottom - top, 40.0)
    assert math.isclose((top + bottom) / 2, 150.0)


def test_resized_crop_takes_the_first_box_that_fits():
    draws = np.full(RESIZED_CROP_DRAWS, 0.5)
    draws[0] = 0.999999  # the first try has the whole area ...
    draws[10] = 0.999999  # ... at ratio 4/3: too wide for a square
    left, top, right, bottom = resized_crop_box(100, 100, draws)
    assert right - left == bottom - top == 73  # sqrt(0.54) of 100, rounded
    assert (left, top) == (14, 14)


def test_centred_box():
    assert centred_box(10, 20, 4, 4) == (3.0, 8.0, 7.0, 12.0)
