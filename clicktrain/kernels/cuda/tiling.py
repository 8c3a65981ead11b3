"""How a pass is cut up for a GPU: which patch a lane computes, how many filters and channels a block has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import ceil, log, prod

import numpy as np

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype, GradientSpec
from clicktrain.kernels.cuda.region import LANES, Pair, Region, Triple, conflicts, groups, lane_grids

SUMS = 64
"""Outputs that a lane keeps in registers: with inputs and weights, 128 registers."""
GRADIENT_SUMS = 64
GRADIENT_WINDOW = 40
"""Pixels of a window that a lane of the gradient keeps in registers beside its sums."""
PAIRED_SHARE = 0.5
"""There is code for pairs of kernels with the same channel and pattern where at least this share of kernels has one."""
CODE_BYTES = 24 << 10
"""Code of a sweep. On an H200 one of 43 KB missed the instruction cache a third of the time (a profile in
bench/evidence/gpu_candidates.json, with the timings behind `estimate`)."""
INSTRUCTION_BYTES = 16
MAX_CHUNK = 64
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
    return next(threads for most, threads in sorted(THREADS_WITH_SUMS.items()) if sums <= most)


def code_bytes(spec: ConvolutionSpec) -> int:
    """Return about how long the code of all patterns and sets of slots is."""
    pixels = spec.images * spec.tile[0] * spec.tile[1]
    fma = pixels * spec.entries // (spec.spread[0] * spec.spread[1])
    loads = min(fma, spec.images * spec.region.window[0] * spec.region.window[1])
    lengths = (len(slots) * fma + loads + 10 for slots in spec.sets)
    return INSTRUCTION_BYTES * len(spec.patterns) * sum(lengths)


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
    copies = _copies(spec.region) * spec.channels
    issue = spec.warps * records * (fma + loads + 12) + 3 * copies
    bandwidth = spec.warps * records * loads * conflicts(spec.region) + copies
    blocks = region_count(spec, layer, images) * ceil(layer.filters / spec.filters)
    resident = min(spec.resident, ceil(blocks / limits.multiprocessors))
    # Fitted to 145 timings on an H200 (they differ from it by 20 %): warps wait for the slowest of their block; fewer
    # than 32 do not quite hide the latency of each other; a chunk takes 2,500 cycles besides.
    uneven = 1 + 0.25 * float(log(spec.warps + 1) / max(0.5, records)) ** 0.5
    hidden = min(1.0, resident * spec.warps / 32) ** 0.22
    chunk = max(issue / 4, bandwidth) * resident * uneven / hidden + 2500
    return float(ceil(blocks / (limits.multiprocessors * resident)) * ceil(layer.channels / spec.channels) * chunk)


def region_count(spec: ConvolutionSpec, layer: Layer, images: int) -> int:
    """Return how many regions cover the outputs."""
    return groups(spec.region.lanes, tile_count(layer.out_size, spec.tile), ceil(images / spec.images))


def tile_count(size: Pair, tile: Pair) -> Pair:
    """Return how many tiles cover rows and columns."""
    return ceil(size[0] / tile[0]), ceil(size[1] / tile[1])


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
    axes = [_window(layer, axis, tile[axis], trim) for axis in range(2)]
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


def gradient_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> GradientSpec:
    """Choose how the gradient of the values is cut up; `layer` is the forward pass."""
    return gradient_candidates(layer, images, dtype, limits)[0]


def gradient_candidates(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[GradientSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought, the likely best first."""
    found = []
    for pixels, most in product((16, 8), (8, 4, 3)):
        tile, per_patch, lanes = _gradient_patch(layer, images, min(pixels, limits.lane_pixels))
        kernels = max(1, min(most, GRADIENT_SUMS // layer.entries, layer.filters))
        tasks = max(1, GRADIENT_SUMS // (kernels * layer.entries))
        found.append(
            gradient_cut(layer, dtype, tile, per_patch, lanes, tasks, kernels, min(16, limits.warps), 1, limits)
        )
    return list(dict.fromkeys(found))


def gradient_cut(
    layer: Layer, dtype: Dtype, tile: Pair, per_patch: int, lanes: Triple, tasks: int, task_kernels: int, warps: int,
    resident: int, limits: Limits,
) -> GradientSpec:  # fmt: skip
    """Return a specification with as many filters and channels as fit; tiles and lanes must divide the output."""
    window = tuple((t - 1) * s + layer.kernel_size for t, s in zip(tile, layer.stride, strict=True))
    step = (tile[0] * layer.stride[0], tile[1] * layer.stride[1])
    spec = GradientSpec(
        dtype, layer.kernel_size, layer.patterns, warps, tasks, task_kernels, tile,
        x=Region(lanes, per_patch, (window[0], window[1]), step), dy=_dy_region(layer, lanes, per_patch, tile),
        planes=(prod(layer.in_size), prod(layer.out_size)), start=(-layer.padding[0], -layer.padding[1]), filters=1,
        channels=1, resident=resident,
    )  # fmt: skip
    return _with_operands(spec, layer, limits)


def gradient_shared_bytes(spec: GradientSpec) -> int:
    """Return the shared memory of a block: two buffers of windows and patches, and the tasks."""
    buffer = ceil(spec.channels * spec.x.words / 4) * 4 + spec.filters * spec.dy.words
    return 4 * (2 * buffer + spec.warps * spec.tasks * spec.task_words)


def splits(pieces: int, regions: int, resident: int, limits: Limits) -> int:
    """Return into how many parts the regions are divided: the fewest regions that any multiprocessor works through."""
    slots = resident * limits.multiprocessors

    def rounds(parts: int) -> int:
        return ceil(pieces * parts / slots) * (ceil(regions / parts) + 2)  # 2: start, and sums at the end

    return min(range(1, min(regions, ceil(4 * slots / max(1, pieces))) + 1), key=rounds)


@dataclass(frozen=True)
class _Window:
    """Along one axis; see `ConvolutionSpec`."""

    start: int
    size: int
    origin: int
    step: int
    exists: Pair


def _window(layer: Layer, axis: int, tile: int, trim: bool) -> _Window:
    """Return the window of a tile; where one tile spans the output and `trim` is set, it leaves padding out."""
    padding, spread, stride = layer.padding[axis], layer.spread[axis], layer.stride[axis]
    start = -(padding // spread)
    last = ((tile - 1) * stride + layer.kernel_size - 1 - padding) // spread
    spans = trim and tile >= layer.out_size[axis]
    if spans:
        start, last = max(start, 0), min(last, layer.in_size[axis] - 1)
    size = max(1, last - start + 1)
    exists = (0, min(size, layer.in_size[axis] - start)) if spans else (0, size)
    return _Window(start, size, -padding - start * spread, tile * stride // spread, exists)


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


def _copies(region: Region) -> float:
    """Return about how many cycles of shared memory it takes to copy a region: rows are read in sectors of 8 words."""
    images, rows, columns = region.size
    return images * rows * (columns + 8) / LANES * 1.5


def _lanes(layer: Layer, tile: Pair, per_patch: int, images: int) -> Triple:
    """Return the grid of lanes with the least to copy and compute."""
    tiles, patches = tile_count(layer.out_size, tile), ceil(images / per_patch)
    axes = [_window(layer, axis, tile[axis], trim=True) for axis in range(2)]

    def cost(lanes: Triple) -> float:
        region = Region(lanes, per_patch, (axes[0].size, axes[1].size), (axes[0].step, axes[1].step))
        return groups(lanes, tiles, patches) * (200 + _copies(region))

    return min(lane_grids(tiles, patches, exact=False), key=cost)


def _gradient_patch(layer: Layer, images: int, pixels: int) -> tuple[Pair, int, Triple]:
    """Return tile, images and lanes for the gradient: the least to load and copy for all outputs."""

    def regions(choice: tuple[Pair, int, Triple]) -> tuple[Region, Region]:
        tile, per_patch, lanes = choice
        rows, columns = ((t - 1) * s + layer.kernel_size for t, s in zip(tile, layer.stride, strict=True))
        step = (tile[0] * layer.stride[0], tile[1] * layer.stride[1])
        return Region(lanes, per_patch, (rows, columns), step), _dy_region(layer, lanes, per_patch, tile)

    def cost(choice: tuple[Pair, int, Triple], count_conflicts: bool) -> float:
        (tile, per_patch, lanes), (x, dy) = choice, regions(choice)
        x_factor, dy_factor = (conflicts(x), conflicts(dy)) if count_conflicts else (1, 1)
        # For about 6 kernels of a task; 20: what a patch costs anyway.
        loads = per_patch * (_gradient_window(layer, tile) * x_factor + 6 * tile[0] * tile[1] * dy_factor) + 20
        count = groups(lanes, tile_count(layer.out_size, tile), ceil(images / per_patch))
        return count * (10 * loads + _copies(x) + 3 * _copies(dy))

    rows, columns = ([t for t in range(1, min(size, pixels) + 1) if size % t == 0] for size in layer.out_size)
    choices = [
        ((r, c), per_patch, lanes)
        for r, c in product(rows, columns)
        if r * c <= pixels and _gradient_window(layer, (r, c)) <= max(GRADIENT_WINDOW, layer.kernel_size**2)
        for per_patch in (8, 4, 2, 1)
        if per_patch == 1 or per_patch <= min(images, pixels // (r * c))
        for lanes in lane_grids(tile_count(layer.out_size, (r, c)), ceil(images / per_patch), exact=True)
    ]
    # Conflicts take long to compute: only for the ten that would be best without.
    return min(sorted(choices, key=lambda c: cost(c, False))[:10], key=lambda c: cost(c, True))


def _dy_region(layer: Layer, lanes: Triple, per_patch: int, tile: Pair) -> Region:
    vector = 4 if tile[1] % 4 == 0 and layer.out_size[1] % 4 == 0 else 1
    return Region(lanes, per_patch, tile, tile, vector)


def _gradient_window(layer: Layer, tile: Pair) -> int:
    rows, columns = ((t - 1) * s + layer.kernel_size for t, s in zip(tile, layer.stride, strict=True))
    return rows * columns


def _with_channels(spec: ConvolutionSpec, layer: Layer, limits: Limits) -> ConvolutionSpec:
    """Return the specification with as many channels in a chunk as surely fit into shared memory."""
    words = 2 * (spec.region.words + spec.filters * (spec.entries + 2))  # of a channel, at most
    fixed = 2 * (3 * spec.warps + 8)
    channels = max(1, min(MAX_CHUNK, layer.channels, (limits.shared_of(spec.resident) // 4 - fixed) // words))
    chunks = ceil(layer.channels / channels)
    return replace(spec, channels=ceil(layer.channels / chunks))


def _with_operands(spec: GradientSpec, layer: Layer, limits: Limits) -> GradientSpec:
    """Return the specification with filters and channels that fit, about as many floats of one as of the other."""
    budget = limits.shared_of(spec.resident) // 8 - spec.warps * spec.tasks * spec.task_words - 4
    window, patch = spec.x.words, spec.dy.words
    channels = max(1, min(layer.channels, budget // 2 // window))
    filters = max(1, min(layer.filters, (budget - channels * window) // patch))
    channels = max(1, min(layer.channels, (budget - filters * patch) // window))
    return replace(spec, channels=channels, filters=filters)
