"""Writes the text of a CUDA unit for the gradient of the values with windows in registers: see window_gradient.cuh.

`render` is pure: equal specifications give equal text. Which words of the window and of the patch meet in a tap is
known here, so a pattern's products are straight-line code, and taps in the padding are left out where a patch spans the
image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil, prod

from clicktrain.kernels.cuda.codegen import Pair, _constants, _source
from clicktrain.kernels.cuda.region import LANES, Triple

UNIT_PITCH = LANES + 1
"""Units of 4 words from one unit of a lane's patch to the next."""
EARLY_UNITS = 4
"""So many units of a patch are loaded before the pattern is looked at; more would take too many registers."""


@dataclass(frozen=True)
class Frame:
    """How the windows of a warp lie in its slot, where they are not whole images.

    Attributes
    ----------
    rows, columns : int
        Of an image, as copied.
    top : int
        Rows of padding that no copy touches, above; at least so many words are free below.
    row_pitch, skew, image_pitch : int
        Words from one row to the next, more at each row of patches, and from one image to the next.
    left : int
        Words of padding before each row, and so behind the one above, that no copy touches.
    quads : bool
        Whether columns are copied and loaded by 4.
    words : int
        Words of the slot.
    """

    rows: int
    columns: int
    top: int
    row_pitch: int
    skew: int
    image_pitch: int
    left: int
    quads: bool
    words: int


