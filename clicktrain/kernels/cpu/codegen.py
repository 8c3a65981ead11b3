"""Writes the specialised sweeps: straight-line C++ for one pool of patterns and one tile.

A record of a specialised sweep is a kernel and has the weights of its pattern. Kernels are sorted by pattern and
`runs` counts them, so that a pattern is straight-line code: every weight is broadcast once, and addresses are
constants relative to the channel or the filter. Taps that would read padding are left out. There are two kinds:

- "filters" goes through the kernels of one filter after the other and keeps the sums of a tile in registers. Every
  input pixel is loaded once for all taps that use it: four weights on a tile of 2 x 4 pixels are 32 multiply-adds
  for 15 loads, where the generic sweep (taps.h) needs 32. A record's offset is its channel's place in the window.
  More weights than registers hold (dense 5 x 5 and 7 x 7) are loaded when their turn comes, while a row of the window
  is in registers.
- "channels" goes through the kernels of one channel after the other. The sums of all filters stay in the first-level
  cache: 8 loads and 8 stores for 32 multiply-adds on 2 x 4 pixels, from one small place instead of a window of all
  channels that only the second-level cache holds. The 24 pixels of the window stay in the registers of AVX-512; those
  of AVX2 hold what one pattern reads of it (10 pixels for 1 x 4), or let it pass by as sweeps by filter do. The window
  is read once, so that there is no need to copy it: the sweep reads the input itself, and fetches ahead what the tile
  below will read, or the next block. A record's offset is its filter's place in the sums.

"filter_pairs" and "channel_pairs" are the same on registers of two neighbouring output pixels (512 bits): half the
instructions. Their windows hold a pair for every column, as taps need them, with a stride from two places; padding
beside a pixel is zero.

The taps of an output pixel are added in the order of the pattern, as in the generic sweep: going by filters gives the
same bits as that, and going by channels the same as both with one channel to a block.

Compiled on first use rather than precompiled for all patterns, because it costs next to nothing: the text names
every sum as a scalar and includes no standard header, so g++ needs 0.1 s for four patterns and one tile (C++
templates for the same code took 20 s and left the sums in memory). All 126 patterns for the tiles and image edges
that occur would be minutes of compiling at installation and megabytes of code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, groupby, product
from math import prod
from typing import Literal

from clicktrain.kernels.build import Library

LANES = 8
TARGETS = {
    "avx512": (512, "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"),
    "avx2": (256, "avx2,fma"),
    "portable": (128, None),
}
"""Instruction set -> bits of a register, and what the compiler calls the set."""
Sweep = Literal["filters", "filter_pairs", "channels", "channel_pairs"]
SUMS_AT_ONCE = 8
"""Sums that a sweep by channel loads before it stores them."""
HELD_PIXELS = {"avx512": 28, "avx2": 12, "portable": 0}
"""Of a window that sweeps by channel hold in registers, beside weights and sums."""
MOST_WEIGHTS = 9
"""That are in registers together."""
MAX_PATTERNS = 16
"""Larger pools have no code of their own."""
PIXELS_PER_LINE = 2
"""Of a cache."""
FLAGS = ("-std=c++17", "-O2", "-fno-tree-vectorize", "-fPIC", "-Wno-psabi")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Register:
    """What lanes.h offers for one or two neighbouring pixels of all lanes."""

    name: str
    load: str
    load_first: str
    broadcast: str
    folded: str


REGISTERS = {
    1: Register("Vec", "load", "load", "broadcast", "{}"),
    2: Register("Pair", "load_pair", "load_first", "broadcast_pair", "fold({})"),
}
"""By pixels."""


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

    @property
    def pixels(self) -> int:
        """In a register."""
        return pixels_of(self.sweep)

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


def pixels_of(sweep: str) -> Literal[1, 2]:
    """Return the neighbouring output pixels in a register."""
    return 2 if sweep.endswith("pairs") else 1


def goes_by_channel(sweep: str) -> bool:
    """Tell whether a sweep goes through the kernels channel by channel."""
    return sweep.startswith("channel")


def library(spec: SweepSpec, shapes: tuple[TileShape, ...]) -> Library:
    """Return the library with `clicktrain_sweep_<i>`, numbered by group of patterns and shape."""
    return Library("sweep", (("sweep.cpp", render(spec, shapes)),), FLAGS)


def render(spec: SweepSpec, shapes: tuple[TileShape, ...]) -> str:
    """Return the translation unit with the sweeps of all shapes."""
    lines = header(spec.instruction_set)
    write = _channels if goes_by_channel(spec.sweep) else _filters
    for number, (patterns, shape) in enumerate(product(spec.groups(), shapes)):
        lines += ["", *write(f"clicktrain_sweep_{number}", patterns, spec, shape)]
    return "\n".join(lines) + "\n"


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


def _filters(name: str, patterns: tuple[tuple[int, ...], ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    entries, register = len(patterns[0]), REGISTERS[spec.pixels]
    pixels = list(product(range(shape.blocks), range(shape.rows), range(0, shape.columns, spec.pixels)))
    places = [(_sum(b, r, c), f"{b} * s->$_block + {r} * s->$_row + {c} * s->$_pixel") for b, r, c in pixels]
    half = {_sum(b, r, c) for b, r, c in pixels if c + spec.pixels > shape.columns}
    load = {name: register.load_first if name in half else register.load for name, _ in places}
    value = {name: f"first({name})" if name in half else name for name, _ in places}
    return [
        f'extern "C" void {name}(const Sweep* s) {{',
        "  const float* const window = s->window;",
        "  const int64_t record = s->starts[s->begin];",
        "  const int32_t* offset = s->offsets + record;",
        f"  const float* weight = s->weights + record * {entries};",
        "  const uint16_t* run = s->runs;",
        f"  for (int f = s->begin; f < s->end; ++f, run += {spec.group}) {{",
        "    const int64_t filter = s->order[f];",
        f"    const {register.name} start = {register.broadcast}(s->bias ? s->bias[filter] : 0.0f);",
        f"    {register.name} {', '.join(f'{name} = start' for name, _ in places)};",
        *(f"    {register.name} {name}_{chain} = {{}};" for name, _ in places for chain in range(1, spec.chains)),
        "    if (const float* in = s->sums_in) {",
        "      in += filter * s->in_filter;",
        *(f"      {name} = {load[name]}(in + {place.replace('$', 'in')});" for name, place in places),
        "    }",
        *(line for number, pattern in enumerate(patterns) for line in _run(number, pattern, spec, shape)),
        *(f"    {name} += {name}_{chain};" for name, _ in places for chain in range(1, spec.chains)),
        "    if (const float* residual = s->residual) {",
        "      residual += filter * s->out_filter;",
        *(f"      {name} += {load[name]}(residual + {place.replace('$', 'out')});" for name, place in places),
        "    }",
        f"    if (s->relu) {{ {' '.join(f'{name} = relu({name});' for name, _ in places)} }}",
        "    float* out = s->sums_out + filter * s->out_filter;",
        "    if (s->streaming) {",
        *(f"      stream(out + {place.replace('$', 'out')}, {value[name]});" for name, place in places),
        "    } else {",
        *(f"      store(out + {place.replace('$', 'out')}, {value[name]});" for name, place in places),
        "    }",
        "  }",
        "}",
    ]


def _run(number: int, pattern: tuple[int, ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the loop over the kernels of one pattern."""
    entries, register = len(pattern), REGISTERS[spec.pixels]
    uses: dict[tuple[int, Pair], list[tuple[int, str]]] = {}
    for block, row, column in product(range(shape.blocks), range(shape.rows), range(0, shape.columns, spec.pixels)):
        for entry, pixel in _taps(pattern, (row, column), spec, shape):
            chain = f"_{entry % spec.chains}" if entry % spec.chains else ""
            uses.setdefault((block, pixel), []).append((entry, _sum(block, row, column) + chain))
    few = entries <= MOST_WEIGHTS
    weights = [f"const {register.name} w{entry} = {register.broadcast}(weight[{entry}]);" for entry in range(entries)]
    lines = [
        f"    for (int n = run[{number}]; n; --n, ++offset, weight += {entries}) {{",
        "      const float* channel = window + *offset;",
        *(f"      {weight}" for weight in weights if few),
    ]
    for _, group in groupby(sorted(uses), key=lambda place: (place[0], place[1][0])):
        row_of = list(group)
        loads = [f"{register.name} x = {_load(block, pixel, spec, shape)};" for block, pixel in row_of]
        if few:
            for place, load in zip(row_of, loads, strict=True):
                pin = " pin(x);" if len(uses[place]) > 1 else ""
                additions = " ".join(f"{total} += w{entry} * x;" for entry, total in sorted(uses[place]))
                lines.append(f"      {{ {load}{pin} {additions} }}")
            continue
        lines.append("      {")
        lines += [f"        {load.replace(' x ', f' x{i} ')} pin(x{i});" for i, load in enumerate(loads)]
        by_entry = sorted((entry, total, i) for i, place in enumerate(row_of) for entry, total in uses[place])
        for entry, of_entry in groupby(by_entry, key=lambda use: use[0]):
            sums = " ".join(f"{total} += w{entry} * x{i};" for _, total, i in of_entry)
            lines.append(f"        {{ {weights[entry]} {sums} }}")
        lines.append("      }")
    return [*lines, "    }"]


