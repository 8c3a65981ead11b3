"""How the gradient of the values with windows in registers is cut up: patches, filters and channels of a piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import ceil, prod, sqrt

import numpy as np

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.region import BANKS, LANES, Pair, Region, Triple, collisions, groups, lane_grids
from clicktrain.kernels.cuda.tiling import INSTRUCTION_BYTES, Limits, tile_count, window_of
from clicktrain.kernels.cuda.window_text import EARLY_UNITS, Frame, WindowSpec

MOST_ENTRIES = 9
PIXELS = 64
"""Of a patch, at most, all images."""
CODE_BYTES = 40 << 10
OTHER_REGISTERS = {True: 18, False: 30}
"""Beside windows, patches and sums; by whether windows are whole images."""
WARPS = {58: 32, 80: 24, 96: 20, 128: 16}
"""Warps of a multiprocessor by registers of a thread, as estimated: of 64, the compiler needs some to move the rest."""
RESIDENT = (1, 2)
FILTER_PARTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
CHANNEL_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
LIKELY_GRIDS = 6
HOPELESS = 2.5
"""Times the cycles of the best patches that fit: what takes longer is not thought through."""
WORDS_PER_CYCLE = 6.0
"""From the second-level cache to a multiprocessor, where all ask (H100)."""
COPY_CYCLES = {4: 8.0, 1: 4.5}
"""Of shared memory for 32 copies of so many words (H100)."""
REGION_CYCLES, BLOCK_CYCLES = 2500.0, 3000.0
"""To start and end a region, and a block."""


def spec(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> WindowSpec | None:
    """Choose how the gradient of the values is cut up; None where it cannot be, or not well."""
    return next(iter(candidates(layer, images, dtype, limits)), None)


def candidates(layer: Layer, images: int, dtype: Dtype, limits: Limits) -> list[WindowSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought, the likely best first."""
    if dtype != "float32" or layer.entries > MOST_ENTRIES or not len(layer.kernels.filters) or not images:
        return []
    found: list[tuple[float, WindowSpec]] = []
    least = 0.0
    for cycles, patches in _patches(layer, images, limits):
        if least and cycles > HOPELESS * least:
            break
        found += [filled for made in patches for filled in _fillings(made, layer, images, limits)]
        least = least or (cycles if found else 0.0)
    return [made for _, made in sorted(found, key=lambda timed: timed[0])]


def cut(layer: Layer, tile: Pair, per_patch: int, lanes: Triple, warps: int, resident: int) -> WindowSpec:
    """Return a specification for patches of this kind with one filter and one channel in a piece."""
    axes = [window_of(layer, axis, tile[axis], trim=True) for axis in range(2)]
    spans = (tile[0] == layer.out_size[0], tile[1] == layer.out_size[1])
    window, start = (axes[0].size, axes[1].size), (axes[0].start, axes[1].start)
    made = WindowSpec(
        layer.kernel_size, layer.patterns, warps, resident, tile, per_patch, lanes, window,
        (axes[0].origin, axes[1].origin), start, spans, layer.stride, layer.in_size, layer.out_size, None,
    )  # fmt: skip
    bare = all(spans) and window == layer.in_size and start == (0, 0)
    return made if bare else replace(made, frame=_frame(made))


def _frame(made: WindowSpec) -> Frame:
    """Return how windows lie in a slot: whole rows, copied and loaded by 4, where they span the image."""
    step = (made.tile[0] * made.stride[0], made.tile[1] * made.stride[1])
    rows, columns = ((n - 1) * s + w for n, s, w in zip(made.lanes[1:], step, made.window, strict=True))
    width, images = made.in_size[1], made.lanes[0] * made.images
    whole_rows = made.lanes[2] * made.tile[1] == made.out_size[1] and made.tile[1] % 4 == width % 4 == 0
    if whole_rows and made.stride[1] == 1 and -4 <= made.start[1] <= 0 and columns + made.start[1] <= width + 4:
        left = 0 if made.start[1] == 0 and columns <= width else 4
        pitches = np.array([
            (pitch, image) for pitch in range(width + left, width + left + 8, 4)
            for image in range(rows * pitch, rows * pitch + BANKS, 4)
        ])  # fmt: skip
        found = collisions(made.lanes, pitches[:, 1], step[0] * pitches[:, 0], step[1], 4)
        row_pitch, image_pitch = (int(word) for word in pitches[np.lexsort((pitches[:, 1], found))[0]])
        # Rows above and below all images of a region are padding that need not be copied either.
        top, below = -made.start[0], rows + made.start[0] - made.in_size[0]
        whole_columns = made.lanes[1] * made.tile[0] == made.out_size[0] and top > 0 and below >= 0
        copied, top = (made.in_size[0], top) if whole_columns else (rows, 0)
        return Frame(copied, width, top, row_pitch, 0, image_pitch, left, True, images * image_pitch + left)
    region = Region(made.lanes, made.images, made.window, step)
    return Frame(rows, columns, 0, region.row_pitch, region.skew, region.image_pitch, 0, False, region.words)


