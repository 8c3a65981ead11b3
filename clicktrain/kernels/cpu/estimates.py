"""Which ways to cut up a pass are fast, without measuring: what they were on the machines that they were tried on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

from clicktrain.kernels.cpu import codegen, winograd
from clicktrain.kernels.cpu.codegen import LANES, Register
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.library import cache_bytes, instruction_set, wide_registers
from clicktrain.kernels.cpu.tiles import Choice, cuts, filters_at_once, streams, taps_tile

CHANNEL_BLOCK = {"avx512": 128, "avx2": 64, "portable": 64}
POINTWISE_CHANNEL_BLOCK = 128
"""Of sparse 1x1 layers under AVX2: a kernel of one weight is so little work that sums should seldom be loaded."""
DENSE_CHANNEL_BLOCK, DENSE = 32, 0.6
"""Where a filter keeps many kernels of a block, its window should stay in the first-level cache; where it keeps few,
longer lists pay more."""
BAND_PIXELS = 16
LEARNT_RUNS = 1024
_FMA_LATENCY = 4
_SUMS = {"avx512": 24, "avx2": 10, "portable": 8}
_SUMS_IN_TWO_STEPS = 16
"""Where AVX-512 computes 512 bits in two steps: with 3 to 32 channels 4 x 4 pixels were 1.0 to 1.1x faster than 3 x 8
(family 25, model 17 EPYC)."""
_ROW, _STRIDED_ROW = 14, 8
"""Of 1x1 layers there, the most pixels of a row that are computed at once: 0.95 to 2.7x over the generic sweep, with 56
x 56 to 4 x 4 pixels that keep all to an eighth of the kernels; 3 x 8 pixels were slower than that one."""
_REGISTERS = 32  # of AVX-512, the only set that holds a whole window
_SUMS_UNDER_WAY = 3
_PASSING_ENTRIES = 4
_SHORTEST_RUN, _SHORT_RUN, _SMALL_IMAGE = 5.0, 10.0, 64
"""Kernels of a channel with the same pattern, and output pixels, where AVX2 profits from larger tiles. On a family 25,
model 1 EPYC 3 x 4 pixels gained 1.02 to 1.20x over 2 x 4 with the shortest runs of 16 to 64 filters."""
_WASTE = 1.1
"""Columns of four-column tiles over those of the image from which on two are faster: 1.08 to 1.12x on 14 x 14."""
_PAIRS_FROM, _PAIRS_FROM_WITHOUT_PADDING = 65, 4
"""Output pixels from which on pairs of them are faster than single ones where 512 bits are computed in two steps: on
images, and on strips of images. 16 x 16 to 2 x 2 pixels at 2.25x to 12x on a family 25, model 17 EPYC: single pixels
gained 1.03 to 1.18x on 4 x 4, 1.0 to 1.25x on 7 x 7, and 0.93 to 1.07x on 8 x 8."""
_FEW_CHANNELS, _FEW_KERNELS = 32, 16
"""Whose window the first-level cache holds, and kernels of a filter, each of which loads and stores its sums where
sweeps go by channel: up to these, going by filters was faster. 64 filters of 3 to 16 channels with 32 x 32 pixels, on a
family 25, model 17 EPYC: 1.1 to 1.9x where they keep all kernels, 1.0 to 1.4x with half or a quarter of them."""
_BLOCKS_UP_TO = 200, 64
"""Output pixels up to which registers of two blocks were fastest, of 1x1 layers last: four blocks at 2.25x and 8.1x on
an Intel Xeon (family 6, model 85) gained 1.1 to 1.7x on 2 x 2 to 8 x 8, 1.0 to 1.1x on 14 x 14, and -13 to +8 % on
16 x 16."""

_PAIR_TILES = {(1, 1): ((2, 4), (4, 2), (2, 2), (1, 4), (1, 2)), (2, 2): ((4, 2), (1, 4))}
"""By stride, rows and columns whose window of pairs fits into the registers beside four weights."""

Tile = tuple[int, int, int]


def estimate(layer: Layer, blocks: int, pooled: bool = False) -> Choice:
    """Return a good way to cut up a pass, without measuring; one that may pool on the way, where a maximum follows."""
    channel_block = _channel_block(layer)
    if len(layer.patterns) > codegen.MAX_PATTERNS or (layer.kernel_size == 1 and not _gains_from_code(layer)):
        tile = taps_tile(layer)
        return Choice("taps", tile, _band(layer, tile), channel_block, group=1)
    if _suits_blocks(layer, blocks):
        return _by_filter(layer, blocks)[0]
    by_channel = _by_channel(layer, pooled)
    if by_channel and (instruction_set() == "avx2" or _suits_channels(layer, by_channel[0].tile, pooled)):
        return by_channel[0]
    return _by_filter(layer, blocks)[0]


def candidates(layer: Layer, blocks: int, pooled: bool = False, transforms: bool = False) -> list[Choice]:
    """Return the ways to cut up a pass that are worth measuring, the estimate first.

    Winograd's transform is among them only where that is asked for: it makes rounding errors larger, spreads NaN, and
    pays where weights are transformed once and for all.
    """
    first = estimate(layer, blocks, pooled)
    found = [first]
    if first.sweep != "taps":
        filters = _by_filter(layer, blocks)
        found += [*filters, *(replace(filters[0], group=group) for group in (2, len(layer.patterns)))]
        found += _by_channel(layer, pooled)
        tile = taps_tile(layer)
        found.append(Choice("taps", tile, _band(layer, tile), _channel_block(layer), group=1))
    if not codegen.goes_by_channel(first.sweep):  # those copy no window block by block
        found += [replace(first, channel_block=c) for c in (32, 128) if c < layer.channels]
    if transforms and winograd.applies(layer):
        found.append(winograd.choice(layer))
    return list(dict.fromkeys(found))


def _gains_from_code(layer: Layer) -> bool:
    """Tell whether 1x1 convolutions, where no load is shared, are faster specialised than generic."""
    if instruction_set() == "portable" or layer.spread != (1, 1):
        return False
    return _holds_pairs(layer) or not wide_registers()


def _channel_block(layer: Layer) -> int:
    block = CHANNEL_BLOCK[instruction_set()]
    if _density(layer) > DENSE:
        block = DENSE_CHANNEL_BLOCK
    elif layer.kernel_size == 1 and instruction_set() == "avx2":
        block = POINTWISE_CHANNEL_BLOCK
    return max(1, min(block, layer.channels))


def _density(layer: Layer) -> float:
    return len(layer.kernels.filters) / max(1, layer.filters * layer.channels)


def _group(layer: Layer, channel_block: int) -> int:
    """Patterns at once: all, unless there are so many runs that the processor cannot learn their lengths by heart.

    Those with AVX-512 can, it seems: there all patterns at once have always been faster.
    """
    if instruction_set() == "avx512":
        return len(layer.patterns)
    runs = layer.filters * -(-layer.channels // channel_block) * len(layer.patterns)
    return len(layer.patterns) if runs <= LEARNT_RUNS else 2


def _band(layer: Layer, tile: Tile) -> int:
    return max(1, min(BAND_PIXELS, layer.out_size[1]) // tile[2])


def _tiles(layer: Layer, blocks: int, register: Register) -> list[Tile]:
    """Return the tiles whose sums fit into the registers, beside a row of the window where weights do not."""
    (height, width), (u, v), pixels = layer.out_size, layer.spread, register.pixels

    def fits(b: int, r: int, c: int) -> bool:
        sums = b * r * u * c * v // (pixels * register.blocks)
        if layer.entries > codegen.MOST_WEIGHTS and instruction_set() == "avx512":
            return sums + _loads_of_row(layer, c * v, pixels) + 1 <= _REGISTERS
        return sums <= _sums()

    tiles = [
        (b, r * u, c * v)
        for b, r, c in product((1, 2, 3), (1, 2, 3, 4), range(pixels, 10 * pixels + 1, pixels))
        if fits(b, r, c) and b <= max(1, blocks) and (r - 1) * u < height and (c - 1) * v < width
        and (register.blocks == 1 or (b == register.blocks and not _odd(r * u, height) and not _odd(c * v, width)))
    ]  # fmt: skip
    return tiles or [(register.blocks, u, pixels * v)]


def _sums() -> int:
    """Return the sums of a tile that are best kept in registers."""
    return _SUMS_IN_TWO_STEPS if _in_two_steps() else _SUMS[instruction_set()]


def _in_two_steps() -> bool:
    return instruction_set() == "avx512" and not wide_registers()


def _odd(tile: int, size: int) -> bool:
    """Tell whether tiles of an even image are odd: a maximum of 2 x 2 could not be taken on the way."""
    return size % 2 == 0 and tile % 2 == 1


def _loads_of_row(layer: Layer, columns: int, pixels: int) -> int:
    """Return the registers that a row of the window of so many output columns takes."""
    stride, k = layer.stride[1], layer.kernel_size
    if pixels == 1:
        return (columns - 1) * stride + k
    pairs = -(-columns // 2)
    return min(pairs * k, 2 * (pairs - 1) * stride + k)


def _by_channel(layer: Layer, pooled: bool) -> list[Choice]:
    """Return the likeliest ways to go through the kernels channel by channel, the best first."""
    if instruction_set() == "portable" or layer.spread != (1, 1) or layer.kernel_size == 1:
        return []

    def choice(sweep: codegen.Sweep, tile: Tile) -> Choice:
        return Choice(sweep, tile, 1, max(1, layer.channels), len(layer.patterns))

    if instruction_set() == "avx2":
        return [choice("channels", tile) for tile in _passing_tiles(layer, pooled)]
    pairs = [choice("channel_pairs", tile) for tile in _pair_tiles(layer)]
    single = [choice("channels", tile) for tile in _window_tiles(layer)[:1]]
    return [*pairs, *single] if _suits_pairs(layer) else [*single, *pairs]


def _passing_tiles(layer: Layer, pooled: bool) -> list[Tile]:
    """Return the tiles of AVX2, whose registers hold the window of a pattern or let it pass by, the likeliest first.

    Without a stride, 1 x 4 pixels have the smaller sums and window; where runs are short or images small, what larger
    tiles save in loops is worth more, as long as the first-level cache holds the sums of all filters. With a stride
    pixels share no taps, and the smallest sums are best. Odd tiles cannot take a maximum of 2 x 2 on the way.
    """
    (height, width), run = layer.out_size, layer.filters * _density(layer) / len(layer.patterns)
    if layer.entries > _PASSING_ENTRIES:
        return []
    sizes = [(1, 4), (2, 4), (2, 2)]
    if max(layer.stride) > 1:
        sizes = [(1, 2), (2, 4)]
    elif run < _SHORTEST_RUN and height * width > _SMALL_IMAGE and layer.filters <= filters_at_once((1, 3, 4)):
        sizes = [(2, 4), (4, 4)] if pooled else [(3, 4), (2, 4), (4, 4)]
    elif run < _SHORT_RUN or height * width <= _SMALL_IMAGE:
        sizes = [(2, 4), (1, 4), (2, 2)]
    elif -(-width // 4) * 4 > _WASTE * width:
        sizes = [(2, 2), (2, 4), (1, 4)]
    return [(1, r, c) for r, c in sizes if r <= height and c <= width] or [(1, min(2, height), min(4, width))]


def _window_tiles(layer: Layer) -> list[Tile]:
    """Return the tiles whose window fits into the registers beside weights and sums, the largest first."""
    tiles = [
        (1, r, c)
        for r, c in product((1, 2, 3, 4), repeat=2)
        if _reads(layer, 0, r) * _reads(layer, 1, c) + layer.entries + _SUMS_UNDER_WAY <= _REGISTERS
        and r <= layer.out_size[0]
        and c <= layer.out_size[1]
    ]
    return sorted(tiles, key=lambda tile: (tile[1] * tile[2], tile[2]), reverse=True)


def _reads(layer: Layer, axis: int, tile: int) -> int:
    """Return how many input pixels along an axis a tile reads at most: padding is none."""
    stride, padding, end = layer.stride[axis], layer.padding[axis], layer.in_size[axis]
    windows = [
        (start * stride - padding, (start + length - 1) * stride - padding + layer.kernel_size)
        for start, length in cuts(layer.out_size[axis], tile, 1)
    ]
    return max(min(last, end) - max(first, 0) for first, last in windows)


def _pair_tiles(layer: Layer) -> list[Tile]:
    """Return the tiles of 3x3 layers whose window of pairs fits into the registers, the one with less waste first."""
    if layer.kernel_size != 3:
        return []
    sizes = _PAIR_TILES.get(layer.stride, ())
    tiles = [(1, r, c) for r, c in sizes if r <= layer.out_size[0] and c <= layer.out_size[1]]
    return sorted(tiles, key=lambda tile: _pairs(layer.out_size[1], tile[2]))


def _pairs(width: int, tile: int) -> int:
    return sum(-(-length // 2) for _, length in cuts(width, tile, 1))


def _suits_pairs(layer: Layer) -> bool:
    """Tell whether sweeps by channel are faster on pairs of pixels than on single ones.

    They are where 512 bits are computed at once. Else they are with a stride, whose window would take twice the
    registers, and on images of which little is padding.
    """
    height, width = layer.out_size
    least = _PAIRS_FROM if any(layer.padding) else _PAIRS_FROM_WITHOUT_PADDING
    return wide_registers() or max(layer.stride) > 1 or height * width >= least


def _suits_channels(layer: Layer, tile: Tile, pooled: bool) -> bool:
    """Tell whether going channel by channel, on such tiles, is the fastest for AVX-512.

    Only so can a maximum be taken on the way, which saves more than few channels lose.
    """
    if max(layer.stride) > 1:
        return True
    height, width = layer.out_size
    few = layer.channels <= _FEW_CHANNELS and layer.channels * _density(layer) <= _FEW_KERNELS
    if few and height * width >= _PAIRS_FROM and not (wide_registers() or pooled):
        return False
    return layer.kernel_size == 3 or tile[1:] == layer.out_size


def _suits_blocks(layer: Layer, blocks: int) -> bool:
    """Tell whether going filter by filter with a pixel of two blocks in a register is fastest.

    It is on small images: of larger ones, to copy the windows of both takes longer than the sweeps save. Where outputs
    are spread no sweep by channel and no pairs of pixels serve, with a stride the former read the window as it is.
    """
    if not wide_registers() or blocks < 2 or max(layer.stride) > 1:
        return False
    height, width = layer.out_size
    return max(layer.spread) > 1 or 4 <= height * width <= _BLOCKS_UP_TO[layer.kernel_size == 1]


def _by_filter(layer: Layer, blocks: int) -> list[Choice]:
    """Return the likeliest ways to go through the kernels filter by filter, the best first."""
    channel_block = _channel_block(layer)
    group = _group(layer, channel_block)
    found = [_by_row(layer, group)] if layer.kernel_size == 1 and _in_two_steps() else []
    sweeps: list[codegen.Sweep] = ["filters"]
    if _holds_pairs(layer):
        sweeps = ["filter_pairs", *sweeps]
    if wide_registers() and blocks > 1:
        sweeps = ["filter_blocks", *sweeps] if _suits_blocks(layer, blocks) else [*sweeps, "filter_blocks"]
    for sweep in sweeps:
        register = codegen.REGISTERS[sweep]
        tiles = sorted(_tiles(layer, blocks, register), key=lambda tile: _cost(layer, blocks, tile, register))
        found += [Choice(sweep, tile, _band(layer, tile), channel_block, group) for tile in tiles[:3]]
    return found


def _by_row(layer: Layer, group: int) -> Choice:
    """Return the choice for a 1x1 layer whose tile is a row of pixels, and whose window fills the first-level cache.

    Windows of dense layers, which are read in order, fill half of it.
    """
    (height, width), stride = layer.out_size, layer.stride[1]
    most = _ROW if stride == 1 else _STRIDED_ROW
    columns = next((width // parts for parts in range(1, width) if width % parts == 0 and width // parts <= most), 1)
    columns = min(width, max(columns, _STRIDED_ROW))
    rows = min(height, max(1, _STRIDED_ROW // columns))
    pixels = rows * ((columns - 1) * stride + 1) * (2 if _density(layer) > DENSE else 1)
    channels = 1 << (cache_bytes(1) // (4 * LANES * pixels)).bit_length() - 1
    return Choice("filters", (1, rows, columns), 1, max(1, min(channels, layer.channels)), group)


def _holds_pairs(layer: Layer) -> bool:
    """Tell whether sweeps by filter are faster with two pixels in a register."""
    return wide_registers() and layer.spread == (1, 1) and layer.out_size[1] > 1


def _cost(layer: Layer, blocks: int, tile: Tile, register: Register) -> tuple[bool, float]:
    return not streams(layer, blocks, tile), _cycles(layer, blocks, tile, register)


def _cycles(layer: Layer, blocks: int, tile: Tile, register: Register) -> float:
    """Estimate the cycles that all tiles together spend on one kernel, and on copying its share of a window."""
    lengths = [  # of two kinds at most, along each axis
        Counter(length for _, length in cuts(size, step, spread)).items()
        for size, step, spread in zip((blocks, *layer.out_size), tile, (1, *layer.spread), strict=True)
    ]
    phases = layer.spread[0] * layer.spread[1]
    uses = max(1.0, len(layer.kernels.filters) / max(1, layer.channels))  # of a channel's window
    (s, t), k, pixels = layer.stride, layer.kernel_size, register.pixels
    dear = 1.0 if pixels == 1 else 1.5 if t == 1 else 2.0  # half of the pairs cross a cache line; a stride takes two
    total = 0.0
    for (b, n_b), (r, n_r), (c, n_c) in product(*lengths):
        registers = -(-b // register.blocks)
        rows, sums = registers * ((r - 1) * s + k) / phases, registers * r * -(-c // pixels) / phases
        arithmetic = layer.entries * sums / 2
        latency = layer.entries * _FMA_LATENCY / phases
        loads = (dear * rows * _loads_of_row(layer, c, pixels) * min(1.0, layer.entries / k) + layer.entries) / 2
        copying = 2 * register.blocks * rows * ((c - 1) * t + k) / uses
        total += n_b * n_r * n_c * (max(arithmetic, latency, loads) + 3 + copying)
    return total
