"""Where the patches of a block's lanes lie: in the image, and in shared memory without bank conflicts.

A block's lanes take a grid of neighbouring patches, so that their windows overlap in one rectangle of the input, which
is copied row by row: neighbouring threads read neighbouring pixels, and no pixel twice. A load of a warp then touches
one word at the same offset from each lane's corner. Pitches are chosen so that the 32 corners fall into
different banks; what an even pitch cannot do, `skew` does: every row of patches begins that many words later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

LANES = 32
BANKS = 32
_SPARE_PITCH = 8  # words by which a row may be longer than its pixels

Pair = tuple[int, int]
Triple = tuple[int, int, int]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """The input of a block's patches, for one channel.

    Attributes
    ----------
    lanes : (int, int, int)
        Patches along images, rows and columns; together at most 32.
    images : int
        Images of a patch, as many apart as there are lanes along images.
    window, step : (int, int)
        Rows and columns of a patch's window, and from one window to the next.
    vector : int
        Words of a row that a lane loads at once, 1 or 4; all pitches are multiples of it.
    """

    lanes: Triple
    images: int
    window: Pair
    step: Pair
    vector: int = 1

    @property
    def size(self) -> Triple:
        """Images, rows and columns."""
        rows, columns = (
            (count - 1) * step + window
            for count, step, window in zip(self.lanes[1:], self.step, self.window, strict=True)
        )
        return self.lanes[0] * self.images, rows, columns

    @property
    def pixels(self) -> int:
        """Pixels that are copied."""
        images, rows, columns = self.size
        return images * rows * columns

    @cached_property
    def _pitches(self) -> Triple:
        return _pitches(self.lanes, self.size[1:], self.step, self.vector)

    @property
    def row_pitch(self) -> int:
        """Words from one row to the next, within a row of patches."""
        return self._pitches[0]

    @property
    def skew(self) -> int:
        """Words by which every row of patches is moved against the one above."""
        return self._pitches[1]

    @property
    def image_pitch(self) -> int:
        """Words from one image to the next."""
        return self._pitches[2]

    @property
    def words(self) -> int:
        """Words of shared memory."""
        return self.size[0] * self.image_pitch

    def offset(self, image: int, row: int, column: int) -> int:
        """Return the place of a window's pixel, from the window's corner."""
        return (
            image * self.lanes[0] * self.image_pitch + row * self.row_pitch + row // self.step[0] * self.skew + column
        )

    def constants(self) -> dict[str, int]:
        """Return what the kernels know by name."""
        images, rows, columns = self.size
        return {
            "LANE_IMAGES": self.lanes[0], "LANE_ROWS": self.lanes[1], "LANE_COLUMNS": self.lanes[2],
            "REGION_IMAGES": images, "REGION_ROWS": rows, "REGION_COLUMNS": columns, "STEP_ROWS": self.step[0],
            "STEP_COLUMNS": self.step[1], "ROW_PITCH": self.row_pitch, "SKEW": self.skew,
            "IMAGE_PITCH": self.image_pitch,
        }  # fmt: skip


@cache
def conflicts(region: Region) -> int:
    """Return how many accesses a load of a warp takes: 1 where no two corners share a bank."""
    images, bands = np.array([region.image_pitch]), np.array([region.step[0] * region.row_pitch + region.skew])
    return int(collisions(region.lanes, images, bands, region.step[1], region.vector)[0])


def lane_grids(tiles: Pair, patches: int, exact: bool) -> Iterator[Triple]:
    """Yield the grids of at most 32 patches.

    Parameters
    ----------
    tiles : (int, int)
        Patches along the rows and columns of an image.
    patches : int
        Patches along the images.
    exact : bool
        Only grids that divide the image's.
    """
    for columns in range(1, min(LANES, tiles[1]) + 1):
        for rows in range(1, min(LANES // columns, tiles[0]) + 1):
            if not exact or (tiles[0] % rows == 0 and tiles[1] % columns == 0):
                yield max(1, min(LANES // (rows * columns), patches)), rows, columns


def groups(lanes: Triple, tiles: Pair, patches: int) -> int:
    """Return how many regions cover all outputs."""
    return ceil(patches / lanes[0]) * ceil(tiles[0] / lanes[1]) * ceil(tiles[1] / lanes[2])


def collisions(lanes: Triple, images: Integers, bands: Integers, column: int, vector: int) -> Integers:
    """Return, for each choice of steps along images and bands, how many lanes share the fullest bank.

    Lanes that load `vector` words at once are served in `vector` turns, each with all banks.
    """
    image, band, place = (grid.ravel() for grid in np.indices(lanes))
    slots = BANKS // vector
    turn = np.arange(len(image)) // slots
    banks = (images[:, None] * image + bands[:, None] * band + column * place) // vector % slots + turn * slots
    numbers = np.arange(len(images))[:, None] * BANKS + banks
    counts: Integers = np.bincount(numbers.ravel(), minlength=len(images) * BANKS).reshape(-1, BANKS).max(1)
    return counts


@cache
def _pitches(lanes: Triple, size: Pair, step: Pair, vector: int) -> Triple:
    """Return row pitch, skew and image pitch: without skew where no lanes collide so, for patterns share code then."""
    for skews in (range(1), range(0, BANKS, vector)):
        best, fewest = _best_pitches(lanes, size, step, vector, skews)
        if fewest == 1:
            break
    return best


def _best_pitches(lanes: Triple, size: Pair, step: Pair, vector: int, skews: range) -> tuple[Triple, int]:
    """Return the pitches with the fewest conflicts, then the fewest words, and the conflicts."""
    rows, columns = size
    first = -(-columns // vector) * vector
    pitch, skew, spare = (
        grid.ravel().astype(np.int64)
        for grid in np.mgrid[
            first : first + _SPARE_PITCH : vector, skews.start : skews.stop : skews.step, 0:BANKS:vector
        ]
    )
    image_pitch = rows * pitch + (rows - 1) // step[0] * skew + spare
    conflicts = collisions(lanes, image_pitch, step[0] * pitch + skew, step[1], vector)
    best = np.lexsort((image_pitch, conflicts))[0]
    return (int(pitch[best]), int(skew[best]), int(image_pitch[best])), int(conflicts[best])
