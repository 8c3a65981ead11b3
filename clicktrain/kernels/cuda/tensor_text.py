"""Writes the text of a CUDA unit for tensor cores: constants and the kernels of tensor.cuh and of one function.

`render` is pure: equal specifications give equal text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Literal

from clicktrain.kernels.cuda.codegen import ELEMENTS, Dtype, Pair, _source
from clicktrain.kernels.cuda.region import LANES

IMAGES = 8
"""Images of a unit: 16 bytes of one pixel, a row of `ldmatrix`."""
FILTERS = 16
"""Filters of a block: the rows of `mma.m16n8k16`."""
STEP = 16
"""Rows of a block's matrix that are multiplied at once: the depth of `mma.m16n8k16`."""
UNIT_BYTES = 16
RESIDENT_WARPS = 16
"""Warps of a multiprocessor that have 128 registers each."""

Function = Literal["forward", "grad_input", "grad_values"]
FILES: dict[Function, tuple[str, ...]] = {
    "forward": ("tensor_forward.cuh",),
    "grad_input": ("tensor_input.cuh",),
    "grad_values": ("tensor_values.cuh", "finish.cuh"),
}
SOURCES = ("platform.cuh", "tensor.cuh", *chain(*FILES.values()))


@dataclass(frozen=True)
class Tile:
    """An image tile in shared memory: [channel][group of 8 images][row][column] of units; see tensor.cuh.

    Attributes
    ----------
    channels, groups : int
        Channels and groups of images.
    size : (int, int)
        Rows and columns in tile pixels: those of the image, spread out by `spread`.
    row_pitch, group_pitch, channel_pitch : int
        Units from one to the next.
    copied : (int, int)
        Rows, and reads of a row, that a copy takes from the image.
    whole : (bool, bool)
        Whether each tile holds all rows (columns) of the image.
    width : int
        Pixels of the image that are read at once: 1, 2 or 4.
    spread : (int, int)
        Tile pixels for one pixel of the image.
    image : (int, int, int)
        Channels, rows and columns of the image, where the text is for one size only; 0: told at launch.
    """

    channels: int
    groups: int
    size: Pair
    row_pitch: int
    group_pitch: int
    channel_pitch: int
    copied: Pair
    whole: tuple[bool, bool]
    width: int
    spread: Pair = (1, 1)
    image: tuple[int, int, int] = (0, 0, 0)

    @property
    def units(self) -> int:
        """Units of shared memory."""
        return self.channels * self.channel_pitch

    def text(self, name: str) -> str:
        """Return the declaration of the tile's type."""
        numbers = (
            self.channels, self.groups, *self.size, self.row_pitch, self.group_pitch, self.channel_pitch, *self.copied,
            *map(int, self.whole), self.width, *self.spread, *self.image,
        )  # fmt: skip
        return f"using {name} = Tile<{', '.join(map(str, numbers))}>;"


