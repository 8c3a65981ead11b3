"""Writes the text of a CUDA unit: constants, the kernels of a .cuh file, and straight-line code for a pool's patterns.

`render` is pure: equal specifications give equal text. Taps are compile-time constants, so each input value is loaded
once for all the taps that use it, and taps that would read padding are left out where that is known.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

from clicktrain.kernels.cuda.region import LANES, Region

DIRECTORY = Path(__file__).parent
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
    tile : (int, int)
        Rows and columns of output pixels of a patch.
    region : Region
        The patches of the lanes, and their windows.
    origin, exists : pairs
        See above; first and last + 1 row and column of a window that is not always padding.
    start : (int, int)
        Input pixel where the first window starts.
    channels : int
        Input channels in a chunk.
    resident : int
        Blocks that a multiprocessor has registers and shared memory for.
    vector : int
        Columns that are written at once.
    plane : int
        Pixels of a channel of the input, where the code is for this size only; 0: told at launch.
    """

    dtype: Dtype
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    warps: int
    slots: int
    sets: tuple[tuple[int, ...], ...]
    tile: Pair
    region: Region
    origin: Pair
    exists: tuple[Pair, Pair]
    stride: Pair
    spread: Pair
    start: Pair
    channels: int
    resident: int
    vector: int
    plane: int = 0

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def images(self) -> int:
        """Images of a patch."""
        return self.region.images

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
    task_kernels : int
        Kernels of a task: they have a channel in common.
    tile : (int, int)
        Rows and columns of a patch; they divide the output's.
    x, dy : Region
        The windows of x and the patches of dy; the grid of lanes divides that of the patches of an image.
    start : (int, int)
        Input pixel where the window of the first patch starts.
    filters, channels : int
        Filters and channels that a block has in shared memory.
    resident : int
        Blocks that a multiprocessor has registers and shared memory for.
    planes : (int, int)
        Pixels of a channel of x and of dy, where the code is for this size only; 0: told at launch.
    """

    dtype: Dtype
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    warps: int
    tasks: int
    task_kernels: int
    tile: Pair
    x: Region
    dy: Region
    start: Pair
    filters: int
    channels: int
    resident: int
    planes: Pair = (0, 0)

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def images(self) -> int:
        """Images of a patch."""
        return self.x.images

    def reads(self, tap: Pair, row: int, column: int) -> Pair:
        """Return the window pixel that meets an output pixel at a tap."""
        (down, right), (step_rows, step_columns) = tap, self.x.step
        return row * step_rows // self.tile[0] + down, column * step_columns // self.tile[1] + right

    @property
    def task_words(self) -> int:
        """Integers that describe a task."""
        return 1 + 3 * self.task_kernels


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


@cache
def sources() -> str:
    """Return a digest of everything that is written by hand."""
    names = ("platform.cuh", "convolution.cuh", "gradient.cuh")
    return hashlib.sha256("".join(map(_source, names)).encode()).hexdigest()


def _constants(values: dict[str, int], dtype: Dtype) -> str:
    lines = [f"using Element = {ELEMENTS[dtype]};"]
    return "\n".join([*lines, *(f"constexpr int {name} = {value};" for name, value in values.items()), ""])


def _convolution_constants(spec: ConvolutionSpec) -> dict[str, int]:
    return {
        "WARPS": spec.warps, "THREADS": spec.warps * LANES, "RESIDENT": spec.resident, "SLOTS": spec.slots,
        "IMAGES": spec.images, "TILE_ROWS": spec.tile[0], "TILE_COLUMNS": spec.tile[1],
        "SUMS": spec.slots * spec.images * spec.tile[0] * spec.tile[1], "START_ROW": spec.start[0],
        "START_COLUMN": spec.start[1], "CHANNELS": spec.channels, "CHANNEL_WORDS": spec.region.words,
        "VECTOR": spec.vector, "PLANE": spec.plane, **spec.region.constants(),
    }  # fmt: skip


_OF_DY = ("REGION_ROWS", "REGION_COLUMNS", "ROW_PITCH", "SKEW", "IMAGE_PITCH")
"""What of the region of dy differs from that of x."""


def _gradient_constants(spec: GradientSpec) -> dict[str, int]:
    return {
        "WARPS": spec.warps, "THREADS": spec.warps * LANES, "RESIDENT": spec.resident, "TASKS": spec.tasks,
        "TASK_KERNELS": spec.task_kernels, "ENTRIES": spec.entries, "IMAGES": spec.images, "TILE_ROWS": spec.tile[0],
        "TILE_COLUMNS": spec.tile[1], "START_ROW": spec.start[0], "START_COLUMN": spec.start[1],
        "FILTERS": spec.filters, "CHANNELS": spec.channels, "CHANNEL_WORDS": spec.x.words,
        "FILTER_WORDS": spec.dy.words, "PLANE": spec.planes[0],
        "DY_PLANE": spec.planes[1], "DY_VECTOR": spec.dy.vector, **spec.x.constants(),
        **{f"DY_{name}": value for name, value in spec.dy.constants().items() if name in _OF_DY},
    }  # fmt: skip


def _sweep(spec: ConvolutionSpec) -> list[str]:
    """Return the function that walks through a warp's program: runs of one pattern and one set of slots."""
    kinds = product(spec.patterns, spec.sets)
    return [
        "__device__ __forceinline__ void sweep(const float* corner, const int* program, const float* weight,",
        "                                      float (&sum)[SUMS]) {",
        "  // The place of a window is read one window ahead; what follows the last of a run is the next run.",
        "  for (int place, run = *program++; run >= 0; run = place) {",
        "    int count = run >> 16;",
        "    place = *program++;",
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
    return [
        f"      case {kind}:",
        "        do {",
        "          const float* window = corner + place;",
        "          place = *program++;",
        *(f"          const Packed<float, {packing}> w{i} = load_packed<{packing}>(weight + {i * packing});"
          for i in range(words)),
        f"          weight += {len(slots) * entries};",
        *(f"          {{ const float v = window[{spec.region.offset(image, i, j)}]; "
          f"{' '.join(additions)} }}" for (image, i, j), additions in sorted(uses.items())),
        "        } while (--count);",
        "        break;",
    ]  # fmt: skip


def _accumulate(spec: GradientSpec) -> list[str]:
    """Return the function that adds a patch's products to the sums of a task.

    The window of the task's channel is held in registers, by names, for all kernels of the task.
    """
    taps = sorted({divmod(tap, spec.kernel_size) for pattern in spec.patterns for tap in pattern})
    rows, columns = spec.tile
    used = sorted({spec.reads(tap, row, column) for tap in taps for row in range(rows) for column in range(columns)})
    return [
        "__device__ __forceinline__ void accumulate(const int* task, const float* x, const float* dy,",
        "                                           float (&sum)[TASK_KERNELS * ENTRIES]) {",
        "  if (task[0] < 0) return;",
        "  x += task[0];",
        "  constexpr int X_STEP = LANE_IMAGES * IMAGE_PITCH, DY_STEP = LANE_IMAGES * DY_IMAGE_PITCH;",
        "  for (int image = 0; image < IMAGES; ++image, x += X_STEP, dy += DY_STEP) {",
        *(f"    const float x{r}_{c} = x[{spec.x.offset(0, r, c)}];" for r, c in used),
        *(line for kernel in range(spec.task_kernels) for line in _products(kernel, spec)),
        "  }",
        "}",
        "",
    ]


def _products(kernel: int, spec: GradientSpec) -> list[str]:
    """Return the products of one kernel of a task, whatever its pattern."""
    lines = [
        "    {",
        f"      const float* d = dy + task[{2 + 3 * kernel}];",
        f"      switch (task[{1 + 3 * kernel}]) {{",
    ]
    for number, pattern in enumerate(spec.patterns):
        lines.append(f"        case {number}:")
        for row, column in product(range(spec.tile[0]), range(0, spec.tile[1], spec.dy.vector)):
            additions = []
            for i, (entry, tap) in product(range(spec.dy.vector), enumerate(pattern)):
                r, c = spec.reads(divmod(tap, spec.kernel_size), row, column + i)
                additions.append(f"sum[{kernel * spec.entries + entry}] += v.items[{i}] * x{r}_{c};")
            load = f"load_packed<{spec.dy.vector}>(d + {spec.dy.offset(0, row, column)})"
            lines.append(f"          {{ const Packed<float, {spec.dy.vector}> v = {load}; {' '.join(additions)} }}")
        lines.append("          break;")
    return [*lines, "      }", "    }"]
