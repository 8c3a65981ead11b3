"""How a pass is cut up for a GPU: which patch a lane computes, how many filters and channels a block has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda.codegen import LANES, ConvolutionSpec, Dtype, GradientSpec

Pair = tuple[int, int]

SUMS = 64
"""Outputs that a lane keeps in registers: with inputs and weights, 128 registers."""
GRADIENT_SUMS = 72
PAIRED_PATTERNS = 4
"""Pools of up to so many patterns have code for pairs of filters with the same pattern; larger ones would outgrow the
instruction cache."""
SLOTTED_PATTERNS = 12
MAX_CHUNK = 64


@dataclass(frozen=True)
class Limits:
    """What a device gives to a block.

    Attributes
    ----------
    shared_bytes : int
        Dynamic shared memory of a block.
    multiprocessors : int
        Multiprocessors of the device.
    warps : int
        Largest number of warps of a block.
    lane_pixels : int
        Largest number of output pixels of a patch.
    """

    shared_bytes: int
    multiprocessors: int
    warps: int = 16
    lane_pixels: int = 32


def patch_count(images: int, per_patch: int, size: Pair, tile: Pair) -> int:
    """Return how many patches the outputs of some images make."""
    return ceil(images / per_patch) * ceil(size[0] / tile[0]) * ceil(size[1] / tile[1])


def convolution_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> ConvolutionSpec:
    """Choose how a convolution pass is cut up: the candidate with the smallest estimated time."""
    return min(candidates(layer, images, dtype, limits), key=lambda spec: estimate(spec, layer, images, limits))


def candidates(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[ConvolutionSpec]:
    """Return the ways to cut up a convolution pass that are worth a thought."""
    all_slots = (2, 1) if layer.filters > 1 and len(layer.patterns) <= SLOTTED_PATTERNS else (1,)
    all_warps = sorted({min(w, limits.warps) for w in (16, 8, 4)}, reverse=True)
    found = []
    for tile, slots in product(_tiles(layer.out_size, limits.lane_pixels, layer.spread), all_slots):
        most = min(limits.lane_pixels, SUMS // slots) // (tile[0] * tile[1])
        for per_patch, most_warps in product((count for count in (8, 4, 2, 1) if count <= max(1, most)), all_warps):
            if per_patch == 1 or per_patch <= images:
                spec = cut(layer, dtype, tile, slots, per_patch, most_warps)
                found.append(_with_channels(spec, layer, limits))
    return found


def estimate(spec: ConvolutionSpec, layer: Layer, images: int, limits: Limits) -> float:
    """Return about how many cycles a pass takes, by the arithmetic of convolution.cuh. Good for choosing, no more."""
    pixels = spec.images * spec.tile[0] * spec.tile[1]
    fma = pixels * spec.entries / (spec.spread[0] * spec.spread[1])
    loads = min(fma, spec.window_pixels) + 2
    density = len(layer.kernels.filters) / max(1, layer.filters * layer.channels)
    records = density * spec.filters * spec.channels + 0.5 * spec.warps
    copies = spec.window_pixels * spec.channels
    issue = records * (fma + loads + 8) + 4 * copies
    chunk = max(issue / 4, records * loads + copies) + 200
    blocks = ceil(patch_count(images, spec.images, layer.out_size, spec.tile) / LANES) * ceil(
        layer.filters / spec.filters
    )
    shared = shared_bytes(spec, spec.filters * spec.channels * spec.entries, spec.filters * spec.channels * 2)
    resident = max(1, min(16 // spec.warps, limits.shared_bytes // shared))
    busiest = ceil(blocks / limits.multiprocessors)
    # Fewer than 8 warps do not hide the latency of each other.
    hidden = min(1.0, min(resident, busiest) * spec.warps / 8)
    return busiest * ceil(layer.channels / spec.channels) * chunk / hidden


def cut(
    layer: Layer, dtype: Dtype, tile: Pair, slots: int, per_patch: int, most_warps: int, trim: bool = True
) -> ConvolutionSpec:
    """Return a specification with one channel in a chunk.

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
    trim : bool
        Leave padding out of windows where one tile spans the output; the code is then for this size only.
    """
    blocks = ceil(layer.filters / (most_warps * slots))
    warps = max(1, ceil(ceil(layer.filters / blocks) / slots))
    sets: tuple[tuple[int, ...], ...] = tuple((slot,) for slot in range(slots))
    if slots == 2 and len(layer.patterns) <= PAIRED_PATTERNS:
        sets = (*sets, (0, 1))
    axes = [_window(layer, axis, tile[axis], trim) for axis in range(2)]
    return ConvolutionSpec(
        dtype, layer.kernel_size, layer.patterns, warps, slots, sets, per_patch, tile,
        window=(axes[0].size, axes[1].size), origin=(axes[0].origin, axes[1].origin),
        exists=(axes[0].exists, axes[1].exists), stride=layer.stride, spread=layer.spread,
        step=(axes[0].step, axes[1].step), start=(axes[0].start, axes[1].start), channels=1,
        vector=next(v for v in (4, 2, 1) if layer.out_size[1] % v == 0 and tile[1] % v == 0),
    )  # fmt: skip


def shared_bytes(spec: ConvolutionSpec, weight_words: int, program_words: int) -> int:
    """Return the shared memory of a block: two buffers of weights, windows, and programs."""
    return 4 * 2 * (weight_words + spec.channels * spec.window_floats + program_words)


def gradient_spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> GradientSpec:
    """Choose how the gradient of the values is cut up; `layer` is the forward pass."""
    tile, per_patch = _gradient_patch(layer, images, min(8, limits.lane_pixels))
    task_filters = max(1, min(3, GRADIENT_SUMS // layer.entries, layer.filters))
    tasks = max(1, min(6, GRADIENT_SUMS // (task_filters * layer.entries), 24 // len(layer.patterns)))
    start = (-layer.padding[0], -layer.padding[1])
    spec = GradientSpec(
        dtype, layer.kernel_size, layer.patterns, limits.warps, tasks, task_filters, per_patch, tile, layer.stride,
        start, filters=1, channels=1,
    )  # fmt: skip
    return _with_operands(spec, layer, limits)


def gradient_shared_bytes(spec: GradientSpec) -> int:
    """Return the shared memory of a block: two buffers of windows and patches, and the tasks."""
    buffer = spec.channels * spec.window_floats + spec.filters * spec.patch_floats
    return 4 * (2 * buffer + spec.warps * spec.tasks * spec.task_words)


def splits(pieces: int, groups: int, limits: Limits) -> int:
    """Return into how many parts the patches are divided, so that every multiprocessor has a block or two."""
    return max(1, min(groups, ceil(2 * limits.multiprocessors / max(1, pieces))))


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


def _gradient_patch(layer: Layer, images: int, pixels: int) -> tuple[Pair, int]:
    """Return tile and images of a patch for the gradient: the fewest floats to copy for all outputs."""

    def floats(choice: tuple[Pair, int]) -> float:
        (rows, columns), per_patch = choice
        window = ((rows - 1) * layer.stride[0] + layer.kernel_size) * (
            (columns - 1) * layer.stride[1] + layer.kernel_size
        )
        copied = per_patch * (window + 3 * rows * columns) + 8  # 8: what a patch costs anyway
        return ceil(patch_count(images, per_patch, layer.out_size, (rows, columns)) / LANES) * copied

    choices = [
        (tile, per_patch)
        for tile in _tiles(layer.out_size, pixels, (1, 1))
        for per_patch in (8, 4, 2, 1)
        if per_patch == 1 or per_patch <= min(images, pixels // (tile[0] * tile[1]))
        if tile[0] <= layer.out_size[0] and tile[1] <= layer.out_size[1]
    ]
    return min(choices, key=floats)


def _with_channels(spec: ConvolutionSpec, layer: Layer, limits: Limits) -> ConvolutionSpec:
    """Return the specification with as many channels in a chunk as surely fit into shared memory."""
    words = 2 * (spec.window_floats + spec.filters * (spec.entries + 2))  # of a channel, at most
    fixed = 2 * (3 * spec.warps + 8)
    channels = max(1, min(MAX_CHUNK, layer.channels, (limits.shared_bytes // 4 - fixed) // words))
    chunks = ceil(layer.channels / channels)
    return replace(spec, channels=ceil(layer.channels / chunks))


def _with_operands(spec: GradientSpec, layer: Layer, limits: Limits) -> GradientSpec:
    """Return the specification with filters and channels that fit, about as many floats of one as of the other."""
    budget = limits.shared_bytes // 8 - spec.warps * spec.tasks * spec.task_words
    window, patch = spec.window_floats, spec.patch_floats
    channels = max(1, min(layer.channels, budget // 2 // window))
    filters = max(1, min(layer.filters, (budget - channels * window) // patch))
    channels = max(1, min(layer.channels, (budget - filters * patch) // window))
    return replace(spec, channels=channels, filters=filters)
