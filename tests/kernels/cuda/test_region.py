"""Where windows lie in shared memory: every pixel in a place of its own, lanes in different banks."""

from __future__ import annotations

from itertools import product

import pytest

from clicktrain.kernels.cuda.region import BANKS, Region, conflicts, groups, lane_grids

REGIONS = {
    "a whole image": Region((1, 8, 4), 1, (6, 10), (4, 8)),
    "two images": Region((2, 4, 4), 1, (6, 6), (4, 4)),
    "sixteen halves": Region((16, 2, 1), 1, (6, 8), (4, 8)),
    "an image a lane": Region((32, 1, 1), 4, (2, 2), (2, 2)),
    "an odd step": Region((8, 1, 4), 1, (6, 9), (4, 7)),
    "stride 2": Region((4, 4, 2), 1, (5, 9), (4, 8)),
    "four words at once": Region((2, 4, 4), 1, (4, 4), (4, 4), vector=4),
    "idle lanes": Region((1, 7, 4), 1, (4, 16), (2, 14)),
}
UNEVEN = REGIONS["stride 2"], REGIONS["idle lanes"]
"""Three directions of lanes whose steps no linear pitches spread over all banks."""


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_no_two_pixels_share_a_place_and_lanes_share_few_banks(region):
    images, rows, columns = region.size
    places = {
        i * region.image_pitch + r * region.row_pitch + r // region.step[0] * region.skew + c
        for i, r, c in product(range(images), range(rows), range(columns))
    }
    assert len(places) == region.pixels
    assert max(places) < region.words
    assert conflicts(region) == (2 if region in UNEVEN else 1)
    assert all(pitch % region.vector == 0 for pitch in (region.row_pitch, region.skew, region.image_pitch))


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_offsets_lead_from_a_corner_to_the_pixel(region):
    for seat in product(*map(range, region.lanes)):
        corner = (
            seat[0] * region.image_pitch
            + seat[1] * (region.step[0] * region.row_pitch + region.skew)
            + seat[2] * region.step[1]
        )
        for i, r, c in product(range(region.images), range(region.window[0]), range(region.window[1])):
            row, image = seat[1] * region.step[0] + r, seat[0] + i * region.lanes[0]
            place = image * region.image_pitch + row * region.row_pitch + row // region.step[0] * region.skew
            assert corner + region.offset(i, r, c) == place + seat[2] * region.step[1] + c


def test_conflicts_are_counted():
    """Corners a multiple of 32 words apart meet in one bank: what the pitches avoid, where they can."""
    assert conflicts(Region((1, 1, 32), 1, (1, 32), (1, 32))) == BANKS
    assert conflicts(Region((1, 1, 16), 1, (1, 2), (1, 2))) == 1
    assert conflicts(Region((1, 1, 32), 1, (1, 2), (1, 2))) == 2


@pytest.mark.parametrize("exact", [False, True])
def test_grids_of_lanes_cover_the_patches(exact):
    grids = list(lane_grids((7, 4), 10, exact))
    assert (1, 7, 4) in grids
    for images, rows, columns in grids:
        assert images * rows * columns <= 32
        assert not exact or (7 % rows == 0 and 4 % columns == 0)
        count = groups((images, rows, columns), (7, 4), 10)
        assert count * images * rows * columns >= 10 * 7 * 4
