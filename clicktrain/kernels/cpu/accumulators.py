"""Writes the specialised gradient of the values: straight-line C++ for one pool of patterns and one border.

An accumulator adds the products of one channel's pixels with those of a few filters' output gradients, for kernels of
one pattern. Rows and columns of the output fall into classes that read the same taps (top, middle and bottom, say);
each class is a loop whose body has only taps that exist. So nothing is multiplied with padding, which in images of
4 x 4 pixels is a quarter of the taps and in those of 2 x 2 more than half, and the input is read where it is.

    for each block: for each class of rows: for each row: for each class of columns: for each column:
        for each filter: for each tap of the pattern that exists here: sum[filter][tap] += x[pixel + tap] * dy[filter]

The generic accumulators (gradient.h) do the same on a copied window with real zeros. Sizes are known at run time
only, so that all layers of a network with one pool share the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, product

from clicktrain.kernels.build import Library
from clicktrain.kernels.cpu.codegen import FLAGS, LANES, Pair, header

SUMS = {"avx512": 24, "avx2": 12, "portable": 12}
"""Sums that stay in registers."""
MOST_FILTERS = 8

Classes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AccumulatorSpec:
    """A pool of patterns and, for rows and columns, the taps that each class of output pixels reads, in order."""

    instruction_set: str
    kernel_size: int
    patterns: tuple[tuple[int, ...], ...]
    stride: Pair
    classes: tuple[Classes, Classes]
    width: int | None = None
    """Of the input, where the image is so small that all of it is straight-line code; each pixel is a class then."""

    @property
    def filters(self) -> int:
        """Filters at once that leave the sums in registers."""
        return max(1, min(MOST_FILTERS, SUMS[self.instruction_set] // len(self.patterns[0])))


def taps_by_pixel(out_size: int, in_size: int, kernel_size: int, stride: int, padding: int) -> Classes:
    """Return for each output pixel along an axis the taps that exist for it."""
    return tuple(
        tuple(k for k in range(kernel_size) if 0 <= pixel * stride + k - padding < in_size) for pixel in range(out_size)
    )


def merged(pixels: Classes) -> tuple[Classes, list[int]]:
    """Return classes of neighbouring pixels with equal taps, and where each class ends."""
    classes = [(taps, len(list(group))) for taps, group in groupby(pixels)]
    return tuple(taps for taps, _ in classes), list(accumulate(count for _, count in classes))


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
    sums = {(f, e): f"s{f}_{e}" for f, e in product(range(filters), range(len(pattern)))}
    places = {key: (key[0] * len(pattern) + key[1]) * LANES for key in sums}
    write = _whole_image if spec.width else _rows
    return [
        f'extern "C" void {name}(const Accumulation* a) {{',
        f"  Vec {', '.join(f'{s} = {{}}' for s in sums.values())};",
        "  if (const float* in = a->sums_in) {",
        *(f"    {s} = load(in + {places[key]});" for key, s in sums.items()),
        "  }",
        *write(pattern, filters, spec),
        "  float* const out = a->sums_out;",
        *(f"  store(out + {places[key]}, {s});" for key, s in sums.items()),
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
    for number, row_taps in enumerate(spec.classes[0]):
        lines += [
            f"    const int end{number} = last < a->row_ends[{number}] ? last : a->row_ends[{number}];",
            f"    for (; r < end{number}; ++r) {{",
            f"      const float* const top = x + r * {spec.stride[0]} * a->x_row;",
            *(f"      const float* const x{k} = top + {k} * a->x_row;" for k in row_taps),
            "      const int64_t line = b * a->dy_block + r * a->dy_row;",
            *(f"      const float* const g{f} = a->dy[{f}] + line;" for f in range(filters)),
            "      int64_t c = 0;",
        ]
        for column, column_taps in enumerate(spec.classes[1]):
            exist = [(e, row, k) for e, (row, k) in enumerate(taps) if row in row_taps and k in column_taps]
            loads = [f"load(x{row} + {spec.stride[1]} * c + {k * LANES})" for _, row, k in exist]
            lines += [
                f"      for (; c < a->column_ends[{column}]; c += {LANES}) {{",
                *_pixel([e for e, _, _ in exist], loads, filters, "c"),
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
    for number, ((r, rows), (c, columns)) in enumerate(product(*(enumerate(classes) for classes in spec.classes))):
        exist = [(e, row, k) for e, (row, k) in enumerate(taps) if row in rows and k in columns]
        places = [(r * spec.stride[0] + row) * spec.width + c * spec.stride[1] + k for _, row, k in exist]
        loads = [f"load(x + {place * LANES})" for place in places]
        lines += ["    {", *_pixel([e for e, _, _ in exist], loads, filters, str(number * LANES)), "    }"]
    return [*lines, *(f"    g{f} += a->dy_block;" for f in range(filters)), "  }"]


def _pixel(entries: list[int], loads: list[str], filters: int, place: str) -> list[str]:
    """Return the multiply-adds of one output pixel, with what to load for each entry."""
    lines = [f"        const Vec v{e} = {load};" for e, load in zip(entries, loads, strict=True)]
    for f in range(filters if entries else 0):
        additions = " ".join(f"s{f}_{e} += v{e} * g;" for e in entries)
        lines.append(f"        {{ Vec g = load(g{f} + {place}); pin(g); {additions} }}")
    return lines