def registers(made: WindowSpec) -> int:
    """Return about how many registers a thread needs."""
    patch = 4 * min(made.units, EARLY_UNITS)
    return made.images * prod(made.window) + patch + 2 * made.entries + OTHER_REGISTERS[made.frame is None]


def code_bytes(made: WindowSpec) -> int:
    """Return about how long the code of the patterns is."""
    return INSTRUCTION_BYTES * len(made.patterns) * (made.images * prod(made.tile) * made.entries + 10)


def _patches(layer: Layer, images: int, limits: Limits) -> list[tuple[float, list[WindowSpec]]]:
    """Return tiles and images of a patch by what they cost, each with its best grid of lanes, in numbers of warps."""
    divisors = [[t for t in range(1, size + 1) if size % t == 0] for size in layer.out_size]
    found = []
    for tile, per_patch in product(product(*divisors), (1, 2, 4, 8)):
        if per_patch * prod(tile) > min(PIXELS, 2 * limits.lane_pixels) or per_patch > images:
            continue
        cycles, made = _with_lanes(layer, (tile[0], tile[1]), per_patch, images)
        if code_bytes(made) <= CODE_BYTES:
            fitting = [warps for most, warps in WARPS.items() if registers(made) <= most]
            ways = product(fitting, RESIDENT)
            found.append((cycles, [replace(made, warps=min(w // r, limits.warps), resident=r) for w, r in ways]))
    return sorted(found, key=lambda patches: patches[0])


def _with_lanes(layer: Layer, tile: Pair, per_patch: int, images: int) -> tuple[float, WindowSpec]:
    """Return the grid of lanes that has the least to copy and the fewest idle lanes, and its cycles for few kernels."""
    tiles, patches = tile_count(layer.out_size, tile), ceil(images / per_patch)
    grids = sorted(
        lane_grids(tiles, patches, exact=True),
        key=lambda lanes: (groups(lanes, tiles, patches), lanes[2] != tiles[1], -lanes[2]),
    )
    made = [cut(layer, tile, per_patch, lanes, 1, 1) for lanes in grids[:LIKELY_GRIDS]]
    kernels = 4 * _kernel_cycles(made[0])  # of all grids alike
    cycles = [groups(m.lanes, tiles, patches) * (kernels + _window_cycles(m)) for m in made]
    best = min(cycles)
    return best, made[cycles.index(best)]


def _fillings(made: WindowSpec, layer: Layer, images: int, limits: Limits) -> Iterator[tuple[float, WindowSpec]]:
    """Yield pieces that fit into shared memory, for each number of filters that with the best number of channels."""
    cost, room = _Cost.of(made, layer, images), limits.shared_of(made.resident)
    for filters in sorted({ceil(layer.filters / parts) for parts in FILTER_PARTS}):
        timed = []
        for channels in sorted({ceil(layer.channels / parts) for parts in CHANNEL_PARTS}):
            kernels = _most_kernels(filters, channels, layer)
            if made.shared_bytes_of(filters, channels, kernels) <= room:
                timed.append((cost.cycles(filters, channels, made.warps, made.resident, limits), channels, kernels))
        if timed:
            cycles, channels, kernels = min(timed)
            yield cycles, replace(made, filters=filters, channels=channels, kernels=kernels)


def _most_kernels(filters: int, channels: int, layer: Layer) -> int:
    """Return for how many kernels a piece has room: rarely too few, and what is too much goes into another piece."""
    expected = len(layer.kernels.filters) / (layer.filters * layer.channels) * filters * channels
    return min(filters * channels, max(filters, ceil(1.05 * expected + 3 * sqrt(expected))))


def _kernel_cycles(made: WindowSpec) -> float:
    """Return about how many cycles of a multiprocessor a kernel of a region takes a warp."""
    pixels = [(row, column) for row in range(made.tile[0]) for column in range(made.tile[1])]
    taps = [tap for pattern in made.patterns for tap in pattern]
    products = sum(made.word(tap, *pixel) is not None for tap in taps for pixel in pixels) / len(made.patterns)
    shuffles = _shuffles(made)
    shared = 4 * made.units + 1 + shuffles + 1 + 1 + 2 / made.groups
    issue = (made.images * products + made.units + 3 * shuffles + 30) / 4
    return float(max(shared, issue))


def _shuffles(made: WindowSpec) -> int:
    """Return how many shuffles the sums of a kernel need."""
    found, count, distance = 0, made.entries, made.cells // 2
    while distance:
        count = min(count, distance)
        found, distance = found + count, distance // 2
    return found


def _window_cycles(made: WindowSpec) -> float:
    """Return about how many cycles of a multiprocessor it takes to copy and load the windows of a warp."""
    words = made.lanes[0] * made.images * (made.frame.rows * made.frame.columns if made.frame else prod(made.in_size))
    copies = ceil(words / made.x_vector / LANES)
    if made.frame is None:
        loads = 4.0 * made.images * ceil(prod(made.in_size) / 4)
    elif made.frame.quads:
        first = made.frame.left + made.start[1]
        loads = 4.0 * made.images * made.window[0] * ((first + made.window[1] - 1) // 4 - first // 4 + 1)
    else:
        loads = float(made.images * prod(made.window))
    return copies * (COPY_CYCLES[made.x_vector] + 4) + loads + 20


def estimate(made: WindowSpec, layer: Layer, images: int, limits: Limits) -> float:
    """Return about how many cycles it takes. Good for choosing, no more."""
    return _Cost.of(made, layer, images).cycles(made.filters, made.channels, made.warps, made.resident, limits)


@dataclass(frozen=True)
class _Cost:
    """What patches of one kind cost, in cycles of a multiprocessor, as window_gradient.cuh says.

    Attributes
    ----------
    kernel, window : float
        For a warp to work through a kernel, and to copy and load the window of a channel.
    plane : float
        To copy the patches of a filter.
    words : (int, int)
        That come of a channel and of a filter.
    regions : int
        How many there are.
    """

    layer: Layer
    kernel: float
    window: float
    plane: float
    words: Pair
    regions: int

    @classmethod
    def of(cls, made: WindowSpec, layer: Layer, images: int) -> _Cost:
        words = LANES * made.images * prod(made.window), prod(made.lanes) * made.images * prod(made.tile)
        plane = words[1] / made.vector / LANES * (COPY_CYCLES[made.vector] + 2)
        regions = region_count(made, layer, images)
        return cls(layer, _kernel_cycles(made), _window_cycles(made), plane, words, regions)

    def cycles(self, filters: int, channels: int, warps: int, resident: int, limits: Limits) -> float:
        """Return about how many cycles it takes with pieces of so many filters and channels."""
        pieces = ceil(self.layer.filters / filters) * ceil(self.layer.channels / channels)
        parts = splits(pieces, self.regions, resident, limits)
        resident = min(resident, ceil(pieces * parts / limits.multiprocessors))
        # The longest of the warps is waited for; few warps do not hide each other's latency.
        uneven = 1 + 0.3 / max(0.5, channels / warps)
        hidden = min(1.0, resident * warps / 24) ** 0.4
        work = (len(self.layer.kernels.filters) / pieces * self.kernel + channels * self.window) * uneven / hidden
        arriving = (channels * self.words[0] + filters * self.words[1]) / WORDS_PER_CYCLE
        region = max(work, arriving) * resident + filters * self.plane + REGION_CYCLES
        waves = ceil(pieces * parts / (limits.multiprocessors * resident))
        return float(waves * (ceil(self.regions / parts) * region + BLOCK_CYCLES) + 12 * parts + 1500)


def region_count(made: WindowSpec, layer: Layer, images: int) -> int:
    """Return how many regions cover the outputs."""
    return groups(made.lanes, tile_count(layer.out_size, made.tile), ceil(images / made.images))


@cache
def splits(pieces: int, regions: int, resident: int, limits: Limits) -> int:
    """Return into how many parts the regions are divided: the fewest for which no multiprocessor has less to do."""
    seats = limits.multiprocessors * resident
    most = min(regions, ceil(2 * seats / max(1, pieces)))

    def rounds(parts: int) -> float:
        return ceil(pieces * parts / seats) * (ceil(regions / parts) + 0.1)

    return min(range(1, most + 1), key=rounds)
