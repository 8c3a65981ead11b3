"""Writes the text of a CUDA unit: constants, the kernels of a .cuh file, and straight-line code for a pool's patterns.

`render` is pure: equal specifications give equal text. Taps are compile-time constants, so each input value is loaded
once for all the taps that use it, and taps that would read padding are left out where that is known. Patterns that are
one another moved have one code between them: see `Shapes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Literal

from clicktrain.kernels.cuda.region import LANES, Region

DIRECTORY = Path(__file__).parent
ELEMENTS = {"float32": "float", "float16": "half16", "bfloat16": "bfloat16"}

Pair = tuple[int, int]
Dtype = Literal["float32", "float16", "bfloat16"]


Reads = tuple[int | None, ...]
"""Words of a window, from its corner, that output pixels and entries need, in some order; None: padding."""


@dataclass(frozen=True)
class Shapes:
    """Patterns, as far as code can tell them apart: patterns that read the same words, moved, share a shape.

    The four squares of the official pool are one shape. So a warp seldom changes from one code to another, and all code
    stays in the instruction cache.

    Attributes
    ----------
    reads : tuple of tuple of (int or None)
        Of each shape, with 0 as the first word.
    of_pattern, moved : tuple of int
        Shape of each pattern, and by how many words it is moved.
    """

    reads: tuple[Reads, ...]
    of_pattern: tuple[int, ...]
    moved: tuple[int, ...]

    @classmethod
    def of(cls, patterns: tuple[tuple[int, ...], ...], reads: Callable[[tuple[int, ...]], Reads]) -> Shapes:
        """Return the shapes of patterns whose words `reads` gives."""
        shapes: dict[Reads, int] = {}
        of_pattern, moved = [], []
        for pattern in patterns:
            words = reads(pattern)
            first = min((word for word in words if word is not None), default=0)
            shape = tuple(None if word is None else word - first for word in words)
            of_pattern.append(shapes.setdefault(shape, len(shapes)))
            moved.append(first)
        return cls(tuple(shapes), tuple(of_pattern), tuple(moved))


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
    fused : bool
        Whether the sums are scaled, shifted, added to and cut off before they are written.
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
    fused: bool = False

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

    @property
    def shapes(self) -> Shapes:
        """The shapes of the patterns, entries slowest, for one image of a patch."""
        # How a block is filled does not matter to them: hundreds of candidates have them in common.
        return _shapes(replace(self, warps=1, slots=1, sets=(), channels=1, resident=1, vector=1, plane=0, fused=False))

    @property
    def pixels(self) -> list[Pair]:
        """Rows and columns of the output pixels of a patch, in one image."""
        return list(product(range(self.tile[0]), range(self.tile[1])))


@cache
def _shapes(spec: ConvolutionSpec) -> Shapes:
    def words(pattern: tuple[int, ...]) -> Reads:
        places = (spec.reads(tap, *pixel) for tap, pixel in product(pattern, spec.pixels))
        return tuple(None if place is None else spec.region.offset(0, *place) for place in places)

    return Shapes.of(spec.patterns, words)


@dataclass(frozen=True)
class GradientSpec:
    """All that the text of the gradient of the values depends on.

    Attributes
    ----------
    tasks : int
        Tasks of a warp.
    task_kernels : int
        Most kernels of a task: they have a filter in common.
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
    planes, grid : (int, int)
        Pixels of a channel of x and of dy, and regions along the rows and columns of an image, where the code is for
        this size only; 0: told at launch.
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
    grid: Pair = (0, 0)

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])

    @property
    def images(self) -> int:
        """Images of a patch."""
        return self.x.images

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the patterns, entries slowest."""
        stride = self.x.step[0] // self.tile[0], self.x.step[1] // self.tile[1]

        def words(pattern: tuple[int, ...]) -> Reads:
            taps = (divmod(tap, self.kernel_size) for tap in pattern)
            return tuple(
                self.x.offset(0, row * stride[0] + down, column * stride[1] + right)
                for (down, right), (row, column) in product(taps, self.pixels)
            )

        return Shapes.of(self.patterns, words)

    @property
    def pixels(self) -> list[Pair]:
        """Rows and columns of the output pixels of a patch, in one image."""
        return list(product(range(self.tile[0]), range(self.tile[1])))

    @property
    def task_words(self) -> int:
        """Integers that describe a task."""
        return 1 + 3 * self.task_kernels


def render(spec: ConvolutionSpec | GradientSpec) -> str:
    """Return the text of a unit without the platform: what must be the same on every device."""
    if isinstance(spec, ConvolutionSpec):
        parts = [_constants(_convolution_constants(spec), spec.dtype), *_sweep(spec), _source("convolution.cuh")]
    else:
        parts = [_constants(_gradient_constants(spec), spec.dtype), *_accumulate(spec)]
        parts += [_source("warp.cuh"), _source("gradient.cuh"), _source("finish.cuh")]
    return "\n".join(parts)


def unit(spec: ConvolutionSpec | GradientSpec) -> str:
    """Return what NVRTC compiles: the platform and `render(spec)`."""
    return _source("platform.cuh") + render(spec)


def plain_unit(constants: dict[str, int], parts: Sequence[str]) -> str:
    """Return a unit of float32 kernels that need no generated code: the platform, constants and .cuh files."""
    return "\n".join([_source("platform.cuh") + _constants(constants, "float32"), *map(_source, parts)])


@cache
def _source(name: str) -> str:
    return (DIRECTORY / name).read_text()


@cache
def sources() -> str:
    """Return a digest of everything that is written by hand."""
    names = ("platform.cuh", "convolution.cuh", "warp.cuh", "gradient.cuh", "window_gradient.cuh", "finish.cuh")
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
        "VECTOR": spec.vector, "PLANE": spec.plane, "FUSED": int(spec.fused), **spec.region.constants(),
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
        "DY_PLANE": spec.planes[1], "DY_VECTOR": spec.dy.vector, "REGIONS_ROWS": spec.grid[0],
        "REGIONS_COLUMNS": spec.grid[1], **spec.x.constants(),
        **{f"DY_{name}": value for name, value in spec.dy.constants().items() if name in _OF_DY},
    }  # fmt: skip


def _sweep(spec: ConvolutionSpec) -> list[str]:
    """Return the function that walks through a warp's program: runs of one shape and one set of slots."""
    kinds = [_kind(reads, slots, spec) for reads, slots in product(spec.shapes.reads, spec.sets)]
    return [
        "__device__ __forceinline__ void sweep(const float* corner, const int* program, const float* weight,",
        "                                      float (&sum)[SUMS]) {",
        "  // The place of a window is read one window ahead; what follows the last of a run is the next run.",
        "  for (int place, run = *program++; run >= 0; run = place) {",
        "    int count = run >> 16;",
        "    place = *program++;",
        *_switch("run & 0xffff", kinds),
        "  }",
        "}",
        "",
    ]


