"""How a function is cut up for tensor cores: rectangles of pixels, chunks of channels, warps of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from clicktrain.kernels.cuda.codegen import Dtype, Pair
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, RESIDENT_WARPS, STEP, UNIT_BYTES, TensorSpec, Tile
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan

MOST_TILES = 16
"""8-column tiles of a warp: 64 sums of a lane, which leaves room for all else in 128 registers."""
MOST_CHANNELS = 64
"""Of a chunk."""


@dataclass(frozen=True)
class Geometry:
    """What a function reads and writes, as a convolution.

    Attributes
    ----------
    source, target : (int, int)
        Size of the images that are read from tiles, and of the positions.
    stride, spread, padding : (int, int)
        Position r and tap k meet in tile pixel r * stride + k; tile pixel q shows image pixel (q - padding) / spread.
    """

    source: Pair
    target: Pair
    stride: Pair
    spread: Pair
    padding: Pair
    kernel_size: int

    @classmethod
    def forward(cls, plan: Plan) -> Geometry:
        """Return what the forward pass and the gradient of the values do."""
        return cls(
            plan.input_shape[2:], plan.output_shape[2:], plan.stride, (1, 1), plan.padding, plan.pool.kernel_size
        )

    @classmethod
    def transposed(cls, plan: Plan) -> Geometry:
        """Return what the input gradient does: dy is spread out by the stride."""
        last = plan.pool.kernel_size - 1
        padding = (last - plan.padding[0], last - plan.padding[1])
        return cls(plan.output_shape[2:], plan.input_shape[2:], (1, 1), plan.stride, padding, last + 1)

    def tile(self, rect: Pair, groups: int, channels: int) -> Tile:
        """Return the tile that a rectangle of positions reads."""
        rows, columns = ((r - 1) * s + self.kernel_size for r, s in zip(rect, self.stride, strict=True))
        whole = (rect[0] >= self.target[0], rect[1] >= self.target[1])
        width = 2 if self.source[1] % 2 == 0 else 1
        taken = [
            image if all_of_it else (size - 1) // spread + (2 if spread > 1 else 1)
            for image, all_of_it, size, spread in zip(self.source, whole, (rows, columns), self.spread, strict=True)
        ]
        words = taken[1] // width + (0 if whole[1] or width == 1 else 1)
        row_pitch, channel_modulus = self._pitches(columns)
        group_pitch = rows * row_pitch
        channel_pitch = _next(groups * group_pitch, *channel_modulus)
        return Tile(
            channels, groups, (rows, columns), row_pitch, group_pitch, channel_pitch, (taken[0], words), whole, width,
            self.spread,
        )  # fmt: skip

    def _pitches(self, columns: int) -> tuple[int, tuple[int, int]]:
        """Return the row pitch, and (remainder, modulus) of the channel pitch; see tensor.cuh."""
        if self.kernel_size == 1:
            return columns, (1, 2)
        return _next(columns, 2, 4), (4, 8)

    def rects(self, rect: Pair) -> Pair:
        """Return how many rectangles there are vertically and horizontally."""
        return ceil(self.target[0] / rect[0]), ceil(self.target[1] / rect[1])

    def cuts(self, positions: int, images: int) -> Iterator[tuple[Pair, int]]:
        """Yield rectangles and groups of images of at most so many positions."""
        rows, columns = self.target
        widths = {columns, *(w for w in (32, 16, 8, 4, 2) if w < columns)}
        for width in sorted(w for w in widths if w <= positions):
            height = min(rows, positions // width)
            height = ceil(rows / ceil(rows / height))  # even cuts
            fits = positions // (width * height) if (height, width) == self.target else 1
            for groups in sorted({1, min(fits, ceil(images / IMAGES))}):
                yield (height, width), groups


def forward_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the forward pass is cut up: the candidate with the smallest estimated time."""
    return min(forward_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits))


def forward_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the forward pass that are worth a thought."""
    geometry, filter_blocks = Geometry.forward(plan), plan.index.shape[0] // FILTERS
    found = []
    for warps, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (16, 8, 4, 2)):
        if blocks > min(warps, filter_blocks) or warps % blocks:
            continue
        parts = warps // blocks
        for rect, groups in geometry.cuts(parts * tiles, plan.input_shape[0]):
            tile = geometry.tile(rect, groups, 1)
            spec = TensorSpec(
                "forward", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, tile, vector=_vector(geometry, rect, tiles),
            )  # fmt: skip
            found += _with_channels(spec, plan.input_shape[1], limits)
    return found


def estimate(spec: TensorSpec, plan: Plan, limits: Limits) -> float:
    """Return about how many cycles a forward pass takes; good for choosing, no more."""
    geometry, (images, channels) = Geometry.forward(plan), plan.input_shape[:2]
    filter_blocks, chunks = plan.index.shape[0] // FILTERS, ceil(channels / spec.input.channels)
    depth = plan.values_shape[0] * spec.entries / (FILTERS * filter_blocks)
    steps = depth / STEP + 0.5 * chunks
    rects = geometry.rects(spec.rect)
    blocks = ceil(images / (IMAGES * spec.input.groups)) * rects[0] * rects[1] * ceil(filter_blocks / spec.blocks)
    copied = channels * spec.input.groups * spec.input.copied[0] * spec.input.copied[1] * spec.input.width
    written = spec.positions * spec.blocks * FILTERS * IMAGES
    # Cycles of shared memory and of what else limits a multiprocessor, and of the longest chain of a warp.
    work = spec.warps * steps * (2.6 * spec.tiles + 10) + copied / 2 + written / 24
    chain = steps * (8 * spec.tiles + 60) + chunks * 800 + 2000
    resident = max(1, min(RESIDENT_WARPS // spec.warps, limits.shared_bytes // spec.shared_bytes))
    busiest = ceil(blocks / limits.multiprocessors)
    return max(busiest * work, ceil(busiest / resident) * chain) + 0.2 * busiest * work


def _with_channels(spec: TensorSpec, channels: int, limits: Limits) -> list[TensorSpec]:
    """Return the specification with as many channels in a chunk as fit once, or twice, into shared memory."""
    found = []
    for resident in (1, 2, 4):
        units = (limits.shared_bytes // resident - UNIT_BYTES) // UNIT_BYTES
        most = min(MOST_CHANNELS, channels, units // (2 * spec.input.channel_pitch))
        if most < 1 or (resident > 1 and resident * spec.warps > RESIDENT_WARPS):
            continue
        even = ceil(channels / ceil(channels / most))
        made = replace(spec, input=replace(spec.input, channels=even))
        if made.shared_bytes <= limits.shared_bytes // resident:
            found.append(made)
    return found


def _warps(limits: Limits) -> list[int]:
    return sorted({min(w, limits.warps) for w in (16, 8, 4)}, reverse=True)


def _vector(geometry: Geometry, rect: Pair, tiles: int) -> int:
    """Return how many neighbouring pixels can be written at once."""
    return 2 if geometry.target[1] % 2 == rect[1] % 2 == tiles % 2 == 0 else 1


def _next(least: int, remainder: int, modulus: int) -> int:
    """Return the smallest number from `least` on with that remainder."""
    return least + (remainder - least) % modulus
