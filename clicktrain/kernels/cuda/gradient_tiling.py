"""How the gradient of the values is cut up for a GPU: patches, tasks of a warp, filters and channels of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, exp, prod

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda.codegen import Dtype, GradientSpec
from clicktrain.kernels.cuda.region import Pair, Region, Triple, conflicts, groups, lane_grids
from clicktrain.kernels.cuda.tiling import INSTRUCTION_BYTES, Limits, copy_cycles, tile_count

SUMS_AND_WARPS = ((64, 16), (32, 32))
"""Sums of a lane, and how many warps of such lanes a multiprocessor has registers for."""
PIXELS = (16, 8)
"""Of a patch, at most: a lane has its dy in registers."""
TASK_KERNELS = (8, 4)
CODE_BYTES = 32 << 10
COPIED_WORD = {1: 5.3 / 32, 4: 1.5 / 32}
"""Cycles of shared memory for a word that arrives by itself, and for one of four (profiles on an H100)."""
MOST_PARTS = 24
"""Parts into which filters or channels are divided, at most, unless shared memory asks for more."""


def spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> GradientSpec:
    """Choose how the gradient of the values is cut up; `layer` is the forward pass."""
    return candidates(layer, images, dtype, limits)[0]


def candidates(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[GradientSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought, the likely best first."""
    found = []
    patches = dict.fromkeys(_patch(layer, images, min(pixels, limits.lane_pixels)) for pixels in PIXELS)
    for (tile, per_patch, lanes), (sums, warps), most in product(patches, SUMS_AND_WARPS, TASK_KERNELS):
        kernels = max(1, min(most, sums // layer.entries, layer.channels))
        tasks = max(1, sums // (kernels * layer.entries))
        found.append(cut(layer, dtype, tile, per_patch, lanes, tasks, kernels, min(warps, limits.warps), limits))
    small = [made for made in found if code_bytes(made) <= CODE_BYTES] or [min(found, key=code_bytes)]
    return sorted(dict.fromkeys(small), key=lambda made: estimate(made, layer, images, limits))


def cut(
    layer: Layer, dtype: Dtype, tile: Pair, per_patch: int, lanes: Triple, tasks: int, task_kernels: int, warps: int,
    limits: Limits,
) -> GradientSpec:  # fmt: skip
    """Return the best specification among those whose filters and channels fit.

    Parameters
    ----------
    layer : Layer
        The forward pass.
    dtype : {"float32", "float16", "bfloat16"}
        Type of x and dy.
    tile, lanes : pair and triple of int
        Rows and columns of a patch, and the grid of patches of a block; they must divide the output.
    per_patch, tasks, task_kernels, warps : int
        Images of a patch, tasks of a warp, kernels of a task, warps of a block.
    limits : Limits
        What the device gives to a block.
    """
    window = tuple((t - 1) * s + layer.kernel_size for t, s in zip(tile, layer.stride, strict=True))
    step = (tile[0] * layer.stride[0], tile[1] * layer.stride[1])
    grid = tuple(size // (t * count) for size, t, count in zip(layer.out_size, tile, lanes[1:], strict=True))
    made = GradientSpec(
        dtype, layer.kernel_size, layer.patterns, warps, tasks, task_kernels, tile,
        x=Region(lanes, per_patch, (window[0], window[1]), step), dy=_dy_region(layer, lanes, per_patch, tile),
        planes=(prod(layer.in_size), prod(layer.out_size)), start=(-layer.padding[0], -layer.padding[1]), filters=1,
        channels=1, resident=1, grid=(grid[0], grid[1]),
    )  # fmt: skip
    fitting = [replace(made, filters=f, channels=c) for f, c in _operands(made, layer, limits)]
    loads = _loads(made)
    return min(fitting, key=lambda made: prod(_work(made, layer, loads)))


def _operands(made: GradientSpec, layer: Layer, limits: Limits) -> Iterator[Pair]:
    """Yield numbers of filters and channels, even parts of all, whose patches and windows fit into shared memory."""
    budget = limits.shared_of(made.resident) // 8 - made.warps * made.tasks * made.task_words - 4
    yield 1, 1
    for parts in range(1, MOST_PARTS + 1):
        filters = ceil(layer.filters / parts)
        room = (budget - filters * made.dy.words) // made.x.words
        if room < 1:
            continue
        fewest = ceil(layer.channels / room)
        for channel_parts in range(fewest, fewest + 8):
            yield filters, ceil(layer.channels / channel_parts)


def code_bytes(made: GradientSpec) -> int:
    """Return about how long the code of a warp's tasks is."""
    products = made.entries * made.tile[0] * made.tile[1]
    lengths = (products + len(set(reads)) + 8 for reads in made.shapes.reads)
    return INSTRUCTION_BYTES * made.tasks * made.task_kernels * sum(lengths)


def estimate(made: GradientSpec, layer: Layer, images: int, limits: Limits) -> float:
    """Return about how many cycles it takes. Good for choosing, no more."""
    pieces, cycles = _work(made, layer, _loads(made))
    regions = groups(made.x.lanes, tile_count(layer.out_size, made.tile), ceil(images / made.images))
    parts = splits(pieces, regions, made.resident, limits)
    return rounds(pieces, regions, parts, made.resident, limits) * cycles


@dataclass(frozen=True)
class _Loads:
    """Words of x for a kernel and of dy for a task, and in how many turns shared memory delivers one to all lanes."""

    words: Pair
    turns: Pair


def _loads(made: GradientSpec) -> _Loads:
    of_x = max(len(set(words)) for words in made.shapes.reads)
    words = made.images * of_x, made.images * made.tile[0] * made.tile[1]
    return _Loads(words, (conflicts(made.x), conflicts(made.dy)))


def _work(made: GradientSpec, layer: Layer, loads: _Loads) -> tuple[int, float]:
    """Return how many pieces there are, and about how many cycles one takes for a region, as gradient.cuh says."""
    of_filter = len(layer.kernels.filters) / (layer.filters * layer.channels) * made.channels  # kernels, on average
    tasks = made.filters * (of_filter / made.task_kernels + 0.5 * (1 - exp(-of_filter)))
    of_cell = max(1, ceil(tasks / (made.warps * made.tasks)))
    kernels, tasks = made.filters * of_filter / of_cell, tasks / of_cell
    reads, pixels = loads.words
    issue = kernels * (pixels * made.entries + reads + 8) + tasks * (pixels / made.dy.vector + 12)
    shared = kernels * (reads * loads.turns[0] + 2) + tasks * pixels * loads.turns[1]
    words = made.channels * made.x.pixels, made.filters * made.dy.pixels
    copies = words[0] * COPIED_WORD[made.x.vector] + words[1] * COPIED_WORD[made.dy.vector]
    pieces = ceil(layer.filters / made.filters) * ceil(layer.channels / made.channels) * of_cell
    # Warps differ by about a tenth; a region takes some instructions of each warp, and time, besides.
    return pieces, 1.1 * max(issue / 4 + 40 * made.warps, shared + copies) + 600


def shared_bytes(made: GradientSpec) -> int:
    """Return the shared memory of a block: two buffers of windows and patches, and the tasks."""
    buffer = ceil(made.channels * made.x.words / 4) * 4 + made.filters * made.dy.words
    return 4 * (2 * buffer + made.warps * made.tasks * made.task_words)


def splits(pieces: int, regions: int, resident: int, limits: Limits) -> int:
    """Return into how many parts the regions are divided: the fewest regions that any multiprocessor works through."""
    most = min(regions, ceil(4 * resident * limits.multiprocessors / max(1, pieces)))
    return min(range(1, most + 1), key=lambda parts: rounds(pieces, regions, parts, resident, limits))


def rounds(pieces: int, regions: int, parts: int, resident: int, limits: Limits) -> int:
    """Return how many regions a multiprocessor works through, one after another; 2 more to start and to end."""
    return ceil(pieces * parts / (resident * limits.multiprocessors)) * (ceil(regions / parts) + 2)


def _patch(layer: Layer, images: int, pixels: int) -> tuple[Pair, int, Triple]:
    """Return tile, images and lanes: the least to load and copy for all outputs."""
    stride, size = layer.stride, layer.kernel_size

    def cost(choice: tuple[Pair, int, Triple], exact: bool) -> float:
        tile, per_patch, lanes = choice
        window = ((tile[0] - 1) * stride[0] + size, (tile[1] - 1) * stride[1] + size)
        x = Region(lanes, per_patch, window, (tile[0] * stride[0], tile[1] * stride[1]))
        dy = _dy_region(layer, lanes, per_patch, tile)
        # About what a kernel's taps touch; rows that are skewed make more shapes.
        reads = per_patch * max(tile[0] * tile[1], (window[0] - 1) * (window[1] - 1))
        factor = (conflicts(x) * (1.2 if x.skew else 1.0), conflicts(dy)) if exact else (1.0, 1)
        loads = 4 * reads * factor[0] + per_patch * tile[0] * tile[1] * factor[1] + 20
        count = groups(lanes, tile_count(layer.out_size, tile), ceil(images / per_patch))
        return count * (10 * loads + copy_cycles(x) + 3 * copy_cycles(dy))

    rows, columns = ([t for t in range(1, min(size, pixels) + 1) if size % t == 0] for size in layer.out_size)
    choices = [
        ((r, c), per_patch, lanes)
        for r, c in product(rows, columns)
        if r * c <= pixels
        for per_patch in (8, 4, 2, 1)
        if per_patch == 1 or per_patch <= min(images, pixels // (r * c))
        for lanes in lane_grids(tile_count(layer.out_size, (r, c)), ceil(images / per_patch), exact=True)
    ]
    # Conflicts take long to compute: only for those that would be best without.
    return min(sorted(choices, key=lambda c: cost(c, False))[:24], key=lambda c: cost(c, True))


def _dy_region(layer: Layer, lanes: Triple, per_patch: int, tile: Pair) -> Region:
    vector = 4 if tile[1] % 4 == 0 and layer.out_size[1] % 4 == 0 else 1
    return Region(lanes, per_patch, tile, tile, vector)
