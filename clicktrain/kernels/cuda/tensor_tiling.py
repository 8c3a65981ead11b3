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
MOST_COLUMNS = 4
"""Tiles of 8 channels of a job: each number up to it is compiled."""
MOST_POSITIONS = 128
"""Of a step of the gradient of the values."""
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


def input_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the input gradient is cut up."""
    return min(input_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits))


def values_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the gradient of the values is cut up."""
    return min(values_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits))


def forward_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the forward pass that are worth a thought."""
    geometry, filter_blocks, found = Geometry.forward(plan), plan.index.shape[0] // FILTERS, []
    for warps, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (16, 8, 4, 2)):
        if blocks > min(warps, filter_blocks) or warps % blocks:
            continue
        parts = warps // blocks
        for rect, groups in geometry.cuts(parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "forward", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1),
                vector=_vector(geometry, rect) if tiles % 2 == 0 else 1,
            )  # fmt: skip
            found += _with_channels(spec, plan.input_shape[1], limits)
    return found


def input_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the input gradient that are worth a thought."""
    geometry, channels, found = Geometry.transposed(plan), plan.input_shape[1], []
    of_pattern = plan.values_shape[0] / (plan.index.shape[0] * len(plan.pool))  # channels of a pattern in a block
    for warps, parts, tiles, resident in product(_warps(limits), (8, 4, 2, 1), (4, 2, 1), (1, 2, 4)):
        if parts > warps or warps % parts or (resident > 1 and resident * warps > RESIDENT_WARPS):
            continue
        for rect, groups in geometry.cuts(2 * parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "grad_input", dtype, plan.pool.entries, warps, 1, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, FILTERS), vector=_vector(geometry, rect), channels=1,
            )  # fmt: skip
            of_channel = replace(spec, channels=2).shared_bytes - spec.shared_bytes
            room = limits.shared_bytes // resident - spec.shared_bytes
            if room < 0:
                continue
            most = min(channels, 1 + room // of_channel)
            even = ceil(channels / ceil(channels / most))
            columns = max(1, min(MOST_TILES // tiles, MOST_COLUMNS, ceil(of_pattern * even / channels / 8)))
            found.append(replace(spec, channels=even, columns=columns))
    return found


def values_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought."""
    geometry, (filters, channels) = Geometry.forward(plan), plan.index.shape
    found = []
    for warps, parts, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (8, 4, 2, 1), (8, 4, 2)):
        if parts > warps or warps % parts or blocks > filters // FILTERS:
            continue
        for rect, groups in geometry.cuts(MOST_POSITIONS, plan.input_shape[0]):
            spec = TensorSpec(
                "grad_values", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1), _output_tile(geometry, rect, groups, blocks),
            )  # fmt: skip
            found += _with_channels(spec, channels, limits)
    return found


def value_splits(pieces: int, spec: TensorSpec, plan: Plan, limits: Limits) -> tuple[int, int]:
    """Return how many steps a walk over all positions has, and into how many shares it is divided."""
    rects = Geometry.forward(plan).rects(spec.rect)
    walks = rects[0] * rects[1] * ceil(plan.input_shape[0] / (IMAGES * spec.input.groups))
    wanted = _resident(spec, limits) * limits.multiprocessors // max(1, pieces)
    return walks, max(1, min(walks, wanted))


def estimate(spec: TensorSpec, plan: Plan, limits: Limits) -> float:
    """Return about how many cycles a function takes; good for choosing, no more.

    Work is what limits a multiprocessor: shared memory, copies, writes. A chain is what one block of threads takes by
    itself: the steps of a warp one after another, and copies where nothing else is there to be done.
    """
    if spec.function == "grad_values":
        return _estimate_values(spec, plan, limits)
    geometry = Geometry.forward(plan) if spec.function == "forward" else Geometry.transposed(plan)
    (images, channels), filter_blocks = plan.input_shape[:2], plan.index.shape[0] // FILTERS
    kept = plan.values_shape[0] / (FILTERS * filter_blocks)  # kernels of a filter
    rects = geometry.rects(spec.rect)
    places = ceil(images / (IMAGES * spec.input.groups)) * rects[0] * rects[1]
    if spec.function == "forward":
        sets, chunks = ceil(filter_blocks / spec.blocks), ceil(channels / spec.input.channels)
        steps = kept * spec.entries / STEP + 0.5 * chunks
        step, written, copied = 2.6 * spec.tiles + 10, spec.blocks * FILTERS, channels
        products = spec.warps * steps * step
        chain = steps * (8 * spec.tiles + 60)
    else:
        sets, chunks, copied, written = (
            ceil(channels / spec.channels),
            filter_blocks,
            plan.index.shape[0],
            spec.channels,
        )
        of_job = kept / len(plan.pool) / sets
        jobs = filter_blocks * len(plan.pool) * ceil(of_job / (8 * spec.columns))
        columns = ceil(of_job / 8) / max(1, ceil(of_job / (8 * spec.columns)))
        of_step = spec.tiles * max(4.0, 2 * columns) + 6 * columns
        job = spec.entries * of_step + spec.tiles * columns * 10
        products = jobs * spec.parts * job
        chain = ceil(jobs / filter_blocks / (spec.warps // spec.parts)) * filter_blocks * (
            spec.entries * (spec.tiles * columns * 8 + 60) + spec.tiles * columns * 30 + 200
        )  # fmt: skip
    copying = copied * _copy_cycles(spec.input)
    writing = spec.positions * written * IMAGES / 24 * (2 if spec.rect[1] < min(16, geometry.target[1]) else 1)
    resident, busiest = _resident(spec, limits), ceil(places * sets / limits.multiprocessors)
    exposed = copying * (1 / chunks + 0.3)
    work = products + copying + writing
    longest = max(chain, products) + exposed + writing + chunks * 600 + 1500
    return max(busiest * work, ceil(busiest / resident) * longest) + 0.1 * busiest * work


def _estimate_values(spec: TensorSpec, plan: Plan, limits: Limits) -> float:
    filter_blocks, channels = plan.index.shape[0] // FILTERS, plan.input_shape[1]
    chunks = ceil(channels / spec.input.channels)
    steps = max(1, ceil(plan.values_shape[0] * spec.entries / (FILTERS * filter_blocks * chunks * STEP) + 0.3))
    jobs_of_block = ceil(steps / spec.tiles)
    room = spec.warps // spec.parts
    pieces = ceil(filter_blocks / spec.blocks) * chunks * ceil(spec.blocks * jobs_of_block / room)
    jobs = min(room, spec.blocks * jobs_of_block)
    walks, splits = value_splits(pieces, spec, plan, limits)
    pairs = ceil(spec.positions / 2)
    of_job = min(spec.tiles, ceil(steps / jobs_of_block))
    assert spec.output is not None
    copying = spec.input.channels * _copy_cycles(spec.input) + spec.output.channels * _copy_cycles(spec.output)
    products = jobs * pairs * (5.2 * of_job + 6)
    chain = ceil(pairs / spec.parts) * (16 * of_job + 60)
    resident, busiest = _resident(spec, limits), ceil(pieces * splits / limits.multiprocessors)
    turns = ceil(walks / splits)
    work = busiest * turns * (products + copying)
    longest = ceil(busiest / resident) * (turns * (max(chain, products) + 0.4 * copying + 600) + 3000)
    partial = splits * spec.parts * plan.values_shape[0] * spec.entries * 4 * 2 / (24 * limits.multiprocessors)
    return max(work, longest) + 0.1 * work + partial


def _copy_cycles(tile: Tile) -> float:
    """Return about how many cycles of a multiprocessor the copy of one channel takes."""
    words = tile.groups * tile.copied[0] * tile.copied[1]
    return words * (0.35 if tile.width == 1 else 0.5)


def _resident(spec: TensorSpec, limits: Limits) -> int:
    """Return how many blocks of threads share a multiprocessor."""
    return max(1, min(RESIDENT_WARPS // spec.warps, limits.shared_bytes // spec.shared_bytes))


def _output_tile(geometry: Geometry, rect: Pair, groups: int, blocks: int) -> Tile:
    """Return the tile of dy: all units that a pair of positions reads, at odd pitches."""
    positions = groups * rect[0] * rect[1]
    width = _vector(geometry, rect)
    whole = (rect[0] >= geometry.target[0], rect[1] >= geometry.target[1])
    return Tile(
        blocks * FILTERS, groups, rect, rect[1], rect[0] * rect[1], _next(positions + positions % 2, 1, 2),
        (rect[0], rect[1] // width), whole, width,
    )  # fmt: skip


def _with_channels(spec: TensorSpec, channels: int, limits: Limits) -> list[TensorSpec]:
    """Return the specification with as many channels in a chunk as fit into shared memory once, twice, or 4 times.

    Where the forward pass has all channels in one chunk, one buffer is enough.
    """
    found = []
    for resident, single in product((1, 2, 4), (True, False)):
        if resident > 1 and resident * spec.warps > RESIDENT_WARPS:
            continue
        buffers = 1 if single and spec.function == "forward" else 2
        fixed = UNIT_BYTES * (1 + buffers * (spec.output.units if spec.output else 0))
        room = (limits.shared_bytes // resident - fixed) // (UNIT_BYTES * buffers * spec.input.channel_pitch)
        most = min(channels if single else MOST_CHANNELS, channels, room)
        if most < 1 or (buffers == 1 and most < channels):
            continue
        even = ceil(channels / ceil(channels / most))
        made = replace(spec, input=replace(spec.input, channels=even), buffers=buffers)
        if made.shared_bytes <= limits.shared_bytes // resident:
            found.append(made)
    return found


def _warps(limits: Limits) -> list[int]:
    return sorted({min(w, limits.warps) for w in (16, 8, 4)}, reverse=True)


def _vector(geometry: Geometry, rect: Pair) -> int:
    """Return how many neighbouring pixels of a rectangle can be read or written at once."""
    return 2 if geometry.target[1] % 2 == rect[1] % 2 == 0 else 1


def _next(least: int, remainder: int, modulus: int) -> int:
    """Return the smallest number from `least` on with that remainder."""
    return least + (remainder - least) % modulus
