"""From a plan to the arrays and functions that the C++ driver walks through (`struct Pass`, `struct Gradient`)."""

from __future__ import annotations

import ctypes
import logging
import math
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.errors import BackendUnavailable, InvalidArgument
from clicktrain.kernels import build
from clicktrain.kernels.cpu import codegen, sweeps, winograd
from clicktrain.kernels.cpu.channel_sweeps import RECORDS_AHEAD
from clicktrain.kernels.cpu.codegen import LANES, SweepSpec, TileShape
from clicktrain.kernels.cpu.layer import Layer, Pair, stable_order
from clicktrain.kernels.cpu.library import Pass, function, instruction_set, sweep_taps
from clicktrain.kernels.cpu.reorder import reorder
from clicktrain.kernels.cpu.tiles import (
    Choice,
    Window,
    cuts,
    filters_at_once,
    streams,
    taps_tile,
    tile_count,
    tile_shapes,
)

ITEMS_PER_THREAD, FILTERS_PER_PART = 4, 16
CHAINS = 8  # multiply-adds under way at once: two units, four cycles each
MOST_TILES, PIXELS_PER_TILE = 4, 2
"""Tiles up to which sweeps by channel read the canonical values, and pixels that a tile needs for each of them: reading
costs a tile as much time whatever its size. On a family 25, model 17 EPYC, batches of 1 to 32 at 2.25x to 8.1x: 1.1 to
1.5x with one tile of 2 x 4 or 4 x 4 pixels, 1.06 to 1.2x with two, 1.0 to 1.14x with four, 0.95 to 1.06x with eight;
with tiles of 2 x 2 pixels 1.08 to 1.2x with two, 0.93 to 1.1x with four."""
logger = logging.getLogger(__name__)


