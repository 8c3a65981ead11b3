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
    REGISTERS,
    Pair,
    SweepSpec,
    TileShape,
    load_of,
    sum_name,
    taps_of,
)


def write(name: str, patterns: tuple[tuple[int, ...], ...], spec: SweepSpec, shape: TileShape) -> list[str]:
    """Return the function for a group of patterns and a tile."""
    entries, register = len(patterns[0]), REGISTERS[spec.pixels]
    pixels = list(product(range(shape.blocks), range(shape.rows), range(0, shape.columns, spec.pixels)))
    places = [(sum_name(b, r, c), f"{b} * s->$_block + {r} * s->$_row + {c} * s->$_pixel") for b, r, c in pixels]
    half = {sum_name(b, r, c) for b, r, c in pixels if c + spec.pixels > shape.columns}
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