@dataclass(frozen=True)
class WindowSpec:
    """All that the text depends on; it is for one size of images.

    Attributes
    ----------
    patterns : tuple of tuple of int
        Kept taps of each pattern, row-major.
    warps, resident : int
        Warps of a block, and blocks of a multiprocessor.
    tile, images : (int, int), int
        Rows and columns of a patch, and its images.
    lanes : (int, int, int)
        Patches along images, rows and columns; they divide those of an image.
    window, origin, start : (int, int)
        Of x: output pixel r and tap k of an axis meet in window pixel r * stride + k + origin, the first window starts
        at input pixel `start`.
    spans : (bool, bool)
        Along which axes a patch spans the image: taps outside the window are padding there.
    in_size, out_size : (int, int)
        Rows and columns of x and dy.
    frame : Frame or None
        How windows lie in a slot; None: as whole images, like patches of dy.
    filters, channels : int
        Of a piece, at most.
    kernels : int
        Of a piece, at most.
    """

    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    warps: int
    resident: int
    tile: Pair
    images: int
    lanes: Triple
    window: Pair
    origin: Pair
    start: Pair
    spans: tuple[bool, bool]
    stride: Pair
    in_size: Pair
    out_size: Pair
    frame: Frame | None
    filters: int = 1
    channels: int = 1
    kernels: int = 1

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def cells(self) -> int:
        """Entries, rounded up to a power of two: what lanes divide among them."""
        return _power_of_two(self.entries)

    @property
    def groups(self) -> int:
        """Kernels whose sums over lanes are completed at once."""
        return LANES // self.cells

    @property
    def whole(self) -> bool:
        """Whether a patch is a whole image: its pixels are one row then."""
        return self.tile == self.out_size

    @property
    def units(self) -> int:
        """Units of 4 words of a patch, all images."""
        return self.images * ceil(prod(self.tile) / 4)

    @property
    def plane_words(self) -> int:
        """Words of a filter's plane, so that neighbouring planes that are copied side by side differ in their banks."""
        units = self.units * UNIT_PITCH
        apart = {1: 1, 2: 2, 4: 4, 8: 0}[8 // self.ways]
        return 4 * (units + (apart - units) % 8) if self.ways > 1 else 4 * units

    @property
    def vector(self) -> int:
        """Pixels of dy that are copied at once."""
        rows = prod(self.tile) if self.whole else self.tile[1]
        return 4 if rows % 4 == prod(self.out_size) % 4 == 0 and (self.whole or self.out_size[1] % 4 == 0) else 1

    @property
    def ways(self) -> int:
        """Planes of dy that are copied side by side, to read 128 bytes: planes of an image are neighbours in memory."""
        return _power_of_two(max(1, 32 // prod(self.out_size)), 8) if self.whole and self.vector == 4 else 1

    @property
    def x_vector(self) -> int:
        """Pixels of x that are copied at once."""
        if self.frame:
            return 4 if self.frame.quads else 1
        return 4 if prod(self.in_size) % 4 == 0 else 1

    @property
    def slot_words(self) -> int:
        """Words of a warp's windows."""
        if self.frame:
            return ceil(self.frame.words / 4) * 4
        return self.images * ceil(prod(self.in_size) / 4) * UNIT_PITCH * 4

    @property
    def pending_words(self) -> int:
        """Words of a warp's sums over lanes that are not complete."""
        return self.groups * (LANES + self.cells)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.shared_bytes_of(self.filters, self.channels, self.kernels)

    def shared_bytes_of(self, filters: int, channels: int, kernels: int) -> int:
        """Return the shared memory of a block if its piece had so many filters, channels and kernels at most."""
        # A channel may be divided among warps; each warp has two words and an end.
        program = kernels + 2 * (channels + self.warps) + 3 * self.warps
        return 4 * (filters * self.plane_words + self.warps * (self.slot_words + self.pending_words) + program)

    @property
    def grid(self) -> Pair:
        """Regions along the rows and columns of an image."""
        rows, columns = (
            size // (t * count) for size, t, count in zip(self.out_size, self.tile, self.lanes[1:], strict=True)
        )
        return rows, columns

    @property
    def pattern_span(self) -> int:
        """By what the place of a plane is multiplied in a program, to leave room for a pattern."""
        return _power_of_two(len(self.patterns))

    def word(self, tap: int, row: int, column: int) -> int | None:
        """Return the word of the window, in one image, that a tap needs for an output pixel; None: padding."""
        place = []
        for axis, (pixel, k) in enumerate(zip((row, column), divmod(tap, self.kernel_size), strict=True)):
            at = pixel * self.stride[axis] + k + self.origin[axis]
            if self.spans[axis] and not 0 <= at < min(self.window[axis], self.in_size[axis] - self.start[axis]):
                return None
            place.append(at)
        return place[0] * self.window[1] + place[1]


def render(spec: WindowSpec) -> str:
    """Return the text of a unit without the platform."""
    parts = [_constants(_numbers(spec), "float32"), *_load_window(spec), *_multiply(spec), *_sum_of_lanes(spec)]
    return "\n".join([*parts, _source("window_gradient.cuh"), _source("finish.cuh")])


def unit(spec: WindowSpec) -> str:
    """Return what NVRTC compiles: the platform and `render(spec)`."""
    return _source("platform.cuh") + render(spec)


def _power_of_two(number: int, most: int = 1 << 30) -> int:
    return min(most, 1 << (number - 1).bit_length())


def _numbers(spec: WindowSpec) -> dict[str, int]:
    frame = spec.frame or Frame(1, prod(spec.in_size), 0, 0, 0, 0, 0, False, 0)
    dy = (1, prod(spec.tile)) if spec.whole else spec.tile
    return {
        "WARPS": spec.warps, "THREADS": spec.warps * LANES, "RESIDENT": spec.resident, "ENTRIES": spec.entries,
        "CELLS": spec.cells, "PATTERN_SPAN": spec.pattern_span, "IMAGES": spec.images, "LANE_IMAGES": spec.lanes[0],
        "LANE_ROWS": spec.lanes[1], "LANE_COLUMNS": spec.lanes[2], "TILE_ROWS": spec.tile[0],
        "TILE_COLUMNS": spec.tile[1], "REGIONS_ROWS": spec.grid[0], "REGIONS_COLUMNS": spec.grid[1],
        "FILTERS": spec.filters, "PLANE_WORDS": spec.plane_words, "DY_ROWS": dy[0], "DY_COLUMNS": dy[1],
        "DY_VECTOR": spec.vector, "DY_WAYS": spec.ways, "IMAGE_UNITS": ceil(prod(spec.tile) / 4),
        "OUT_WIDTH": spec.out_size[1], "OUT_PIXELS": prod(spec.out_size), "STRIDE_ROWS": spec.stride[0],
        "STRIDE_COLUMNS": spec.stride[1], "START_ROW": spec.start[0], "START_COLUMN": spec.start[1],
        "IN_HEIGHT": spec.in_size[0], "IN_WIDTH": spec.in_size[1], "IN_PIXELS": prod(spec.in_size),
        "BARE": int(spec.frame is None), "X_ROWS": frame.rows, "X_COLUMNS": frame.columns, "X_LEFT": frame.left,
        "X_TOP": frame.top, "X_VECTOR": spec.x_vector, "ROW_PITCH": frame.row_pitch, "SKEW": frame.skew,
        "IMAGE_PITCH": frame.image_pitch, "STEP_ROWS": spec.tile[0] * spec.stride[0],
        "STEP_COLUMNS": spec.tile[1] * spec.stride[1], "WINDOW_UNITS": ceil(prod(spec.in_size) / 4),
        "WINDOW_WORDS": spec.images * prod(spec.window), "SLOT_WORDS": spec.slot_words,
    }  # fmt: skip


def _load_window(spec: WindowSpec) -> list[str]:
    """Return the function that loads a lane's window from its warp's slot."""
    if spec.frame is None:
        lines = _whole_images(spec)
    elif spec.frame.quads:
        lines = _quads(spec, spec.frame)
    else:
        lines = _words(spec, spec.frame)
    head = "__device__ __forceinline__ void load_window(const float* corner, float (&window)[WINDOW_WORDS]) {"
    return [head, *lines, "}", ""]


def _whole_images(spec: WindowSpec) -> list[str]:
    lines, pixels = [], prod(spec.in_size)
    for image, unit in product(range(spec.images), range(ceil(pixels / 4))):
        place = (image * ceil(pixels / 4) + unit) * UNIT_PITCH * 4
        words = {4 * unit + item: item for item in range(min(4, pixels - 4 * unit))}
        lines += _unpacked(place, {image * pixels + word: item for word, item in words.items()})
    return lines


def _quads(spec: WindowSpec, frame: Frame) -> list[str]:
    """Return loads of whole rows of 4: lanes are 4 words or so apart, single words would meet in banks."""
    lines = []
    for image, row in product(range(spec.images), range(spec.window[0])):
        start = image * spec.lanes[0] * frame.image_pitch + row * frame.row_pitch
        start += row // (spec.tile[0] * spec.stride[0]) * frame.skew
        first = frame.left + spec.start[1]
        quads: dict[int, dict[int, int]] = {}
        for column in range(spec.window[1]):
            quad, item = divmod(first + column, 4)
            quads.setdefault(quad, {})[(image * spec.window[0] + row) * spec.window[1] + column] = item
        for quad, words in quads.items():
            lines += _unpacked(start + 4 * quad, words)
    return lines


def _words(spec: WindowSpec, frame: Frame) -> list[str]:
    lines = []
    for image, row, column in product(range(spec.images), range(spec.window[0]), range(spec.window[1])):
        place = image * spec.lanes[0] * frame.image_pitch + row * frame.row_pitch + column
        place += row // (spec.tile[0] * spec.stride[0]) * frame.skew
        word = (image * spec.window[0] + row) * spec.window[1] + column
        lines.append(f"  window[{word}] = corner[{place}];")
    return lines


def _unpacked(place: int, words: dict[int, int]) -> list[str]:
    """Return the load of 4 words, and where they go."""
    moves = " ".join(f"window[{word}] = v.items[{item}];" for word, item in words.items())
    return [f"  {{ const Packed<float, 4> v = load_packed<4>(corner + {place}); {moves} }}"]


def _multiply(spec: WindowSpec) -> list[str]:
    """Return the function that gives a lane's sums of a kernel."""
    units = ceil(prod(spec.tile) / 4)
    loads = {
        (image, unit): f"const Packed<float, 4> d{image}_{unit} = load_packed<4>"
        f"(patch + {(image * units + unit) * UNIT_PITCH * 4});"
        for image, unit in product(range(spec.images), range(units))
    }
    early = loads if len(loads) <= EARLY_UNITS else {}
    late = {} if early else loads
    cases = [_products(pattern, late, spec) for pattern in spec.patterns]
    return [
        "__device__ __forceinline__ void multiply(int pattern, const float* patch,",
        "                                         const float (&window)[WINDOW_WORDS], float (&sum)[ENTRIES]) {",
        *early.values(), *_switch(cases), "}", "",
    ]  # fmt: skip


def _switch(cases: list[list[str]]) -> list[str]:
    if len(cases) == 1:
        return cases[0]
    numbered = [["default: {" if i == len(cases) - 1 else f"case {i}: {{", *c, "break;", "}"]
                for i, c in enumerate(cases)]  # fmt: skip
    return ["switch (pattern) {", *(line for case in numbered for line in case), "}"]


def _products(pattern: tuple[int, ...], loads: dict[Pair, str], spec: WindowSpec) -> list[str]:
    """Return a pattern's products, unit by unit of dy; entries take turns, so that no sum waits for itself."""
    lines, begun = [], set()
    pixels = list(product(range(spec.tile[0]), range(spec.tile[1])))
    for image, number in product(range(spec.images), range(len(pixels))):
        unit, item = divmod(number, 4)
        if item == 0 and (image, unit) in loads:
            lines.append(loads[image, unit])
        for entry, tap in enumerate(pattern):
            word = spec.word(tap, *pixels[number])
            if word is None:
                continue
            sign = "+=" if entry in begun else "="
            begun.add(entry)
            lines.append(
                f"sum[{entry}] {sign} window[{image * prod(spec.window) + word}] * d{image}_{unit}.items[{item}];"
            )
    return [*lines, *(f"sum[{entry}] = 0.0f;" for entry in range(len(pattern)) if entry not in begun)]


def _sum_of_lanes(spec: WindowSpec) -> list[str]:
    """Return the function that leaves entry `lane % CELLS` to each lane, summed over CELLS neighbours.

    At each step lanes pass on what their partner goes on with: half of the entries.
    """
    lines, count, distance = [], spec.entries, spec.cells // 2
    while distance:
        lines.append(f"{{ const bool upper = lane & {distance};")
        for entry in range(min(count, distance)):
            other = entry + distance
            if other < count:
                lines.append(f"const float kept{entry} = upper ? sum[{other}] : sum[{entry}];")
                lines.append(
                    f"sum[{entry}] = kept{entry} + shuffle_xor(upper ? sum[{entry}] : sum[{other}], {distance});"
                )
            else:  # what the upper lanes have then is of no entry
                lines.append(f"sum[{entry}] += shuffle_xor(sum[{entry}], {distance});")
        lines.append("}")
        count, distance = min(count, distance), distance // 2
    head = "__device__ __forceinline__ float sum_of_lanes(float (&sum)[ENTRIES], int lane) {"
    return [head, *lines, "return sum[0];", "}", ""]