class Prepared:
    """A C structure and what it points to."""

    def __init__(self, structure: ctypes.Structure, arrays: dict[str, NDArray[Any]]) -> None:
        self.structure = structure
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            self.add(name, array)
        self.address = ctypes.addressof(structure)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Let a field point to an array."""
        self.arrays[name] = array
        setattr(self.structure, name, array.ctypes.data)


def prepare(layer: Layer, blocks: int, choice: Choice, short_chains: bool = False, packed: bool = False) -> Prepared:
    """Lay out a pass. Without a compiler the generic sweep takes the place of a specialised one.

    With short chains, small tiles are faster, and their tile decides the last bits, too (see `SweepSpec`). Packed: the
    weights are gathered once and for all, so that no sweep reads the canonical values.
    """
    if choice.sweep == "taps":
        return _prepare_taps(layer, blocks, choice)
    if choice.sweep == "winograd":
        return _prepare_winograd(layer, blocks, choice)
    try:
        if codegen.goes_by_channel(choice.sweep):
            return _prepare_channels(layer, blocks, choice, packed)
        return _prepare_filters(layer, blocks, choice, short_chains)
    except BackendUnavailable as error:
        warn_once(str(error))
        return _prepare_taps(layer, blocks, replace(choice, sweep="taps", tile=taps_tile(layer)))


@cache
def warn_once(reason: str) -> None:
    """Say why the generic kernels are used, the first time."""
    logger.warning("specialised convolution kernels are not available, the generic one is slower: %s", reason)


def _prepare_taps(layer: Layer, blocks: int, choice: Choice) -> Prepared:
    """Lay out a pass whose records are single taps, listed for each phase of output pixels."""
    window, structure = Window.of(layer, choice), _structure(layer, blocks, choice)
    found = reorder(layer, choice.channel_block, len(layer.patterns), structure.part)
    kernels = found.kernels
    taps = np.stack(np.divmod(np.array(layer.patterns), layer.kernel_size), -1)
    values = kernels.numbers[:, None] * layer.entries + np.arange(layer.entries)[:: -1 if layer.reversed else 1]
    channel = kernels.channels % choice.channel_block * window.pixels
    starts, offsets, gather = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    records = 0
    for cb, *phase in product(range(len(found.order)), range(layer.spread[0]), range(layer.spread[1])):
        block = slice(*np.searchsorted(found.lists, (cb, cb + 1)))
        place, remainder = np.divmod(taps + np.array(phase) * layer.stride + window.origin, layer.spread)
        pixel = place[..., 0] * window.pitch + place[..., 1]
        exists = (remainder == 0).all(-1)[kernels.patterns[block]]
        offsets.append((channel[block, None] + pixel[kernels.patterns[block]])[exists])
        gather.append(values[block][exists])
        counts = np.bincount(found.places[block], exists.sum(1), layer.filters).astype(np.int64)
        starts.append(records + np.concatenate(([0], np.cumsum(counts))))
        records += len(gather[-1])
    rows, columns = choice.tile[1] // layer.spread[0], choice.tile[2] // layer.spread[1]
    structure.phases, structure.record_weights, structure.whole_tiles = layer.spread[0] * layer.spread[1], 1, 1
    structure.groups = 1
    structure.records = records
    return Prepared(structure, {
        "order": found.order.astype(np.int32),
        "starts": np.concatenate(starts),
        "offsets": (np.concatenate(offsets) * LANES).astype(np.int32),
        "gather": np.concatenate(gather).astype(np.int32),
        "sweeps": np.full(tile_count(layer, blocks, choice), sweep_taps(rows, columns, layer.stride[1]), np.uint64),
    })  # fmt: skip


def _prepare_filters(layer: Layer, blocks: int, choice: Choice, short_chains: bool) -> Prepared:
    """Lay out a pass whose records are kernels, by filter in runs of one pattern."""
    window, structure = Window.of(layer, choice), _structure(layer, blocks, choice)
    group = min(choice.group, len(layer.patterns))
    found = reorder(layer, choice.channel_block, group, structure.part)
    ends = np.cumsum(found.runs.sum(-1)).reshape(len(found.order), -1)
    starts = np.concatenate((np.append(0, ends[:-1, -1])[:, None], ends), axis=1)
    channel = found.kernels.channels % choice.channel_block
    structure.phases, structure.record_weights, structure.whole_tiles = 1, layer.entries, 0
    structure.groups = -(-len(layer.patterns) // group)
    structure.part_runs, structure.list_runs = structure.part * group, layer.filters * group
    structure.reversed, structure.records = layer.reversed, len(channel)
    structure.woven = choice.sweep == "filter_blocks"
    return Prepared(structure, {
        "order": found.order.astype(np.int32),
        "starts": starts.astype(np.int64),
        "runs": found.runs.astype(np.uint16),
        "offsets": (channel * (choice.tile[0] * window.pixels * LANES)).astype(np.int32),
        "gather": (found.kernels.numbers * layer.entries).astype(np.int32),
        "sweeps": _specialised_sweeps(layer, blocks, choice, window, _chains(layer, choice) if short_chains else 1),
    })  # fmt: skip


def _prepare_channels(layer: Layer, blocks: int, choice: Choice, packed: bool) -> Prepared:
    """Lay out a pass whose records are kernels, by part of the filters and by channel in runs of one pattern."""
    window, structure = Window.of(layer, choice), _structure(layer, blocks, choice)
    sums, patterns = math.prod(choice.tile) * LANES, len(layer.patterns)
    structure.part = _part(layer, blocks, choice)
    parts = -(-layer.filters // structure.part)
    kernels = layer.kernels
    block, channel = np.divmod(kernels.channels, choice.channel_block)
    item = block * parts + kernels.filters // structure.part
    shape = (structure.channel_blocks * parts, choice.channel_block, patterns)
    run = (item * shape[1] + channel) * patterns + kernels.patterns
    kernels = kernels[stable_order(run, math.prod(shape))]
    runs = np.bincount(run, minlength=math.prod(shape))
    of_items = np.bincount(item, minlength=shape[0])
    starts = np.zeros((structure.channel_blocks, layer.filters + 1), np.int64)
    starts[:, : -1 : structure.part] = (np.cumsum(of_items) - of_items).reshape(-1, parts)
    structure.phases = structure.groups = structure.keeps_sums = 1
    structure.record_weights, structure.reversed, structure.records = layer.entries, layer.reversed, len(run)
    structure.part_runs, structure.list_runs = math.prod(shape[1:]), parts * math.prod(shape[1:])
    structure.reads_values = not packed and _reads_values(layer, blocks, choice)
    gather = kernels.numbers * layer.entries
    weights: codegen.Weights = "packed"
    if structure.reads_values:
        weights = "reversed" if layer.reversed else "values"
        gather = np.append(gather, np.zeros(RECORDS_AHEAD, np.int64))
    return Prepared(structure, {
        "order": np.zeros(structure.channel_blocks * layer.filters, np.int32),  # filters stay where they are
        "starts": starts,
        "runs": runs.astype(np.uint16),
        "offsets": (kernels.filters * sums).astype(np.int32),
        "gather": gather.astype(np.int32),
        "sweeps": _specialised_sweeps(layer, blocks, choice, window, 1, layer.in_size, weights),
    })  # fmt: skip


def _prepare_winograd(layer: Layer, blocks: int, choice: Choice) -> Prepared:
    """Lay out a pass by Winograd's transform, which has no sweeps: its records are kernels at all points."""
    if not winograd.applies(layer):
        raise InvalidArgument(f"choice {choice}: expected a layer of 3x3 kernels without a stride")
    structure = _structure(layer, blocks, choice)
    structure.start_h, structure.start_w = -layer.padding[0], -layer.padding[1]
    structure.part, structure.entries = winograd.part(layer), layer.entries
    structure.record_weights = len(winograd.POINTS) ** 2
    structure.records = len(layer.kernels.filters)
    return Prepared(structure, winograd.arrays(layer, choice.channel_block))


