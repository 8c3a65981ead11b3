"""What a function on tensor cores reads and writes, and the tiles that rectangles of its pixels need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from clicktrain.kernels.cuda.codegen import Pair
from clicktrain.kernels.cuda.tensor_text import IMAGES, Tile
from clicktrain.kernels.plan import Plan

SMALL = 64
"""Pixels of images that may be taken by single groups: else there are too few blocks of threads."""


@dataclass(frozen=True)
class Geometry:
    """What a function reads and writes, as a convolution.

    Attributes
    ----------
    source, target : (int, int)
        Size of the images that are read from tiles, and of the positions.
    stride, spread, padding : (int, int)
        Position r and tap k meet in tile pixel r * stride + k; tile pixel q shows image pixel (q - padding) / spread.
    batch_last : bool
        The format of the images; see tensor.cuh.
    """

    source: Pair
    target: Pair
    stride: Pair
    spread: Pair
    padding: Pair
    kernel_size: int
    batch_last: bool = False

    @classmethod
    def forward(cls, plan: Plan, batch_last: bool = False) -> Geometry:
        """Return what the forward pass and the gradient of the values do."""
        return cls(
            plan.input_shape[2:], plan.output_shape[2:], plan.stride, (1, 1), plan.padding, plan.pool.kernel_size,
            batch_last,
        )  # fmt: skip

    @classmethod
    def transposed(cls, plan: Plan, batch_last: bool = False) -> Geometry:
        """Return what the input gradient does: dy is spread out by the stride."""
        last = plan.pool.kernel_size - 1
        padding = (last - plan.padding[0], last - plan.padding[1])
        return cls(plan.output_shape[2:], plan.input_shape[2:], (1, 1), plan.stride, padding, last + 1, batch_last)

    def tile(self, rect: Pair, groups: int, channels: int) -> Tile:
        """Return the tile that a rectangle of positions reads."""
        rows, columns = ((r - 1) * s + self.kernel_size for r, s in zip(rect, self.stride, strict=True))
        whole = (rect[0] >= self.target[0], rect[1] >= self.target[1])
        width = 1 if self.batch_last else read_width(self.source[1], columns if not whole[1] else self.source[1])
        taken = [
            image if all_of_it else (size - 1) // spread + (2 if spread > 1 else 1)
            for image, all_of_it, size, spread in zip(self.source, whole, (rows, columns), self.spread, strict=True)
        ]
        reads = taken[1] // width if whole[1] else (taken[1] + 2 * width - 2) // width  # wherever they start
        row_pitch, channel_modulus = self._pitches(columns)
        group_pitch = self.group_pitch(rows * row_pitch, groups)
        channel_pitch = following(groups * group_pitch, *channel_modulus)
        return Tile(
            channels, groups, (rows, columns), row_pitch, group_pitch, channel_pitch, (taken[0], reads), whole, width,
            self.spread,
        )  # fmt: skip

    def _pitches(self, columns: int) -> tuple[int, tuple[int, int]]:
        """Return the row pitch, and (remainder, modulus) of the channel pitch; see tensor.cuh."""
        if self.kernel_size == 1:
            return columns, (1, 2)
        return following(columns, 2, 4), (4, 8)

    def group_pitch(self, units: int, groups: int) -> int:
        """Return the distance of groups of so many units: batch last, copies write all groups of neighbouring pixels.

        Eight of these units do not meet in a bank.
        """
        if not self.batch_last or groups == 1:
            return units
        return following(units, *((4, 8) if groups == 2 else (2, 4) if groups < 8 else (1, 2)))

    def rects(self, rect: Pair) -> Pair:
        """Return how many rectangles there are vertically and horizontally."""
        return ceil(self.target[0] / rect[0]), ceil(self.target[1] / rect[1])

    def cuts(self, positions: int, images: int) -> Iterator[tuple[Pair, int]]:
        """Yield rectangles and groups of images of at most so many positions."""
        rows, columns = self.target
        if self.batch_last:
            most = min(positions, ceil(images / IMAGES))
            least = 2 if most > 1 and rows * columns > SMALL else 1  # one alone is half of a sector
            for groups in (g for g in (16, 8, 4, 2, 1) if least <= g <= most):
                yield from ((rect, groups) for rect in self._rects(positions // groups))
            return
        for rect in self._rects(positions):
            fits = positions // (rect[0] * rect[1]) if rect == self.target else 1
            for groups in sorted({1, min(fits, ceil(images / IMAGES))}):
                yield rect, groups

    def _rects(self, positions: int) -> Iterator[Pair]:
        """Yield rectangles of at most so many pixels."""
        rows, columns = self.target
        widths = {columns, *(w for w in (32, 16, 8, 4, 2) if w < columns)}
        for width in sorted(w for w in widths if w <= positions):
            height = min(rows, positions // width)
            yield ceil(rows / ceil(rows / height)), width  # even cuts


def read_width(row: int, wanted: int) -> int:
    """Return how many pixels are read at once of rows of some length, where so many are wanted of a row."""
    return next(width for width in (4, 2, 1) if row % width == 0 and (width < 4 or wanted % 4 == 0 or wanted >= 12))


def following(least: int, remainder: int, modulus: int) -> int:
    """Return the smallest number from `least` on with that remainder."""
    return least + (remainder - least) % modulus
