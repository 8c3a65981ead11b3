"""Writes sweeps that go through the kernels of one filter after the other and keep the sums of a tile in registers.

Every input pixel is loaded once for all taps that use it: four weights on a tile of 2 x 4 pixels are 32 multiply-adds
for 15 loads, where the generic sweep (taps.h) needs 32. A record's offset is its channel's place in the window. More
weights than registers hold (dense 5 x 5 and 7 x 7) are loaded when their turn comes, while a row of the window is in
registers.
"""

from __future__ import annotations

from itertools import groupby, product

from clicktrain.kernels.cpu.codegen import (
    MOST_WEIGHTS,
    Pair,
    SweepSpec,
    TileShape,
    load_of,
    sum_name,
    taps_of,
)


def write(name: str, patterns: tuple[tuple[int, ...], ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the function for a group of patterns and a tile."""
    entries, register = len(patterns[0]), spec.register
    places = {sum_name(*place): place for place in _places(spec, shape)}
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
        f"    {register.name} {', '.join(f'{name} = start' for name in places)};",
        *(f"    {register.name} {name}_{chain} = {{}};" for name in places for chain in range(1, spec.chains)),
        "    if (const float* in = s->sums_in) {",
        "      in += filter * s->in_filter;",
        *(f"      {name} = {_load('in', 'in', place, spec, shape)};" for name, place in places.items()),
        "    }",
        *(line for number, pattern in enumerate(patterns) for line in _run(number, pattern, spec, shape)),
        *(f"    {name} += {name}_{chain};" for name in places for chain in range(1, spec.chains)),
        "    if (const float* residual = s->residual) {",
        "      residual += filter * s->out_filter;",
        *(f"      {name} += {_load('residual', 'out', place, spec, shape)};" for name, place in places.items()),
        "    }",
        f"    if (s->relu) {{ {' '.join(f'{name} = relu({name});' for name in places)} }}",
        "    float* out = s->sums_out + filter * s->out_filter;",
        *_pooled_stores(spec, shape),
        "    if (s->streaming) {",
        *(f"      {line}" for name, place in places.items() for line in _stores("stream", name, place, spec, shape)),
        "    } else {",
        *(f"      {line}" for name, place in places.items() for line in _stores("store", name, place, spec, shape)),
        "    }",
        "  }",
        "}",
    ]


Place = tuple[int, int, int]
"""Block, row and column of the first output pixel of a register."""


def _places(spec: SweepSpec, shape: TileShape) -> list[Place]:
    register = spec.register
    return list(
        product(
            range(0, shape.blocks, register.blocks), range(shape.rows), range(0, shape.columns, register.pixels)
        )
    )  # fmt: skip


def _is_half(place: Place, spec: SweepSpec, shape: TileShape) -> bool:
    """Tell whether the second half of a register sticks out of the tile."""
    block, _, column = place
    return block + spec.register.blocks > shape.blocks or column + spec.register.pixels > shape.columns


def _address(array: str, strides: str, place: Place) -> str:
    block, row, column = place
    return f"{array} + {block} * s->{strides}_block + {row} * s->{strides}_row + {column} * s->{strides}_pixel"


def _load(array: str, strides: str, place: Place, spec: SweepSpec, shape: TileShape) -> str:
    """Return the expression that loads a register of finished or unfinished sums."""
    address, (block, row, column) = _address(array, strides, place), place
    if _is_half(place, spec, shape):
        return f"{spec.register.load_first}({address})"
    if spec.register.blocks == 2:
        return f"load_two({address}, {_address(array, strides, (block + 1, row, column))})"
    return f"{spec.register.load}({address})"


def _stores(store: str, name: str, place: Place, spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines that write a register of sums."""
    address, (block, row, column) = _address("out", "out", place), place
    if _is_half(place, spec, shape):
        return [f"{store}({address}, first({name}));"]
    if spec.register.blocks == 2:
        other = _address("out", "out", (block + 1, row, column))
        return [f"{store}({address}, first({name}));", f"{store}({other}, second({name}));"]
    return [f"{store}({address}, {name});"]


def _pooled_stores(spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the lines with which "filter_blocks", where asked to, write the largest of each 2 x 2 sums and go on."""
    if spec.sweep != "filter_blocks" or shape.rows % 2 or shape.columns % 2:
        return []
    lines = []
    for row, column in product(range(0, shape.rows, 2), range(0, shape.columns, 2)):
        a, b, c, d = (sum_name(0, row + i, column + j) for i, j in product(range(2), repeat=2))
        lines.append(f"{a} = larger(larger({a}, {b}), larger({c}, {d}));")
        lines += _stores("store", a, (0, row // 2, column // 2), spec, shape)
    return ["    if (s->max_pool) {", *(f"      {line}" for line in lines), "      continue;", "    }"]


def _run(number: int, pattern: tuple[int, ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the loop over the kernels of one pattern."""
    entries, register = len(pattern), spec.register
    uses: dict[tuple[int, Pair], list[tuple[int, str]]] = {}
    for block, row, column in _places(spec, shape):
        for entry, pixel in taps_of(pattern, (row, column), spec, shape):
            chain = f"_{entry % spec.chains}" if entry % spec.chains else ""
            uses.setdefault((block, pixel), []).append((entry, sum_name(block, row, column) + chain))
    few = entries <= MOST_WEIGHTS
    weights = [f"const {register.name} w{entry} = {register.broadcast}(weight[{entry}]);" for entry in range(entries)]
    lines = [
        f"    for (int n = run[{number}]; n; --n, ++offset, weight += {entries}) {{",
        "      const float* channel = window + *offset;",
        *(f"      {weight}" for weight in weights if few),
    ]
    for _, group in groupby(sorted(uses), key=lambda place: (place[0], place[1][0])):
        row_of = list(group)
        loads = [f"{register.name} x = {load_of(block, pixel, spec, shape)};" for block, pixel in row_of]
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