def _reads_values(layer: Layer, blocks: int, choice: Choice) -> bool:
    """Tell whether a sweep by channel reads the canonical values: so few tiles do not repay gathering them."""
    pixels = math.prod(choice.tile)
    return tile_count(layer, blocks, choice) <= max(1, min(MOST_TILES, pixels // PIXELS_PER_TILE))


def _part(layer: Layer, blocks: int, choice: Choice) -> int:
    """Return the filters of a part: as many as the cache holds sums of, or one part a thread where tiles are few.

    Each part reads the window again, and the longer the runs of a part the fewer loops end unforeseen.
    """
    most = filters_at_once(choice.tile)
    threads, tiles = torch.get_num_threads(), tile_count(layer, blocks, choice)
    parts = -(-layer.filters // most)
    if tiles < ITEMS_PER_THREAD * threads:
        parts = -(-parts // threads) * threads
    return max(1, -(-layer.filters // parts))


def gather(prepared: Prepared, values: Tensor) -> Tensor:
    """Return the weights of a pass as its sweeps read them, gathered or transformed."""
    made = prepared.structure
    weights = torch.empty(made.records * made.record_weights + 1)
    function("gather_weights")(prepared.address, values.data_ptr(), weights.data_ptr(), torch.get_num_threads())
    return weights


def _structure(layer: Layer, blocks: int, choice: Choice) -> Pass:
    """Fill in what both kinds of passes share."""
    (in_h, in_w), (out_h, out_w), (tile_blocks, tile_h, tile_w) = layer.in_size, layer.out_size, choice.tile
    window = Window.of(layer, choice)
    items = tile_count(layer, blocks, choice) // choice.band or 1
    parts = max(1, min(-(-ITEMS_PER_THREAD * torch.get_num_threads() // items), layer.filters // FILTERS_PER_PART))
    return Pass(
        blocks=blocks, channels=layer.channels, in_h=in_h, in_w=in_w, filters=layer.filters, out_h=out_h, out_w=out_w,
        tile_blocks=tile_blocks, tile_h=tile_h, tile_w=tile_w, band=choice.band,
        window_h=window.size[0], window_w=window.size[1], window_pitch=window.pitch,
        start_h=window.start[0], start_w=window.start[1],
        stride_h=layer.stride[0], stride_w=layer.stride[1], spread_h=layer.spread[0], spread_w=layer.spread[1],
        channel_block=choice.channel_block, channel_blocks=-(-layer.channels // choice.channel_block),
        part=-(-layer.filters // parts), streaming=choice.sweep != "taps" and streams(layer, blocks, choice.tile),
    )  # fmt: skip


def can_pool(prepared: Prepared) -> bool:
    """Tell whether a pass can write the largest of each 2 x 2 outputs only (`Pass.max_pool`)."""
    made = prepared.structure
    if made.transforms:
        return bool(made.out_h % 2 == made.out_w % 2 == 0)
    tiles = (*cuts(made.out_h, made.tile_h, 1), *cuts(made.out_w, made.tile_w, 1))
    return bool(made.keeps_sums or made.woven) and all(start % 2 == 0 and length % 2 == 0 for start, length in tiles)


def _chains(layer: Layer, choice: Choice) -> int:
    """Return how many sums of a pixel keep the multiply-add units busy together with its neighbours'."""
    assert codegen.is_sweep(choice.sweep)
    register = codegen.REGISTERS[choice.sweep]
    sums = -(-choice.tile[0] // register.blocks) * choice.tile[1] * -(-choice.tile[2] // register.pixels)
    return max(1, min(layer.entries, CHAINS // sums))


def _specialised_sweeps(
    layer: Layer,
    blocks: int,
    choice: Choice,
    window: Window,
    chains: int,
    planes: Pair | None = None,
    weights: codegen.Weights = "packed",
) -> NDArray[np.uint64]:
    """Return the address of the sweep of each group and tile, compiled if need be.

    `planes`: rows of a channel and pixels of a row where the sweeps read, if that is the input itself.
    """
    shapes = tile_shapes(layer, blocks, choice, window)
    distinct = tuple(sorted(set(shapes), key=str))
    assert codegen.is_sweep(choice.sweep)
    most = len(layer.patterns)
    group = most if codegen.goes_by_channel(choice.sweep) else min(choice.group, most)
    spec = SweepSpec(
        choice.sweep, instruction_set(), layer.kernel_size, layer.patterns, group, layer.stride, layer.spread,
        window.origin, *(planes or (window.size[0], window.pitch)), choice.tile, chains, weights,
    )  # fmt: skip
    found = iter(_addresses(spec, distinct))
    table: list[int] = []
    for _ in spec.groups():
        address = {shape: next(found) for shape in distinct}
        table += [address[shape] for shape in shapes]
    return np.array(table, np.uint64)


@cache
def _addresses(spec: SweepSpec, shapes: tuple[TileShape, ...]) -> list[int]:
    return addresses(sweeps.library(spec, shapes), "clicktrain_sweep", len(shapes) * len(spec.groups()))


def addresses(library: build.Library, name: str, count: int) -> list[int]:
    """Compile a library if need be and return where its functions `<name>_<number>` are."""
    loaded = build.load(library)
    return [ctypes.cast(loaded[f"{name}_{number}"], ctypes.c_void_p).value or 0 for number in range(count)]
