"""How a pass is cut into tiles: what may be chosen, and the sizes, windows and shapes that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import Literal

import numpy as np

from clicktrain.kernels.cpu import codegen
from clicktrain.kernels.cpu.codegen import LANES, TileShape
from clicktrain.kernels.cpu.layer import Layer, Pair
from clicktrain.kernels.cpu.library import cache_bytes

MIN_PART = 16
"""The fewest filters of a part in sweeps by channel."""
MOST_CHANNELS = 65535
"""In a window, since runs are counted in 16 bits."""
STREAMED_BYTES = 2 << 20
"""Outputs from this size on bypass the caches: they would push out the windows, and each of their lines would be
read from memory before it is written."""


@dataclass(frozen=True)
class Choice:
    """How a pass is cut up.

    The order of sums, hence the last bits, depends on `channel_block` alone, and with sweeps by channel on nothing:
    they add channel after channel. Winograd's transform adds other numbers, and rounds otherwise.

    Attributes
    ----------
    sweep : {"filters", "filter_pairs", "filter_blocks", "channels", "channel_pairs", "taps", "winograd"}
        The compute kernel: specialised for the pool, filter by filter or channel by channel, on single pixels or pairs
        of them, along a row or of two blocks; or generic; or by Winograd's transform.
    tile : (int, int, int)
        Blocks, rows and columns of output pixels that are computed at once; one block in sweeps by channel, two in
        "filter_blocks".
    band : int
        Tiles along the columns that share a window; one in sweeps by channel.
    channel_block : int
        Input channels in a window, at most `MOST_CHANNELS`.
    group : int
        Patterns that a sweep by filters does at once.
    """

    sweep: codegen.Sweep | Literal["taps", "winograd"]
    tile: tuple[int, int, int]
    band: int
    channel_block: int
    group: int


@dataclass(frozen=True)
class Window:
    """The input pixels that one tile reads.

    Attributes
    ----------
    start : (int, int)
        Input pixel where the window of the first tile starts; negative: in the padding.
    size : (int, int)
        Rows and columns.
    pitch : int
        Pixels from one row to the next in memory.
    origin : (int, int)
        Output pixel r of a tile and tap k meet in window pixel (r * stride + k + origin) / spread.
    """

    start: Pair
    size: Pair
    pitch: int
    origin: Pair

    @classmethod
    def of(cls, layer: Layer, choice: Choice) -> Window:
        """Return the window of a tile; where one tile spans the output, specialised sweeps need no padding."""
        axes = []
        for axis, tile in enumerate((choice.tile[1], band_width(layer, choice))):
            padding, spread = layer.padding[axis], layer.spread[axis]
            start = -(padding // spread)
            last = ((tile - 1) * layer.stride[axis] + layer.kernel_size - 1 - padding) // spread
            if choice.sweep != "taps" and tile >= layer.out_size[axis]:
                start, last = max(start, 0), min(last, layer.in_size[axis] - 1)
            axes.append((start, max(1, last - start + 1), -padding - start * spread))
        (start_h, size_h, origin_h), (start_w, size_w, origin_w) = axes
        pitch = _pitch(size_h * choice.tile[0], size_w, choice.channel_block)
        return cls((start_h, start_w), (size_h, size_w), pitch, (origin_h, origin_w))

    @property
    def pixels(self) -> int:
        """Places in memory of one channel of one block."""
        return self.size[0] * self.pitch


@cache
def _pitch(rows: int, columns: int, channels: int) -> int:
    """Return a distance of rows that spreads the start of all rows well over the sets of the first-level cache."""
    sets, pixels_per_line = 64, 2

    def crowding(pitch: int) -> int:
        lines = np.arange(rows * channels) * pitch // pixels_per_line
        return int(np.bincount(lines % sets).max())

    return min(range(columns, columns + 5), key=lambda pitch: (crowding(pitch), pitch))


def taps_tile(layer: Layer) -> tuple[int, int, int]:
    """Return a tile that the generic sweep is compiled for."""
    rows, columns = 2, 4
    return (1, rows * layer.spread[0], columns * layer.spread[1])


def filters_at_once(tile: tuple[int, int, int]) -> int:
    """Return the filters whose sums fill the first-level cache.

    Windows are in registers meanwhile. The longer the runs, the fewer loops end unforeseen: with half of the cache,
    layers of 256 filters at 8x were a sixth slower.
    """
    return max(MIN_PART, cache_bytes(1) // (4 * math.prod(tile) * LANES))


def band_width(layer: Layer, choice: Choice) -> int:
    """Return the output columns of the widest band."""
    columns = cuts(layer.out_size[1], choice.tile[2], layer.spread[1])
    bands = cuts(len(columns), choice.band, 1)
    ends = [columns[first + count - 1][0] + choice.tile[2] for first, count in bands]
    return max(end - columns[first][0] for (first, _), end in zip(bands, ends, strict=True))


def cuts(size: int, tile: int, spread: int) -> list[Pair]:
    """Return start and length of the tiles along an axis, as `struct Cuts` of convolution.h does."""
    count, units = -(-size // tile), -(-size // spread)
    edges = [min(size, i * units // count * spread) for i in range(count + 1)]
    return [(start, end - start) for start, end in pairwise(edges)]


def tile_count(layer: Layer, blocks: int, choice: Choice) -> int:
    """Return the tiles of a pass."""
    rows, columns = (-(-size // tile) for size, tile in zip(layer.out_size, choice.tile[1:], strict=True))
    return -(-blocks // choice.tile[0]) * rows * columns


def tile_shapes(layer: Layer, blocks: int, choice: Choice, window: Window) -> list[TileShape]:
    """Return the shape of each tile of a pass, along columns, rows, blocks."""
    return [
        TileShape(count, rows, columns, window_rows, window_columns)
        for (_, count), (rows, window_rows), (columns, window_columns) in product(
            cuts(blocks, choice.tile[0], 1),
            _axis_shapes(layer, choice, window, 0),
            _axis_shapes(layer, choice, window, 1),
        )
    ]


def _axis_shapes(layer: Layer, choice: Choice, window: Window, axis: int) -> list[tuple[int, Pair]]:
    """Return for each tile along an axis its length and what it reads of its window that is not padding."""
    stride, spread, origin = layer.stride[axis], layer.spread[axis], window.origin[axis]
    shapes = []
    for start, length in cuts(layer.out_size[axis], choice.tile[axis + 1], spread):
        first = window.start[axis] + start * stride // spread
        low, high = -(-origin // spread), ((length - 1) * stride + layer.kernel_size - 1 + origin) // spread + 1
        shapes.append((length, (max(low, -first), min(high, layer.in_size[axis] - first))))
    return shapes


def streams(layer: Layer, blocks: int, tile: tuple[int, int, int]) -> bool:
    """Tell whether outputs bypass the caches: they are large, and tiles fill whole cache lines (two pixels)."""
    height, width = layer.out_size
    large = 4 * LANES * blocks * layer.filters * height * width >= STREAMED_BYTES
    whole_lines = all(start % 2 == 0 and length % 2 == 0 for start, length in cuts(width, tile[2], layer.spread[1]))
    return large and whole_lines
