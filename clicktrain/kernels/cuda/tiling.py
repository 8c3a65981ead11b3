"""How a convolution pass is cut up for a GPU: the patch of a lane, the filters and channels of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import ceil, exp, log

import numpy as np

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype
from clicktrain.kernels.cuda.region import LANES, Pair, Region, Triple, conflicts, groups, lane_grids

SUMS = 64
"""Outputs that a lane keeps in registers: with inputs and weights, 128 registers."""
PAIRED_SHARE = 0.5
"""There is code for pairs of kernels with the same channel and pattern where at least this share of kernels has one."""
CODE_BYTES = 24 << 10
"""Code of a sweep. On an H200 one of 43 KB missed the instruction cache a third of the time (a profile in
bench/evidence/gpu_candidates.json, with the timings behind `estimate`)."""
INSTRUCTION_BYTES = 16
MANY_ENTRIES = 16
"""With more weights in a kernel, they take a noteworthy part of the registers."""
MAX_CHUNK = 64
LIKELY_GRIDS = 12
SKEWED = 1.3
"""What more copying may cost where rows of patches are not skewed then: skew divides shapes."""
WARPS = (32, 16, 8)
RESIDENT = (1, 2, 4)
THREADS_WITH_SUMS = {64: 512, 32: 1024}
"""Most threads of a multiprocessor by sums of a lane: 65,536 registers are theirs."""
RESERVED_BYTES = 1 << 10
"""Shared memory that the system takes from each block."""


@dataclass(frozen=True)
class Limits:
    """What a device gives to a block.

    Attributes
    ----------
    shared_bytes : int
        Dynamic shared memory of a block; a multiprocessor has `RESERVED_BYTES` more.
    multiprocessors : int
        Multiprocessors of the device.
    warps : int
        Largest number of warps of a block.
    lane_pixels : int
        Largest number of output pixels of a patch.
    """

    shared_bytes: int
    multiprocessors: int
    warps: int = 32
    lane_pixels: int = 32

    def shared_of(self, resident: int) -> int:
        """Return the shared memory that each of so many resident blocks can have."""
        return (self.shared_bytes + RESERVED_BYTES) // resident - RESERVED_BYTES


def convolution_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> ConvolutionSpec:
    """Choose how a convolution pass is cut up: the candidate with the smallest estimated time."""
    return min(candidates(layer, images, dtype, limits), key=lambda spec: estimate(spec, layer, images, limits))


def candidates(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[ConvolutionSpec]:
    """Return the ways to cut up a convolution pass that are worth a thought."""
    all_slots = (2, 1) if layer.filters > 1 else (1,)
    paired = shared_kernels(layer) >= PAIRED_SHARE
    all_warps = sorted({min(w, limits.warps) for w in WARPS}, reverse=True)
    found = []
    for tile, slots in product(_tiles(layer.out_size, limits.lane_pixels, layer.spread), all_slots):
        most = min(limits.lane_pixels, SUMS // slots) // (tile[0] * tile[1])
        for per_patch in (count for count in (8, 4, 2, 1) if count == 1 or count <= min(most, images)):
            lanes = _lanes(layer, tile, per_patch, images)
            threads = _most_threads(slots * per_patch * tile[0] * tile[1], layer)
            for warps, resident in product(all_warps, RESIDENT):
                spec = cut(layer, dtype, tile, slots, per_patch, lanes, warps, paired)
                if spec.warps * LANES * resident <= threads:
                    found.append(_with_channels(replace(spec, resident=resident), layer, limits))
    found = list(dict.fromkeys(found))
    return [spec for spec in found if code_bytes(spec) <= CODE_BYTES] or [min(found, key=code_bytes)]


def _most_threads(sums: int, layer: Layer) -> int:
    """Return how many threads a multiprocessor has registers for."""
    if layer.spread != (1, 1):  # a window pixel meets few taps: more of them are under way
        sums = min(SUMS, 2 * sums)
    if layer.entries > MANY_ENTRIES:
        sums = min(SUMS, sums + layer.entries)
    return next(threads for most, threads in sorted(THREADS_WITH_SUMS.items()) if sums <= most)


def code_bytes(spec: ConvolutionSpec) -> int:
    """Return about how long the code of all patterns and sets of slots is."""
    pixels = spec.images * spec.tile[0] * spec.tile[1]
    fma = pixels * spec.entries // (spec.spread[0] * spec.spread[1])
    loads = min(fma, spec.images * spec.region.window[0] * spec.region.window[1])
    lengths = (len(slots) * fma + loads + 10 for slots in spec.sets)
    return INSTRUCTION_BYTES * len(spec.shapes.reads) * sum(lengths)


def shared_kernels(layer: Layer) -> float:
    """Return the share of kernels whose neighbouring filter has a kernel of the same channel and pattern."""
    if not len(layer.kernels.filters):
        return 0.0
    index = np.zeros((layer.filters, layer.channels), np.int16)
    index[layer.kernels.filters, layer.kernels.channels] = layer.kernels.patterns + 1
    pairs = index[: layer.filters // 2 * 2].reshape(-1, 2, layer.channels)
    return float(2 * ((pairs[:, 0] == pairs[:, 1]) & (pairs[:, 0] > 0)).sum() / len(layer.kernels.filters))


def estimate(spec: ConvolutionSpec, layer: Layer, images: int, limits: Limits) -> float:
    """Return about how many cycles a pass takes, by the arithmetic of convolution.cuh. Good for choosing, no more."""
    pixels = spec.images * spec.tile[0] * spec.tile[1]
    window = spec.images * spec.region.window[0] * spec.region.window[1]
    fma = pixels * spec.entries / (spec.spread[0] * spec.spread[1])
    loads = min(fma, window) + 2
    density = float(len(layer.kernels.filters)) / max(1, layer.filters * layer.channels)
    records = density * spec.slots * spec.channels  # of a warp in a chunk
    kinds = len(spec.shapes.reads) * len(spec.sets)
    runs = kinds * (1 - exp(-records / kinds))
    copies = copy_cycles(spec.region) * spec.channels
    issue = spec.warps * (records * (fma + loads + 8) + 25 * runs) + 3 * copies
    bandwidth = spec.warps * records * loads * conflicts(spec.region) + copies
    blocks = region_count(spec, layer, images) * ceil(layer.filters / spec.filters)
    resident = min(spec.resident, ceil(blocks / limits.multiprocessors))
    # Fitted to 145 timings on an H200 (they differ from it by 20 %): warps wait for the slowest of their block; fewer
    # than 32 do not quite hide the latency of each other; a chunk takes 2,500 cycles besides.
    uneven = 1 + 0.25 * float(log(spec.warps + 1) / max(0.5, records)) ** 0.5
    hidden = min(1.0, resident * spec.warps / 32) ** 0.22
    chunk = max(issue / 4, bandwidth) * resident * uneven / hidden + 2500
    stores = 8 * spec.warps * spec.slots * pixels / spec.vector / 4
    waves = ceil(blocks / (limits.multiprocessors * resident))
    return float(waves * (ceil(layer.channels / spec.channels) * chunk + resident * stores))


def region_count(spec: ConvolutionSpec, layer: Layer, images: int) -> int:
    """Return how many regions cover the outputs."""
    return groups(spec.region.lanes, tile_count(layer.out_size, spec.tile), ceil(images / spec.images))


def tile_count(size: Pair, tile: Pair) -> Pair:
    """Return how many tiles cover rows and columns."""
    return ceil(size[0] / tile[0]), ceil(size[1] / tile[1])


def grid(layer: Layer, tile: Pair, region: Region) -> Pair:
    """Return how many regions lie along the rows and columns of an image."""
    rows, columns = tile_count(layer.out_size, tile)
    return ceil(rows / region.lanes[1]), ceil(columns / region.lanes[2])


def cut(
    layer: Layer, dtype: Dtype, tile: Pair, slots: int, per_patch: int, lanes: Triple, most_warps: int,
    paired: bool = False, trim: bool = True,
) -> ConvolutionSpec:  # fmt: skip
    """Return a specification with one channel in a chunk and one resident block.

    Parameters
    ----------
    layer : Layer
        The pass.
    dtype : {"float32", "float16", "bfloat16"}
        Type of x and y.
    tile : (int, int)
        Rows and columns of a patch.
    slots, per_patch, most_warps : int
        Filters of a warp, images of a patch, most warps of a block.
    lanes : (int, int, int)
        Patches of a block along images, rows and columns.
    paired : bool
        Have code for two filters of a warp whose kernels share channel and pattern; half as much code without.
    trim : bool
        Leave padding out of windows where one tile spans the output; the code is then for this size only.
    """
    blocks = ceil(layer.filters / (most_warps * slots))
    warps = max(1, ceil(ceil(layer.filters / blocks) / slots))
    sets: tuple[tuple[int, ...], ...] = tuple((slot,) for slot in range(slots))
    if slots == 2 and paired:
        sets = (*sets, (0, 1))
    axes = [window_of(layer, axis, tile[axis], trim) for axis in range(2)]
    region = Region(lanes, per_patch, (axes[0].size, axes[1].size), (axes[0].step, axes[1].step))
    return ConvolutionSpec(
        dtype, layer.kernel_size, layer.patterns, warps, slots, sets, tile, region,
        origin=(axes[0].origin, axes[1].origin), exists=(axes[0].exists, axes[1].exists), stride=layer.stride,
        spread=layer.spread, start=(axes[0].start, axes[1].start), channels=1, resident=1,
        vector=next(v for v in (4, 2, 1) if layer.out_size[1] % v == 0 and tile[1] % v == 0),
        plane=layer.in_size[0] * layer.in_size[1] if trim else 0,
    )  # fmt: skip


def shared_bytes(spec: ConvolutionSpec, weight_words: int, program_words: int) -> int:
    """Return the shared memory of a block: two buffers of weights, windows, and programs."""
    return 4 * 2 * (weight_words + spec.channels * spec.region.words + program_words)


@dataclass(frozen=True)
class Window:
    """Of a patch, along one axis; see `ConvolutionSpec`."""

    start: int
    size: int
    origin: int
    step: int
    exists: Pair


def window_of(layer: Layer, axis: int, tile: int, trim: bool) -> Window:
    """Return the window of a tile; where one tile spans the output and `trim` is set, it leaves padding out."""
    padding, spread, stride = layer.padding[axis], layer.spread[axis], layer.stride[axis]
    start = -(padding // spread)
    last = ((tile - 1) * stride + layer.kernel_size - 1 - padding) // spread
    spans = trim and tile >= layer.out_size[axis]
    if spans:
        start, last = max(start, 0), min(last, layer.in_size[axis] - 1)
    size = max(1, last - start + 1)
    exists = (0, min(size, layer.in_size[axis] - start)) if spans else (0, size)
    return Window(start, size, -padding - start * spread, tile * stride // spread, exists)


def _tiles(size: Pair, pixels: int, spread: Pair) -> list[Pair]:
    """Return rows and columns of patches of at most so many pixels: even cuts of the output, multiples of `spread`."""

    def even(length: int, limit: int, unit: int) -> int:
        limit = max(unit, limit // unit * unit)
        parts = ceil(length / limit)
        return ceil(ceil(length / parts) / unit) * unit

    found = set()
    for share, columns in product((1, 2, 4), (16, 8, 4, 2, 1)):
        width = even(size[1], min(columns, max(1, pixels // share)), spread[1])
        found.add((even(size[0], max(1, pixels // share // width), spread[0]), width))
    return sorted(found)


def copy_cycles(region: Region) -> float:
    """Return about how many cycles of shared memory it takes to copy a region: rows are read in sectors of 8 words."""
    images, rows, columns = region.size
    return images * rows * (columns + 8) / LANES * 1.5


def _lanes(layer: Layer, tile: Pair, per_patch: int, images: int) -> Triple:
    """Return the grid of lanes with the least to copy and compute, conflicts and skew counted."""
    tiles, patches = tile_count(layer.out_size, tile), ceil(images / per_patch)
    axes = [window_of(layer, axis, tile[axis], trim=True) for axis in range(2)]

    def region(lanes: Triple) -> Region:
        return Region(lanes, per_patch, (axes[0].size, axes[1].size), (axes[0].step, axes[1].step))

    def cost(lanes: Triple) -> float:
        return groups(lanes, tiles, patches) * (200 + copy_cycles(region(lanes)))

    def exact_cost(lanes: Triple) -> float:
        made = region(lanes)
        return cost(lanes) * conflicts(made) * (SKEWED if made.skew else 1)

    # Conflicts take long to compute: only for the ones that would be best without.
    return min(sorted(lane_grids(tiles, patches, exact=False), key=cost)[:LIKELY_GRIDS], key=exact_cost)


def _with_channels(spec: ConvolutionSpec, layer: Layer, limits: Limits) -> ConvolutionSpec:
    """Return the specification with as many channels in a chunk as surely fit into shared memory."""
    words = 2 * (spec.region.words + spec.filters * (spec.entries + 2))  # of a channel, at most
    fixed = 2 * (3 * spec.warps + 8)
    channels = max(1, min(MAX_CHUNK, layer.channels, (limits.shared_of(spec.resident) // 4 - fixed) // words))
    chunks = ceil(layer.channels / channels)
    return replace(spec, channels=ceil(layer.channels / chunks))
