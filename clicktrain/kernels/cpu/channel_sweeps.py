"""Writes sweeps that go through the kernels of one channel after the other, while the sums stay in the nearest cache.

8 loads and 8 stores for 32 multiply-adds on 2 x 4 pixels, from one small place instead of a window of all channels that
only the second-level cache holds. The 24 pixels of the window stay in the registers of AVX-512; those of AVX2 hold what
one pattern reads of it (10 pixels for 1 x 4), or let it pass by as sweeps by filter do. The window is read once, so
that there is no need to copy it: the sweep reads the input itself, and fetches the windows of the next channels ahead.
A record's offset is its filter's place in the sums. Where few tiles use a weight, to gather all of them first takes
longer than to read each one where it is in the canonical values.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, product
from math import prod

from clicktrain.kernels.cpu.codegen import (
    LANES,
    Pair,
    SweepSpec,
    TileShape,
    load_of,
    sum_name,
    taps_of,
    window_offset,
)

RECORDS_AHEAD = 16
"""Whose weights are fetched where sweeps read the canonical values: there, those of a run lie on different lines. 8 and
32 were no better; without, 512 filters were up to 1.06x slower, and up to 1.1x where a step of an optimizer had just
driven the values out of the caches. `gather` has so many entries more than there are records."""
SUMS_AT_ONCE = 8
"""Sums that are loaded before they are stored."""
HELD_PIXELS = {"avx512": 28, "avx2": 12, "portable": 0}
"""Of a window that are held in registers, beside weights and sums."""
PIXELS_PER_LINE = 2
"""Of a cache."""
CHANNELS_AHEAD = 2
"""Whose windows are fetched. What a tile reads much later is not worth fetching: where the planes of channels are a
power of two apart, their lines share so few sets of a cache that they push each other out before. 1.02 to 1.17x under
AVX2; with AVX-512 on a family 25, model 17 EPYC 1.0 to 1.3x on 28 x 28 pixels and more, no difference below."""


def write(name: str, patterns: tuple[tuple[int, ...], ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the function for a group of patterns and a tile."""
    entries, register, of_filter = len(patterns[0]), spec.register, prod(spec.tile) * LANES
    taps = [{place: taps_of(pattern, place, spec, shape) for place in _registers(spec, shape)} for pattern in patterns]
    windows = [sorted({pixel for pixels in used.values() for _, pixel in pixels}) for used in taps]
    whole = sorted({*chain(*windows)})
    lines = [
        f'extern "C" void {name}(const Sweep* s) {{',
        "  const float* channel = s->window;",
        "  const int64_t record = s->starts[s->begin];",
        "  const int32_t* offset = s->offsets + record;",
        *_first_weights(entries, spec),
        "  const uint16_t* run = s->runs;",
        "  float* const all_sums = s->sums_out;",
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
            f"    for (int n = run[{number}]; n; --n, ++offset, {_next_weights(entries, spec)}) {{",
            *_find_weights(spec),
            "      float* const sums = all_sums + *offset;",
            *(_add_held(used, entries, spec) if len(window) <= holds else _add_passing(used, entries, spec, shape)),
            "    }",
            "    }",
        ]
    return [*lines, "  }", *_finish(spec, shape), "}"]


Uses = dict[Pair, list[tuple[int, Pair]]]
"""For each register of sums the entries of a pattern that it takes, and the window pixel of each."""


def _registers(spec: SweepSpec, shape: TileShape) -> list[Pair]:
    """Return the first output pixel of each register of a tile."""
    return list(product(range(shape.rows), range(0, shape.columns, spec.pixels)))


def _first_weights(entries: int, spec: SweepSpec) -> list[str]:
    """Return the lines that find the weights of the first record, or where they are in the values."""
    if spec.weights == "packed":
        return [f"  const float* weight = s->weights + record * {entries};"]
    return ["  const float* const values = s->weights;", "  const int32_t* place = s->gather + record;"]


def _next_weights(entries: int, spec: SweepSpec) -> str:
    """Return the expression that goes on to the next record."""
    return f"weight += {entries}" if spec.weights == "packed" else "++place"


def _find_weights(spec: SweepSpec) -> list[str]:
    """Return the lines that find the weights of a record, unless they follow those of the one before."""
    if spec.weights == "packed":
        return []
    return [
        f"      __builtin_prefetch(values + place[{RECORDS_AHEAD}]);",
        "      const float* const weight = values + *place;",
    ]


def _weight(entry: int, entries: int, spec: SweepSpec) -> str:
    """Return the line that broadcasts an entry of a record of so many."""
    place = entries - 1 - entry if spec.weights == "reversed" else entry
    return f"      const {spec.register.name} w{entry} = {spec.register.broadcast}(weight[{place}]);"


