"""Writes the specialised gradient of the values: straight-line C++ for one pool of patterns and one border.

An accumulator adds the products of one channel's pixels with those of a few filters' output gradients, for kernels of
one pattern. Rows and columns of the output fall into classes that read the same taps (top, middle and bottom, say);
each class is a loop whose body has only taps that exist. So nothing is multiplied with padding, which in images of
4 x 4 pixels is a quarter of the taps and in those of 2 x 2 more than half, and the input is read where it is.

    for each block: for each class of rows: for each row: for each class of columns: for each column:
        for each filter: for each tap of the pattern that exists here: sum[filter][tap] += x[pixel + tap] * dy[filter]

Under AVX-512 a register holds two neighbouring pixels of a row, where the others hold one; a class then is of pairs
of columns, and what does not exist of a pair is masked out. The two halves of a sum are added in the end.

The generic accumulators (gradient.h) do the same on a copied window with real zeros. Sizes are known at run time
only, so that all layers of a network with one pool share the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, product
from typing import TypeVar

from clicktrain.kernels.build import Library
from clicktrain.kernels.cpu.codegen import FLAGS, LANES, PIXEL, PIXEL_PAIR, Pair, header

SUMS = {"avx512": 24, "avx2": 12, "portable": 12}
"""Sums that stay in registers."""
REGISTERS = {"avx512": PIXEL_PAIR, "avx2": PIXEL, "portable": PIXEL}
PIXELS = {name: register.pixels for name, register in REGISTERS.items()}
"""In a register."""
MOST_FILTERS = 8

Taps = tuple[int, ...]
"""Those that exist for an output pixel along an axis."""
Columns = tuple[Taps, ...]
"""The taps of the neighbouring pixels of a register; of fewer pixels than it holds where the row ends before."""
Class = TypeVar("Class", Taps, Columns)


@dataclass(frozen=True)
class AccumulatorSpec:
    """A pool of patterns, and the taps that each class of rows and each class of columns reads, in order."""

    instruction_set: str
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    stride: Pair
    rows: tuple[Taps, ...]
    columns: tuple[Columns, ...]
    width: int | None = None
    """Of the input, where the image is so small that all of it is straight-line code; nothing is merged then."""

    @property
    def filters(self) -> int:
        """Filters at once that leave the sums in registers."""
        return max(1, min(MOST_FILTERS, SUMS[self.instruction_set] // len(self.patterns[0])))


def taps_by_pixel(out_size: int, in_size: int, kernel_size: int, stride: int, padding: int) -> tuple[Taps, ...]:
    """Return for each output pixel along an axis the taps that exist for it."""
    return tuple(
        tuple(k for k in range(kernel_size) if 0 <= pixel * stride + k - padding < in_size) for pixel in range(out_size)
    )


def by_register(pixels: tuple[Taps, ...], instruction_set: str) -> tuple[Columns, ...]:
    """Return the pixels of a row as registers hold them."""
    step = PIXELS[instruction_set]
    return tuple(pixels[i : i + step] for i in range(0, len(pixels), step))


def merged(classes: tuple[Class, ...]) -> tuple[tuple[Class, ...], list[int]]:
    """Return one of each of neighbouring equal classes, and where it ends."""
    found = [(taps, len(list(group))) for taps, group in groupby(classes)]
    return tuple(taps for taps, _ in found), list(accumulate(count for _, count in found))


def library(spec: AccumulatorSpec) -> Library:
    """Return the library with `clicktrain_accumulate_<i>`, numbered by pattern and by filters less one."""
    return Library("accumulate", (("accumulate.cpp", render(spec)),), FLAGS)


def render(spec: AccumulatorSpec) -> str:
    """Return the translation unit with the accumulators of all patterns for all numbers of filters."""
    lines = header(spec.instruction_set)
    for number, (pattern, filters) in enumerate(product(spec.patterns, range(1, spec.filters + 1))):
        lines += ["", *_accumulator(f"clicktrain_accumulate_{number}", pattern, filters, spec)]
    return "\n".join(lines) + "\n"


def _accumulator(name: str, pattern: tuple[int, ...], filters: int, spec: AccumulatorSpec) -> list[str]:
    register = REGISTERS[spec.instruction_set]
    sums = {(f, e): f"s{f}_{e}" for f, e in product(range(filters), range(len(pattern)))}
    places = {key: (key[0] * len(pattern) + key[1]) * LANES for key in sums}
    write = _whole_image if spec.width else _rows
    return [
        f'extern "C" void {name}(const Accumulation* a) {{',
        f"  {register.name} {', '.join(f'{s} = {{}}' for s in sums.values())};",
        "  if (const float* in = a->sums_in) {",
        *(f"    {s} = {register.load_first}(in + {places[key]});" for key, s in sums.items()),
        "  }",
        *write(pattern, filters, spec),
        "  float* const out = a->sums_out;",
        *(f"  store(out + {places[key]}, {register.folded.format(s)});" for key, s in sums.items()),
        "}",
    ]


def _rows(pattern: tuple[int, ...], filters: int, spec: AccumulatorSpec) -> list[str]:
    taps = [divmod(tap, spec.kernel_size) for tap in pattern]
    lines = [
        "  const int last = a->row + a->rows;",
        "  for (int b = 0; b < a->blocks; ++b) {",
        "    const float* const x = a->x + b * a->x_block;",
        "    int r = a->row;",
    ]
    for number, rows in enumerate(spec.rows):
        lines += [
            f"    const int end{number} = last < a->row_ends[{number}] ? last : a->row_ends[{number}];",
            f"    for (; r < end{number}; ++r) {{",
            f"      const float* const top = x + r * {spec.stride[0]} * a->x_row;",
            *(f"      const float* const x{k} = top + {k} * a->x_row;" for k in rows),
            "      const int64_t line = b * a->dy_block + r * a->dy_row;",
            *(f"      const float* const g{f} = a->dy[{f}] + line;" for f in range(filters)),
            "      int64_t c = 0;",
        ]
        for column, columns in enumerate(spec.columns):
            places = {e: (f"x{row} + {spec.stride[1]} * c", 0, k) for e, (row, k) in enumerate(taps) if row in rows}
            lines += [
                f"      for (; c < a->column_ends[{column}]; c += {PIXELS[spec.instruction_set] * LANES}) {{",
                *_products(places, columns, filters, "c", spec),
                "      }",
            ]
        lines.append("    }")
    return [*lines, "  }"]


def _whole_image(pattern: tuple[int, ...], filters: int, spec: AccumulatorSpec) -> list[str]:
    assert spec.width is not None
    taps = [divmod(tap, spec.kernel_size) for tap in pattern]
    lines = [
        "  const float* x = a->x;",
        *(f"  const float* g{f} = a->dy[{f}];" for f in range(filters)),
        "  for (int b = 0; b < a->blocks; ++b, x += a->x_block) {",
    ]
    pixels = 0
    for (r, rows), (c, columns) in product(enumerate(spec.rows), enumerate(spec.columns)):
        corner = r * spec.stride[0] * spec.width + c * PIXELS[spec.instruction_set] * spec.stride[1]
        places = {e: ("x", corner + row * spec.width, k) for e, (row, k) in enumerate(taps) if row in rows}
        lines += ["    {", *_products(places, columns, filters, str(pixels * LANES), spec), "    }"]
        pixels += len(columns)
    return [*lines, *(f"    g{f} += a->dy_block;" for f in range(filters)), "  }"]


def _products(
    places: dict[int, tuple[str, int, int]], columns: Columns, filters: int, out: str, spec: AccumulatorSpec
) -> list[str]:
    """Return the multiply-adds of one register of output pixels.

    `places`: for each entry where the first pixel's row of the input lies, the pixel's place in it, and the tap.
    """
    register = REGISTERS[spec.instruction_set]
    which = {e: _which(k, columns, spec) for e, (_, _, k) in places.items()}
    inputs = {
        f"v{e}": _load(f"{row} + {(pixel + k) * LANES}", which[e], spec)
        for e, (row, pixel, k) in places.items()
        if which[e]
    }
    load = register.load if len(columns) == PIXELS[spec.instruction_set] else register.load_first
    gradients = {f"d{f}": f"{load}(g{f} + {out})" for f in range(filters if inputs else 0)}
    # The fewer of the two stay in registers while the others pass by: 12 sums leave 4 registers of AVX2.
    held, passing = sorted((gradients, inputs), key=len)
    lines = [f"        {register.name} {name} = {value}; pin({name});" for name, value in held.items()]
    for name, value in passing.items():
        pairs = [(name, other) if name in inputs else (other, name) for other in held]
        additions = " ".join(f"add{which[int(v[1:])]}(s{d[1:]}_{v[1:]}, {v}, {d});" for v, d in pairs)
        lines.append(f"        {{ {register.name} {name} = {value}; pin({name}); {additions} }}")
    return lines


def _which(tap: int, columns: Columns, spec: AccumulatorSpec) -> str:
    """Return which pixels of a register read a tap: "_all", "_first", "_second" or none, as lanes.h calls them."""
    names = ("_all",) if PIXELS[spec.instruction_set] == 1 else ("_first", "_second")
    readers = [name for name, taps in zip(names, columns, strict=False) if tap in taps]
    return "_all" if len(readers) == 2 else "".join(readers)


def _load(address: str, which: str, spec: AccumulatorSpec) -> str:
    """Return the expression that loads a tap of those output pixels; the first one's input is at the address."""
    register, step = REGISTERS[spec.instruction_set], spec.stride[1] * LANES
    if which == "_first":
        return f"load_first({address})"
    if which == "_second":
        return f"load_second({address} + {step - LANES})"
    if register.name == "Pair" and spec.stride[1] > 1:
        return f"load_two({address}, {address} + {step})"
    return f"{register.load}({address})"
