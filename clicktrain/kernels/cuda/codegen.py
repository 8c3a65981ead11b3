"""Writes the text of a CUDA unit: constants, the kernels of a .cuh file, and straight-line code for a pool's patterns.

`render` is pure: equal specifications give equal text. Taps are compile-time constants, so each input value is loaded
once for all the taps that use it, and taps that would read padding are left out where that is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

DIRECTORY = Path(__file__).parent
LANES = 32
ELEMENTS = {"float32": "float", "float16": "half16", "bfloat16": "bfloat16"}

Pair = tuple[int, int]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ConvolutionSpec:
    """All that the text of a convolution pass depends on.

    Output pixel r of a patch and tap k of an axis meet in window pixel (r * stride + k + origin) / spread, if that is
    whole and lies in the part of the window that exists.

    Attributes
    ----------
    patterns : tuple of tuple of int
        Kept taps of each pattern, row-major.
    warps : int
        Warps of a block; each has its own filters.
    slots : int
        Filters of a warp.
    sets : tuple of tuple of int
        Slots that can share a kernel's window; every single slot is among them.
    images : int
        Images of a patch.
    tile : (int, int)
        Rows and columns of output pixels of a patch.
    window, origin, exists : pairs
        Rows and columns of its window; see above; first and last + 1 row and column that is not always padding.
    step, start : (int, int)
        Input pixels from one patch to the next, and where the first window starts.
    channels : int
        Input channels in a chunk.
    vector : int
        Columns that are written at once.
    """

    dtype: Dtype
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    warps: int
    slots: int
    sets: tuple[tuple[int, ...], ...]
    images: int
    tile: Pair
    window: Pair
    origin: Pair
    exists: tuple[Pair, Pair]
    stride: Pair
    spread: Pair
    step: Pair
    start: Pair
    channels: int
    vector: int

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def window_pixels(self) -> int:
        """Pixels of a window, all images."""
        return self.images * self.window[0] * self.window[1]

    @property
    def window_floats(self) -> int:
        """Floats of shared memory that a channel's windows take."""
        return self.window_pixels * pitch(self.warps)

    @property
    def filters(self) -> int:
        """Filters of a block."""
        return self.warps * self.slots

    def reads(self, tap: int, row: int, column: int) -> Pair | None:
        """Return the window pixel that a tap needs for an output pixel, or None if there is none."""
        place = []
        for axis, (pixel, k) in enumerate(zip((row, column), divmod(tap, self.kernel_size), strict=True)):
            window, remainder = divmod(pixel * self.stride[axis] + k + self.origin[axis], self.spread[axis])
            if remainder or not self.exists[axis][0] <= window < self.exists[axis][1]:
                return None
            place.append(window)
        return (place[0], place[1])


@dataclass(frozen=True)
class GradientSpec:
    """All that the text of the gradient of the values depends on.

    Attributes
    ----------
    tasks : int
        Tasks of a warp.
    task_filters : int
        Kernels of a task: they have a channel and a pattern in common.
    filters, channels : int
        Filters and channels that a block has in shared memory.
    start : (int, int)
        Input pixel where the window of the first patch starts.
    """

    dtype: Dtype
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    warps: int
    tasks: int
    task_filters: int
    images: int
    tile: Pair
    stride: Pair
    start: Pair
    filters: int
    channels: int

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def window(self) -> Pair:
        """Rows and columns of x that a patch needs."""
        rows, columns = ((t - 1) * s + self.kernel_size for t, s in zip(self.tile, self.stride, strict=True))
        return rows, columns

    @property
    def window_floats(self) -> int:
        """Floats of shared memory that a channel's windows take."""
        return self.images * self.window[0] * self.window[1] * pitch(self.warps)

    @property
    def patch_floats(self) -> int:
        """Floats of shared memory that a filter's patches take."""
        return self.images * self.tile[0] * self.tile[1] * pitch(self.warps)

    @property
    def task_words(self) -> int:
        """Integers that describe a task."""
        return 2 + 2 * self.task_filters


def pitch(warps: int) -> int:
    """Return the floats from one pixel to the next in shared memory.

    Where the threads of a warp copy `warps` neighbouring pixels of 32 / `warps` lanes, all 32 land in different banks.
    """
    return LANES + LANES // warps if warps in (8, 16) else LANES + 1


def render(spec: ConvolutionSpec | GradientSpec) -> str:
    """Return the text of a unit without the platform: what must be the same on every device."""
    if isinstance(spec, ConvolutionSpec):
        parts = [_constants(_convolution_constants(spec), spec.dtype), *_sweep(spec), _source("convolution.cuh")]
    else:
        parts = [_constants(_gradient_constants(spec), spec.dtype), *_accumulate(spec), _source("gradient.cuh")]
    return "\n".join(parts)


def unit(spec: ConvolutionSpec | GradientSpec) -> str:
    """Return what NVRTC compiles: the platform and `render(spec)`."""
    return _source("platform.cuh") + render(spec)


@cache
def _source(name: str) -> str:
    return (DIRECTORY / name).read_text()


def _constants(values: dict[str, int], dtype: Dtype) -> str:
    lines = [f"using Element = {ELEMENTS[dtype]};"]
    return "\n".join([*lines, *(f"constexpr int {name} = {value};" for name, value in values.items()), ""])