def _held(window: Iterable[Pair], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that load window pixels for as long as the block lasts."""
    name = spec.register.name
    return [f"    {name} {_pixel(p)} = {load_of(0, p, spec, shape)}; pin({_pixel(p)});" for p in window]


def _add_held(used: Uses, entries: int, spec: SweepSpec) -> list[str]:
    """Return the lines that add a kernel to its sums, a few of these at a time, from window pixels in registers."""
    register, lines = spec.register, []
    places, known = [place for place, taps in used.items() if taps], set()
    for first in range(0, len(places), SUMS_AT_ONCE):
        sums = {place: sum_name(0, *place) for place in places[first : first + SUMS_AT_ONCE]}
        at = {place: f"sums + {_sum_offset(place, spec)}" for place in sums}
        lines += [f"      {register.name} {total} = {register.load}({at[place]});" for place, total in sums.items()]
        additions = sorted((entry, place, pixel) for place in sums for entry, pixel in used[place])
        for entry, place, pixel in additions:
            if entry not in known:  # as late as possible: AVX2 has just one register left for it
                lines.append(_weight(entry, entries, spec))
                known.add(entry)
            lines.append(f"      {sums[place]} += w{entry} * {_pixel(pixel)};")
        lines += [f"      store({at[place]}, {total});" for place, total in sums.items()]
    return lines


def _add_passing(used: Uses, entries: int, spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that add a kernel to its sums, all of them in registers while window pixels pass by."""
    register = spec.register
    sums = [(sum_name(0, *place), _sum_offset(place, spec)) for place, taps in used.items() if taps]
    read = sorted({entry for taps in used.values() for entry, _ in taps})
    uses: dict[Pair, list[tuple[int, str]]] = {}
    for place, taps in used.items():
        for entry, pixel in taps:
            uses.setdefault(pixel, []).append((entry, sum_name(0, *place)))
    lines = [
        *(f"      {register.name} {total} = {register.load}(sums + {offset});" for total, offset in sums),
        *(_weight(entry, entries, spec) for entry in read),
    ]
    for pixel in sorted(uses):
        pin = " pin(x);" if len(uses[pixel]) > 1 else ""
        # The sum of which this is the first tap comes last: its multiply-add may overwrite x and load the sum.
        additions = " ".join(f"{total} += w{entry} * x;" for entry, total in sorted(uses[pixel], reverse=True))
        lines.append(f"      {{ {register.name} x = {load_of(0, pixel, spec, shape)};{pin} {additions} }}")
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
    register = spec.register
    half = {place for place in _registers(spec, shape) if place[1] + spec.pixels > shape.columns}
    places = {(r, c): f"{r} * s->out_row + {c * LANES}" for r, c in _registers(spec, shape)}
    load = {place: register.load_first if place in half else register.load for place in places}
    value = {place: f"first({sum_name(0, *place)})" if place in half else sum_name(0, *place) for place in places}
    return [
        "    const float* residual = s->residual;",
        f"    {loop} {{",
        *(f"      {register.name} {sum_name(0, *p)} = {register.load}(sums + {_sum_offset(p, spec)});" for p in places),
        "      if (residual) {",
        *(f"        {sum_name(0, *p)} += {load[p]}(residual + {place});" for p, place in places.items()),
        "        residual += s->out_filter;",
        "      }",
        f"      if (s->relu) {{ {' '.join(f'{sum_name(0, *p)} = relu({sum_name(0, *p)});' for p in places)} }}",
        "      if (s->streaming) {",
        *(f"        stream(out + {place}, {value[p]});" for p, place in places.items()),
        "      } else {",
        *(f"        store(out + {place}, {value[p]});" for p, place in places.items()),
        "      }",
        "    }",
    ]


def _ahead(spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return what is to be brought to the second-level cache: the same window, `CHANNELS_AHEAD` channels further."""
    columns = range(shape.window_columns[0], shape.window_columns[1] + 1, PIXELS_PER_LINE)
    places = product(range(*shape.window_rows), columns)
    return [f"{CHANNELS_AHEAD * _channel_floats(spec)} + {window_offset((0, *place), spec)}" for place in places]


def _channel_floats(spec: SweepSpec) -> int:
    return spec.window_rows * spec.window_pitch * LANES


def _sum_offset(place: Pair, spec: SweepSpec) -> int:
    """Return the floats from the sums of a filter to those of an output pixel."""
    return (place[0] * spec.tile[2] + place[1]) * LANES


def _pixel(place: Pair) -> str:
    return f"x{place[0]}_{place[1]}".replace("-", "m")