def _switch(kind: str, cases: Sequence[Sequence[str]]) -> list[str]:
    """Return code that does one of the cases; without a question where there is one."""
    if len(cases) == 1:
        return [*cases[0]]
    numbered = (line for number, case in enumerate(cases) for line in (f"case {number}:", *case, "break;"))
    return [f"switch ({kind}) {{", *numbered, "}"]


def _kind(reads: Reads, slots: tuple[int, ...], spec: ConvolutionSpec) -> list[str]:
    """Return the loop over the records of a run."""
    packing = next(width for width in (4, 2, 1) if spec.entries % width == 0)
    uses: dict[int, list[str]] = {}
    of_image, pixels = spec.region.offset(1, 0, 0), len(spec.pixels)
    for image, (number, slot), (entry, pixel) in product(
        range(spec.images), enumerate(slots), product(range(spec.entries), range(pixels))
    ):
        read = reads[entry * pixels + pixel]
        if read is None:
            continue
        target = (slot * spec.images + image) * pixels + pixel
        word, item = divmod(number * spec.entries + entry, packing)
        uses.setdefault(image * of_image + read, []).append(f"sum[{target}] += w{word}.items[{item}] * v;")
    words = len(slots) * spec.entries // packing
    return [
        "do {",
        "  const float* window = corner + place;",
        "  place = *program++;",
        *(f"  const Packed<float, {packing}> w{i} = load_packed<{packing}>(weight + {i * packing});"
          for i in range(words)),
        f"  weight += {len(slots) * spec.entries};",
        *(f"  {{ const float v = window[{read}]; {' '.join(additions)} }}" for read, additions in sorted(uses.items())),
        "} while (--count);",
    ]  # fmt: skip


def _accumulate(spec: GradientSpec) -> list[str]:
    """Return the function that adds a patch's products to the sums of a task.

    The patch of dy of the task's filter is held in registers, by names, for all kernels of the task.
    """
    vector = spec.dy.vector
    loads = ((row, column) for row, column in spec.pixels if column % vector == 0)
    return [
        "__device__ __forceinline__ void accumulate(const int* task, const float* x, const float* dy,",
        "                                           float (&sum)[TASK_KERNELS * ENTRIES]) {",
        "  if (task[0] < 0) return;",
        "  dy += task[0];",
        "  constexpr int X_STEP = LANE_IMAGES * IMAGE_PITCH, DY_STEP = LANE_IMAGES * DY_IMAGE_PITCH;",
        "  for (int image = 0; image < IMAGES; ++image, x += X_STEP, dy += DY_STEP) {",
        *(f"    const Packed<float, {vector}> d{row}_{column} = "
          f"load_packed<{vector}>(dy + {spec.dy.offset(0, row, column)});" for row, column in loads),
        *(line for kernel in range(spec.task_kernels) for line in _products(kernel, spec)),
        "  }",
        "}",
        "",
    ]  # fmt: skip


def _products(kernel: int, spec: GradientSpec) -> list[str]:
    """Return the products of one kernel of a task; a task's kernels come first, so that none follows a missing one."""
    return [
        f"if (task[{1 + 3 * kernel}] < 0) continue;",
        "{",
        f"const float* window = x + task[{2 + 3 * kernel}];",
        *_switch(f"task[{1 + 3 * kernel}]", [_shape(kernel, reads, spec) for reads in spec.shapes.reads]),
        "}",
    ]


def _shape(kernel: int, reads: Reads, spec: GradientSpec) -> list[str]:
    uses: dict[int, list[str]] = {}
    for read, (entry, (row, column)) in zip(reads, product(range(spec.entries), spec.pixels), strict=True):
        assert read is not None  # no padding is left out
        item = column % spec.dy.vector
        addition = f"sum[{kernel * spec.entries + entry}] += d{row}_{column - item}.items[{item}] * v;"
        uses.setdefault(read, []).append(addition)
    return [f"{{ const float v = window[{read}]; {' '.join(additions)} }}" for read, additions in sorted(uses.items())]