@dataclass(frozen=True)
class TensorSpec:
    """All that the text of a function depends on.

    Attributes
    ----------
    function : {"forward", "grad_input", "grad_values"}
        What is computed.
    entries : int
        Weights of a kernel.
    blocks : int
        Blocks of 16 filters that the threads of a block share a tile for; input gradient: whose dy is in a tile.
    parts : int
        Warps that share the same filters and divide the positions.
    tiles : int
        Forward: positions of a warp, even. Input gradient: pairs of positions of a warp. Gradient of the values: steps
        of 16 entries of a warp.
    rect : (int, int)
        Rows and columns of destination pixels (forward and gradient of the values: of y; input gradient: of x).
    stride, padding : (int, int)
        From a position to the next in tile pixels, and of the tile.
    input : Tile
        Of x; input gradient: of dy.
    output : Tile or None
        Of dy, for the gradient of the values.
    channels : int
        Input gradient: channels of a block. Else: 0.
    columns : int
        Input gradient: most tiles of 8 channels of a job. Else: 0.
    vector : int
        Pixels that are written at once.
    buffers : int
        Tiles in shared memory: one is used while the others are filled.
    all_rows : bool
        Forward: whether the weights of all chunks come into shared memory at once, and stay; else each with its chunk.
    target : (int, int, int)
        Channels, rows and columns of the images that positions are of; as `Tile.image`.
    whole_groups : bool
        Whether each group of images that is read has all of its 8.
    batch_last : bool
        Whether images are in memory as [channel][row][column][image]; else NCHW.
    """

    function: Function
    dtype: Dtype
    entries: int
    warps: int
    blocks: int
    parts: int
    tiles: int
    rect: Pair
    stride: Pair
    padding: Pair
    input: Tile
    output: Tile | None = None
    channels: int = 0
    columns: int = 0
    vector: int = 1
    buffers: int = 2
    all_rows: bool = False
    target: tuple[int, int, int] = (0, 0, 0)
    whole_groups: bool = False
    batch_last: bool = False

    @property
    def positions(self) -> int:
        """Destination pixels times groups of images."""
        return self.input.groups * self.rect[0] * self.rect[1]

    @property
    def zeros(self) -> int:
        """Units of zeros, as far apart as a warp's positions of the forward pass in a tile."""
        return max(map(self.place, range(self.tiles))) + 1

    def place(self, number: int) -> int:
        """Return where a position is in a tile, in units: `place_at` of tensor.cuh."""
        (rows, columns), tile = self.rect, self.input
        if self.batch_last:
            pixel, group = divmod(number, tile.groups)
            row, column = divmod(pixel, columns)
        else:
            line, column = divmod(number, columns)
            group, row = divmod(line, rows)
        return group * tile.group_pitch + row * self.stride[0] * tile.row_pitch + column * self.stride[1]

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block of threads, without the weights."""
        tiles = self.buffers * UNIT_BYTES * (self.input.units + (self.output.units if self.output else 0))
        if self.function == "forward":
            return tiles + UNIT_BYTES * self.zeros
        sums = (2 * self.tiles * self.parts * IMAGES + 23) // 32 * 32 + 8  # of a channel; see tensor_input.cuh
        return tiles + 4 * self.channels * sums

    def row_bytes(self, steps: int, chunks: int) -> int:
        """Return the shared memory of the forward pass for rows that come together, so many steps, and for bounds."""
        copies = 1 if self.all_rows else self.buffers
        return UNIT_BYTES * copies * steps * (2 * FILTERS + STEP // 4) + 4 * (chunks * self.blocks + 1)

    def weight_bytes(self, kernels: int) -> int:
        """Return the shared memory of the input gradient for weights, so many kernels of a filter in a set."""
        return self.buffers * self.blocks * kernels * (2 * self.entries + 1) * UNIT_BYTES

    @property
    def job_words(self) -> int:
        """Words of a job of the input gradient: tiles, taps, channels, kernels; whole units."""
        return ceil((1 + self.entries + 16 * self.columns) / 4) * 4

    def job_bytes(self, jobs: int) -> int:
        """Return the shared memory of so many jobs of a block of filters."""
        return self.buffers * self.blocks * jobs * 4 * self.job_words


def render(spec: TensorSpec) -> str:
    """Return the text of a unit without the platform: what must be the same on every device."""
    constants = [f"using Element = {ELEMENTS[spec.dtype]};"]
    constants += [f"constexpr int {name} = {value};" for name, value in _constants(spec).items()]
    tiles = [spec.input.text("Input")] + ([spec.output.text("Output")] if spec.output else [])
    return "\n".join([*constants, "", _source("tensor.cuh"), *tiles, "", *map(_source, FILES[spec.function])])


def unit(spec: TensorSpec) -> str:
    """Return what NVRTC compiles: the platform and `render(spec)`."""
    return _source("platform.cuh") + render(spec)


def sources() -> str:
    """Return a digest of everything that is written by hand."""
    return hashlib.sha256("".join(map(_source, SOURCES)).encode()).hexdigest()


def _constants(spec: TensorSpec) -> dict[str, int]:
    constants = {
        "THREADS": spec.warps * LANES, "MIN_BLOCKS": max(1, RESIDENT_WARPS // spec.warps),
        "PARTS": spec.parts, "TILES": spec.tiles, "POSITIONS": spec.positions,
        "RECT_ROWS": spec.rect[0], "RECT_COLUMNS": spec.rect[1], "STRIDE_ROWS": spec.stride[0],
        "STRIDE_COLUMNS": spec.stride[1], "PADDING_ROWS": spec.padding[0], "PADDING_COLUMNS": spec.padding[1],
        "TARGET_DEPTH": spec.target[0], "TARGET_ROWS": spec.target[1], "TARGET_COLUMNS": spec.target[2],
        "WHOLE_GROUPS": int(spec.whole_groups), "BATCH_LAST": int(spec.batch_last), "GROUPS": spec.input.groups,
        "BUFFERS": spec.buffers,
    }  # fmt: skip
    if spec.function == "grad_input":
        constants |= {"CHANNELS": spec.channels, "COLUMNS": spec.columns}
    if spec.function != "grad_values":
        constants["VECTOR"] = spec.vector
    if spec.function == "forward":
        constants |= {"ZEROS": spec.zeros, "ALL_ROWS": int(spec.all_rows)}
    if spec.function != "grad_values":
        constants |= {"BLOCKS": spec.blocks, "ENTRIES": spec.entries}
    return constants