def _convolution_constants(spec: ConvolutionSpec) -> dict[str, int]:
    return {
        "WARPS": spec.warps, "THREADS": spec.warps * LANES, "MIN_BLOCKS": max(1, 16 // spec.warps),
        "SLOTS": spec.slots, "IMAGES": spec.images, "TILE_ROWS": spec.tile[0], "TILE_COLUMNS": spec.tile[1],
        "SUMS": spec.slots * spec.images * spec.tile[0] * spec.tile[1],
        "WINDOW_ROWS": spec.window[0], "WINDOW_COLUMNS": spec.window[1], "WINDOW": spec.window_pixels,
        "PITCH": pitch(spec.warps), "STEP_ROWS": spec.step[0], "STEP_COLUMNS": spec.step[1],
        "START_ROW": spec.start[0], "START_COLUMN": spec.start[1], "CHANNELS": spec.channels, "VECTOR": spec.vector,
    }  # fmt: skip


def _gradient_constants(spec: GradientSpec) -> dict[str, int]:
    images, (rows, columns), (window_rows, window_columns) = spec.images, spec.tile, spec.window
    return {
        "WARPS": spec.warps, "THREADS": spec.warps * LANES, "TASKS": spec.tasks, "TASK_FILTERS": spec.task_filters,
        "ENTRIES": spec.entries, "IMAGES": images, "TILE_ROWS": rows, "TILE_COLUMNS": columns,
        "PATCH": images * rows * columns, "WINDOW_ROWS": window_rows, "WINDOW_COLUMNS": window_columns,
        "WINDOW": images * window_rows * window_columns, "PITCH": pitch(spec.warps),
        "STRIDE_ROWS": spec.stride[0], "STRIDE_COLUMNS": spec.stride[1], "START_ROW": spec.start[0],
        "START_COLUMN": spec.start[1], "FILTERS": spec.filters, "CHANNELS": spec.channels,
    }  # fmt: skip


def _sweep(spec: ConvolutionSpec) -> list[str]:
    """Return the function that walks through a warp's program: runs of one pattern and one set of slots."""
    kinds = product(spec.patterns, spec.sets)
    return [
        "__device__ __forceinline__ void sweep(const float* lane_tile, const int* program, const float* weight,",
        "                                      float (&sum)[SUMS]) {",
        "  for (int run; (run = *program++) >= 0;) {",
        "    int count = run >> 16;",
        "    switch (run & 0xffff) {",
        *(line for kind, (pattern, slots) in enumerate(kinds) for line in _run(kind, pattern, slots, spec)),
        "    }",
        "  }",
        "}",
        "",
    ]


def _run(kind: int, pattern: tuple[int, ...], slots: tuple[int, ...], spec: ConvolutionSpec) -> list[str]:
    entries = len(pattern)
    packing = next(width for width in (4, 2, 1) if entries % width == 0)
    uses: dict[tuple[int, int, int], list[str]] = {}
    for image, (number, slot), entry, row, column in product(
        range(spec.images), enumerate(slots), range(entries), range(spec.tile[0]), range(spec.tile[1])
    ):
        place = spec.reads(pattern[entry], row, column)
        if place is None:
            continue
        target = ((slot * spec.images + image) * spec.tile[0] + row) * spec.tile[1] + column
        word, item = divmod(number * entries + entry, packing)
        uses.setdefault((image, *place), []).append(f"sum[{target}] += w{word}.items[{item}] * v;")
    words = len(slots) * entries // packing
    pixels = pitch(spec.warps)
    return [
        f"      case {kind}:",
        "        do {",
        "          const float* window = lane_tile + *program++;",
        *(f"          const Packed<float, {packing}> w{i} = load_packed<{packing}>(weight + {i * packing});"
          for i in range(words)),
        f"          weight += {len(slots) * entries};",
        *(f"          {{ const float v = window[{((image * spec.window[0] + i) * spec.window[1] + j) * pixels}]; "
          f"{' '.join(additions)} }}" for (image, i, j), additions in sorted(uses.items())),
        "        } while (--count);",
        "        break;",
    ]  # fmt: skip


def _accumulate(spec: GradientSpec) -> list[str]:
    """Return the function that adds a patch's products to the sums of a task."""
    return [
        "__device__ __forceinline__ void accumulate(int pattern, const float* x, const float* dy, const int* patches,",
        "                                           float (&sum)[TASK_FILTERS * ENTRIES]) {",
        *(f"  const float* dy{k} = dy + patches[{k}];" for k in range(spec.task_filters)),
        "  switch (pattern) {",
        *(line for number, pattern in enumerate(spec.patterns) for line in _products(number, pattern, spec)),
        "  }",
        "}",
        "",
    ]


def _products(number: int, pattern: tuple[int, ...], spec: GradientSpec) -> list[str]:
    """Return the products of one pattern: window pixels by name, each loaded once, row by row of the patch."""
    pixels, (window_rows, window_columns) = pitch(spec.warps), spec.window
    lines, known = [], set()
    for row in range(spec.tile[0]):
        taps = [divmod(tap, spec.kernel_size) for tap in pattern]
        for column, (i, j) in product(range(spec.tile[1]), taps):
            r, c = row * spec.stride[0] + i, column * spec.stride[1] + j
            if (r, c) not in known:
                known.add((r, c))
                lines.append(f"        const float x{r}_{c} = x[{(r * window_columns + c) * pixels}];")
        for k, column in product(range(spec.task_filters), range(spec.tile[1])):
            additions = " ".join(
                f"sum[{k * spec.entries + e}] += d * x{row * spec.stride[0] + i}_{column * spec.stride[1] + j};"
                for e, (i, j) in enumerate(taps)
            )
            offset = (row * spec.tile[1] + column) * pixels
            lines.append(f"        {{ const float d = dy{k}[{offset}]; {additions} }}")
    advance = spec.tile[0] * spec.tile[1] * pixels
    return [
        f"    case {number}:",
        "      for (int image = 0; image < IMAGES; ++image) {",
        *lines,
        f"        x += {window_rows * window_columns * pixels};",
        *(f"        dy{k} += {advance};" for k in range(spec.task_filters)),
        "      }",
        "      break;",
    ]
