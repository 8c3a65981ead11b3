"""What all generated C++ shares: its instruction sets and registers, and of sweeps the specification and the words.

Specialised sweeps are straight-line C++ for one pool of patterns and one tile: `filter_sweeps` and `channel_sweeps`
write them, `sweeps` makes libraries of them. A record of a specialised sweep is a kernel and has the weights of its
pattern. Kernels are sorted by pattern and `runs` counts them, so that every weight is broadcast once, and addresses are
constants relative to the channel or the filter. Taps that would read padding are left out.

"filter_pairs" and "channel_pairs" are sweeps on registers of two neighbouring output pixels (512 bits): half the
instructions. Their windows hold a pair for every column, as taps need them, with a stride from two places; padding
beside a pixel is zero. Registers of "filter_blocks" hold a pixel of two blocks instead, whose windows are woven: every
load is a whole cache line and serves all taps of a pixel, where half of the pairs lie across two lines.

The taps of an output pixel are added in the order of the pattern, as in the generic sweep: going by filters gives the
same bits as that, and going by channels the same as both with one channel to a block.

Compiled on first use rather than precompiled for all patterns, because it costs next to nothing: the text names
every sum as a scalar and includes no standard header, so g++ needs 0.1 s for four patterns and one tile (C++
templates for the same code took 20 s and left the sums in memory). All 126 patterns for the tiles and image edges
that occur would be minutes of compiling at installation and megabytes of code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

LANES = 8
TARGETS = {
    "avx512": (512, "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"),
    "avx2": (256, "avx2,fma"),
    "portable": (128, None),
}
"""Instruction set -> bits of a register, and what the compiler calls the set."""
Sweep = Literal["filters", "filter_pairs", "filter_blocks", "channels", "channel_pairs"]
Weights = Literal["packed", "values", "reversed"]
"""Where a sweep reads the weights of its records: one after the other as they were gathered, or from the canonical
values where `Pass.gather` says, each kernel from first to last or from last to first."""
MOST_WEIGHTS = 9
"""That are in registers together."""
MAX_PATTERNS = 16
"""Larger pools have no code of their own."""
FLAGS = ("-std=c++17", "-O2", "-fno-tree-vectorize", "-fPIC", "-Wno-psabi")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Register:
    """What lanes.h offers for a register of one or two blocks, and one or two neighbouring pixels, of all lanes."""

    name: str
    load: str
    load_first: str
    broadcast: str
    folded: str
    pixels: Literal[1, 2] = 1
    blocks: Literal[1, 2] = 1


PIXEL = Register("Vec", "load", "load", "broadcast", "{}")
PIXEL_PAIR = Register("Pair", "load_pair", "load_first", "broadcast_pair", "fold({})", pixels=2)
BLOCK_PAIR = Register("Pair", "load_pair", "load_first", "broadcast_pair", "fold({})", blocks=2)
REGISTERS: dict[Sweep, Register] = {
    "filters": PIXEL, "filter_pairs": PIXEL_PAIR, "filter_blocks": BLOCK_PAIR,
    "channels": PIXEL, "channel_pairs": PIXEL_PAIR,
}  # fmt: skip


@dataclass(frozen=True)
class TileShape:
    """The output pixels of a tile, and which rows and columns of its window exist (are not padding)."""

    blocks: int
    rows: int
    columns: int
    window_rows: Pair
    window_columns: Pair


@dataclass(frozen=True)
class SweepSpec:
    """A pool of patterns and the geometry of a pass, as far as the code depends on them.

    Output pixel r and tap k of an axis meet in window pixel (r * stride + k + origin) / spread, if that is whole.
    Of sweeps by channel, `window_rows` and `window_pitch` are the rows of a channel and the pixels of a row of the
    input itself. With more than one chain, the taps of a pixel take turns at so many sums, which are added in the end:
    a small tile then does not wait for each multiply-add, but the order of its sums is another.
    """

    sweep: Sweep
    instruction_set: str
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    group: int
    stride: Pair
    spread: Pair
    origin: Pair
    window_rows: int
    window_pitch: int
    tile: tuple[int, int, int]
    chains: int = 1
    weights: Weights = "packed"

    @property
    def register(self) -> Register:
        """What sums are kept in."""
        return REGISTERS[self.sweep]

    @property
    def pixels(self) -> int:
        """In a register."""
        return self.register.pixels

    def groups(self) -> list[tuple[tuple[int, ...], ...]]:
        """Return the patterns of each sweep."""
        return [self.patterns[i : i + self.group] for i in range(0, len(self.patterns), self.group)]

    def reads(self, tap: int, row: int, column: int, shape: TileShape) -> Pair | None:
        """Return the window pixel that a tap needs for an output pixel, or None if there is none."""
        place = []
        exists = (shape.window_rows, shape.window_columns)
        for axis, (pixel, k) in enumerate(zip((row, column), divmod(tap, self.kernel_size), strict=True)):
            window, remainder = divmod(pixel * self.stride[axis] + k + self.origin[axis], self.spread[axis])
            if remainder or not exists[axis][0] <= window < exists[axis][1]:
                return None
            place.append(window)
        return (place[0], place[1])


def is_sweep(name: str) -> TypeGuard[Sweep]:
    """Tell whether a compute kernel is written here, rather than one for all patterns."""
    return name in get_args(Sweep)


def goes_by_channel(sweep: str) -> bool:
    """Tell whether a sweep goes through the kernels channel by channel."""
    return sweep.startswith("channel")


def header(instruction_set: str) -> list[str]:
    """Return the first lines of a translation unit for an instruction set."""
    bits, target = TARGETS[instruction_set]
    return [
        f"#define CLICKTRAIN_ISA {instruction_set}",
        f"#define CLICKTRAIN_VECTOR_BITS {bits}",
        '#include "abi.h"',
        *([f'#pragma GCC target("{target}")'] if target else []),
        '#include "lanes.h"',
        f"using namespace {instruction_set};",
    ]


def taps_of(pattern: tuple[int, ...], place: Pair, spec: SweepSpec, shape: TileShape) -> list[tuple[int, Pair]]:
    """Return the entries that the output pixels from `place` on use, each with the first window pixel it needs."""
    row, column = place
    taps = []
    for entry, tap in enumerate(pattern):
        for i in range(min(spec.pixels, shape.columns - column)):
            pixel = spec.reads(tap, row, column + i, shape)
            if pixel is not None:
                taps.append((entry, (pixel[0], pixel[1] - i * spec.stride[1])))
                break
    return taps


def load_of(block: int, pixel: Pair, spec: SweepSpec, shape: TileShape) -> str:
    """Return the expression that loads what exists of one or two window pixels; padding beside a pixel is zero."""
    (low, high), step = shape.window_columns, spec.stride[1]
    row, column = pixel

    def place(column: int) -> str:
        return f"channel + {window_offset((block, row, column), spec)}"

    if spec.pixels == 2 and column < low:
        return f"load_second({place(column + step - 1)})"
    if spec.pixels == 2 and column + step >= high:
        return f"load_first({place(column)})"
    if spec.pixels == 2 and step > 1:
        return f"load_two({place(column)}, {place(column + step)})"
    return f"{spec.register.load}({place(column)})"


def window_offset(place: tuple[int, int, int], spec: SweepSpec) -> int:
    """Return the floats from the window pixel of the first output pixel to another one of its channel."""
    block, row, column = place
    return ((block * spec.window_rows + row) * spec.window_pitch + column) * LANES * spec.register.blocks


def sum_name(block: int, row: int, column: int) -> str:
    """Return the variable with the sum of an output pixel, or of it and the next."""
    return f"s{block}_{row}_{column}"