def _channels(name: str, patterns: tuple[tuple[int, ...], ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    entries, register, of_filter = len(patterns[0]), REGISTERS[spec.pixels], prod(spec.tile) * LANES
    taps = [{place: _taps(pattern, place, spec, shape) for place in _registers(spec, shape)} for pattern in patterns]
    windows = [sorted({pixel for pixels in used.values() for _, pixel in pixels}) for used in taps]
    whole = sorted({*chain(*windows)})
    lines = [
        f'extern "C" void {name}(const Sweep* s) {{',
        "  const float* channel = s->window;",
        "  const int64_t record = s->starts[s->begin];",
        "  const int32_t* offset = s->offsets + record;",
        f"  const float* weight = s->weights + record * {entries};",
        "  const uint16_t* run = s->runs;",
        "  float* const all_sums = s->sums_out;",
        f"  const int64_t next_block = int64_t(s->channels) * {_channel_floats(spec)};",
        "  if (!s->sums_in)",
        "    for (int f = s->begin; f < s->end; ++f) {",
        f"      float* sums = all_sums + int64_t(f) * {of_filter};",
        f"      const {register.name} start = {register.broadcast}(s->bias ? s->bias[f] : 0.0f);",
        *(f"      store(sums + {_sum_offset(place, spec)}, start);" for place in _registers(spec, shape)),
        "    }",
        f"  for (int c = 0; c < s->channels; ++c, channel += {_channel_floats(spec)}, run += {len(patterns)}) {{",
        *(f"    __builtin_prefetch(channel + {place}, 0, 2);" for place in _ahead(spec, shape)),
    ]
    holds = HELD_PIXELS[spec.instruction_set]
    if len(whole) <= holds:
        lines += _held(whole, spec, shape)
    for number, (used, window) in enumerate(zip(taps, windows, strict=True)):
        lines += [
            "    {",
            *(_held(window, spec, shape) if len(window) <= holds < len(whole) else []),
            f"    for (int n = run[{number}]; n; --n, ++offset, weight += {entries}) {{",
            "      float* const sums = all_sums + *offset;",
            *(_add_held(used, spec) if len(window) <= holds else _add_passing(used, spec, shape)),
            "    }",
            "    }",
        ]
    return [*lines, "  }", *_finish(spec, shape), "}"]


Uses = dict[Pair, list[tuple[int, Pair]]]
"""For each register of sums the entries of a pattern that it takes, and the window pixel of each."""


def _registers(spec: SweepSpec, shape: TileShape) -> list[Pair]:
    """Return the first output pixel of each register of a tile."""
    return list(product(range(shape.rows), range(0, shape.columns, spec.pixels)))


def _held(window: Iterable[Pair], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that load window pixels for as long as the block lasts."""
    name = REGISTERS[spec.pixels].name
    return [f"    {name} {_pixel(p)} = {_load(0, p, spec, shape)}; pin({_pixel(p)});" for p in window]


def _add_held(used: Uses, spec: SweepSpec) -> list[str]:
    """Return the lines that add a kernel to its sums, a few of these at a time, from window pixels in registers."""
    register, lines = REGISTERS[spec.pixels], []
    places, known = [place for place, taps in used.items() if taps], set()
    for first in range(0, len(places), SUMS_AT_ONCE):
        sums = {place: _sum(0, *place) for place in places[first : first + SUMS_AT_ONCE]}
        at = {place: f"sums + {_sum_offset(place, spec)}" for place in sums}
        lines += [f"      {register.name} {total} = {register.load}({at[place]});" for place, total in sums.items()]
        additions = sorted((entry, place, pixel) for place in sums for entry, pixel in used[place])
        for entry, place, pixel in additions:
            if entry not in known:  # as late as possible: AVX2 has just one register left for it
                lines.append(f"      const {register.name} w{entry} = {register.broadcast}(weight[{entry}]);")
                known.add(entry)
            lines.append(f"      {sums[place]} += w{entry} * {_pixel(pixel)};")
        lines += [f"      store({at[place]}, {total});" for place, total in sums.items()]
    return lines


def _add_passing(used: Uses, spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that add a kernel to its sums, all of them in registers while window pixels pass by."""
    register = REGISTERS[spec.pixels]
    sums = [(_sum(0, *place), _sum_offset(place, spec)) for place, taps in used.items() if taps]
    entries = sorted({entry for taps in used.values() for entry, _ in taps})
    uses: dict[Pair, list[tuple[int, str]]] = {}
    for place, taps in used.items():
        for entry, pixel in taps:
            uses.setdefault(pixel, []).append((entry, _sum(0, *place)))
    lines = [
        *(f"      {register.name} {total} = {register.load}(sums + {offset});" for total, offset in sums),
        *(f"      const {register.name} w{entry} = {register.broadcast}(weight[{entry}]);" for entry in entries),
    ]
    for pixel in sorted(uses):
        pin = " pin(x);" if len(uses[pixel]) > 1 else ""
        # The sum of which this is the first tap comes last: its multiply-add may overwrite x and load the sum.
        additions = " ".join(f"{total} += w{entry} * x;" for entry, total in sorted(uses[pixel], reverse=True))
        lines.append(f"      {{ {register.name} x = {_load(0, pixel, spec, shape)};{pin} {additions} }}")
    return [*lines, *(f"      store(sums + {offset}, {total});" for total, offset in sums)]


def _finish(spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that write the outputs, or the largest of each 2 x 2, once all channels are done."""
    of_filter = prod(spec.tile) * LANES
    loop = f"for (; sums != end; sums += {of_filter}, out += s->out_filter)"
    return [
        "  if (float* out = s->output) {",
        f"    const float* sums = all_sums + int64_t(s->begin) * {of_filter};",
        f"    const float* const end = all_sums + int64_t(s->end) * {of_filter};",
        *(_finish_pooled(loop, spec, shape) if shape.rows % 2 == shape.columns % 2 == 0 else []),
        *_finish_whole(loop, spec, shape),
        "  }",
    ]


def _finish_pooled(loop: str, spec: SweepSpec, shape: TileShape) -> list[str]:
    lines = ["    if (s->max_pool) {", f"      {loop} {{"]
    for r, c in product(range(0, shape.rows, 2), range(0, shape.columns, 2)):
        corners = [f"load(sums + {_sum_offset(corner, spec)})" for corner in product((r, r + 1), (c, c + 1))]
        largest = "larger(larger({}, {}), larger({}, {}))".format(*corners)
        place = f"out + {r // 2} * s->out_row + {c // 2 * LANES}"
        lines.append(f"        {{ const Vec v = {largest}; store({place}, s->relu ? relu(v) : v); }}")
    return [*lines, "      }", "      return;", "    }"]


def _finish_whole(loop: str, spec: SweepSpec, shape: TileShape) -> list[str]:
    register = REGISTERS[spec.pixels]
    half = {place for place in _registers(spec, shape) if place[1] + spec.pixels > shape.columns}
    places = {(r, c): f"{r} * s->out_row + {c * LANES}" for r, c in _registers(spec, shape)}
    load = {place: register.load_first if place in half else register.load for place in places}
    value = {place: f"first({_sum(0, *place)})" if place in half else _sum(0, *place) for place in places}
    return [
        "    const float* residual = s->residual;",
        f"    {loop} {{",
        *(f"      {register.name} {_sum(0, *p)} = {register.load}(sums + {_sum_offset(p, spec)});" for p in places),
        "      if (residual) {",
        *(f"        {_sum(0, *p)} += {load[p]}(residual + {place});" for p, place in places.items()),
        "        residual += s->out_filter;",
        "      }",
        f"      if (s->relu) {{ {' '.join(f'{_sum(0, *p)} = relu({_sum(0, *p)});' for p in places)} }}",
        "      if (s->streaming) {",
        *(f"        stream(out + {place}, {value[p]});" for p, place in places.items()),
        "      } else {",
        *(f"        store(out + {place}, {value[p]});" for p, place in places.items()),
        "      }",
        "    }",
    ]


def _taps(pattern: tuple[int, ...], place: Pair, spec: SweepSpec, shape: TileShape) -> list[tuple[int, Pair]]:
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


def _load(block: int, pixel: Pair, spec: SweepSpec, shape: TileShape) -> str:
    """Return the expression that loads what exists of one or two window pixels; padding beside a pixel is zero."""
    (low, high), step = shape.window_columns, spec.stride[1]
    row, column = pixel

    def place(column: int) -> str:
        return f"channel + {_window_offset((block, row, column), spec)}"

    if spec.pixels == 2 and column < low:
        return f"load_second({place(column + step - 1)})"
    if spec.pixels == 2 and column + step >= high:
        return f"load_first({place(column)})"
    if spec.pixels == 2 and step > 1:
        return f"load_two({place(column)}, {place(column + step)})"
    return f"{REGISTERS[spec.pixels].load}({place(column)})"


def _ahead(spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return what is to be brought to the second-level cache: what a later tile will read and this one does not.

    That is the tile below or, from the last tiles of an image, the first ones of the next block.
    """
    rows, end = spec.tile[1] * spec.stride[0], shape.window_rows[1]
    last = end < (shape.rows - 1) * spec.stride[0] + spec.kernel_size + spec.origin[0]
    # The input ends where the window does, so that the window starts so many rows below its top:
    first, above, next_block = (end - spec.window_rows, 1, "next_block + ") if last else (end, 0, "")
    columns = range(shape.window_columns[0], shape.window_columns[1] + 1, PIXELS_PER_LINE)
    places = product(range(first, first + rows + above), columns)
    return [f"{next_block}{_window_offset((0, row, column), spec)}" for row, column in places]


def _channel_floats(spec: SweepSpec) -> int:
    return spec.window_rows * spec.window_pitch * LANES


def _window_offset(place: tuple[int, int, int], spec: SweepSpec) -> int:
    block, row, column = place
    return ((block * spec.window_rows + row) * spec.window_pitch + column) * LANES


def _sum_offset(place: Pair, spec: SweepSpec) -> int:
    """Return the floats from the sums of a filter to those of an output pixel."""
    return (place[0] * spec.tile[2] + place[1]) * LANES


def _pixel(place: Pair) -> str:
    return f"x{place[0]}_{place[1]}".replace("-", "m")


def _sum(block: int, row: int, column: int) -> str:
    return f"s{block}_{row}_{column}"
