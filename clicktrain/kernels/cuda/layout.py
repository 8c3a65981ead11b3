"""From a layer to the arrays that the CUDA kernels walk through: filter-kernel reorder, programs, tasks.

Pure data (numpy), testable without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from clicktrain.kernels.cpu.layer import Integers, Kernels, Layer
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, GradientSpec

Words = NDArray[np.int32]

_CANDIDATES = 32  # filters of about the same length among which a filter's partner is sought


@dataclass(frozen=True, eq=False)
class Program:
    """What the warps of a convolution do.

    Attributes
    ----------
    filter_of_slot : (blocks * warps * slots) int32
        Filter of each slot, -1 = none.
    words : int32
        For each block and chunk: where each warp's words and weights start in the chunk, then the words: a run
        (kind + length * 65536), the places of its channels' windows, ..., -1.
    gather : int32
        Which of the values each weight is.
    bounds : (blocks * chunks + 1, 2) int32
        Where the words and weights of a block and chunk start.
    channels : (blocks, channels) int32
        In which order each block copies the channels.
    """

    filter_of_slot: Words
    words: Words
    gather: Words
    bounds: Words
    channels: Words

    @property
    def most_words(self) -> int:
        """Words of the largest chunk."""
        return int(np.diff(self.bounds[:, 0]).max(initial=0))

    @property
    def most_weights(self) -> int:
        """Weights of the largest chunk."""
        return int(np.diff(self.bounds[:, 1]).max(initial=0))


def order_filters(layer: Layer, spec: ConvolutionSpec) -> Integers:
    """Return the filters in the order of slots: by length, so that warps finish together.

    A warp of two filters has a long and a short one; but where its slots can share windows, each filter is followed by
    the one, among those of about its length, that has most kernels of the same channel and pattern.
    """
    lengths = np.bincount(layer.kernels.filters, minlength=layer.filters)
    order = np.argsort(-lengths, kind="stable")
    if max(map(len, spec.sets)) < 2:
        return _long_with_short(order) if spec.slots == 2 else order
    index = np.full((layer.filters, layer.channels), -1, np.int16)
    index[layer.kernels.filters, layer.kernels.channels] = layer.kernels.patterns
    waiting, paired = order.tolist(), []
    while waiting:
        first, rest = waiting[0], waiting[1 : 1 + _CANDIDATES]
        paired.append(first)
        if rest:
            row = index[first]
            shared = ((index[rest] == row) & (row >= 0)).sum(1)
            paired.append(waiting.pop(1 + int(shared.argmax())))
        waiting.pop(0)
    return np.array(paired, np.int64)


def _long_with_short(order: Integers) -> Integers:
    half = len(order) // 2
    pairs = np.stack((order[:half], order[::-1][:half]), 1).ravel()
    return np.append(pairs, order[half : half + len(order) % 2])


def order_channels(loads: Integers, size: int) -> Integers:
    """Return an order of the channels in which every warp has about as much to do in each chunk of them.

    All warps of a block wait for its slowest at the end of a chunk. Channels are given out, the fullest first, to the
    chunk that has room and whose busy warps they burden least.

    Parameters
    ----------
    loads : (blocks, warps, channels)
        Kernels of each warp.
    size : int
        Channels of a chunk; the last one takes what is left.

    Returns
    -------
    (blocks, channels) int64
        Of each block.
    """
    blocks, warps, channels = loads.shape
    room = np.full((blocks, -(-channels // size)), size)
    room[:, -1] = channels - size * (room.shape[1] - 1)
    total, chunk = np.zeros((blocks, warps, room.shape[1])), np.empty((blocks, channels), np.int64)
    every = np.arange(blocks)
    for channel in np.argsort(-loads.sum(1), axis=1, kind="stable").T:
        load = loads[every, :, channel]
        burden = (total**4 * load[:, :, None]).sum(1)
        chosen = np.where(room > 0, burden, np.inf).argmin(1)
        chunk[every, channel] = chosen
        room[every, chosen] -= 1
        total[every, :, chosen] += load
    return np.argsort(chunk, axis=1, kind="stable")


def program(layer: Layer, spec: ConvolutionSpec) -> Program:
    """Lay out a convolution."""
    order = order_filters(layer, spec)
    blocks, chunks = -(-layer.filters // spec.filters), -(-layer.channels // spec.channels)
    filter_of_slot = np.full(blocks * spec.filters, -1, np.int32)
    filter_of_slot[: layer.filters] = order
    place = np.empty(layer.filters, np.int64)
    place[order] = np.arange(layer.filters)

    unit, kind, channel, moved, numbers = _records(layer, spec, place)
    block, warp = unit // spec.warps, unit % spec.warps
    loads = np.zeros((blocks, spec.warps, layer.channels), np.int64)
    np.add.at(loads, (block, warp, channel), 1)
    channels = order_channels(loads, spec.channels)
    seat = np.argsort(channels, axis=1)[block, channel]  # of the channel in its block's order
    cell = block * chunks + seat // spec.channels
    by_program = np.lexsort((seat, kind, warp, cell))
    kind, numbers, warp, cell = (a[by_program] for a in (kind, numbers, warp, cell))
    windows = (seat % spec.channels * spec.region.words + moved)[by_program]
    words, word_starts, heads = _words(kind, windows, warp, cell, blocks * chunks, spec)

    kept = numbers >= 0
    entries = np.arange(spec.entries)[:: -1 if layer.reversed else 1]
    gather = (numbers[kept][:, None] * spec.entries + entries).ravel()
    weights = np.zeros((blocks * chunks, spec.warps), np.int64)
    np.add.at(weights, (cell, warp), kept.sum(1) * spec.entries)
    weight_starts = np.append(0, np.cumsum(weights.sum(1)))
    words[heads[..., 1]] = np.cumsum(weights, 1) - weights
    return Program(
        filter_of_slot, words.astype(np.int32), gather.astype(np.int32),
        np.stack((word_starts, weight_starts), 1).astype(np.int32), channels.astype(np.int32),
    )  # fmt: skip


def _records(layer: Layer, spec: ConvolutionSpec, place: Integers) -> tuple[Integers, ...]:
    """Merge the kernels of a warp that have channel and pattern in common, as far as `spec.sets` allows.

    Returns
    -------
    unit, kind, channel, moved : (records,) int64
        Warp, counted over all blocks; shape and set; channel; words from a window to what the pattern reads.
    numbers : (records, slots) int64
        Canonical numbers of the kernels, -1 in slots that the record does not serve.
    """
    kernels = layer.kernels
    unit, slot = place[kernels.filters] // spec.slots, place[kernels.filters] % spec.slots
    key = (unit * layer.channels + kernels.channels) * len(layer.patterns) + kernels.patterns
    groups, group = np.unique(key, return_inverse=True)
    numbers = np.full((len(groups), spec.slots), -1, np.int64)
    numbers[group, slot] = kernels.numbers
    parts = []
    for number, members in sorted(enumerate(spec.sets), key=lambda item: -len(item[1])):
        complete = (numbers[:, members] >= 0).all(1)
        served = np.full((int(complete.sum()), spec.slots), -1, np.int64)
        served[:, members] = numbers[complete][:, members]
        parts.append((groups[complete], np.full(len(served), number), served))
        numbers[np.ix_(complete, np.array(members))] = -1
    keys, sets, served = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rest, pattern = np.divmod(keys, len(layer.patterns))
    shape, moved = np.array(spec.shapes.of_pattern)[pattern], np.array(spec.shapes.moved)[pattern]
    return rest // layer.channels, shape * len(spec.sets) + sets, rest % layer.channels, moved, served


def _words(
    kind: Integers, windows: Integers, warp: Integers, cell: Integers, cells: int, spec: ConvolutionSpec
) -> tuple[Integers, Integers, Integers]:
    """Return the words of all programs, where each cell's start, and the places of each warp's two head words."""
    record = np.arange(len(kind))
    change = np.ones(len(kind), bool)
    change[1:] = (np.diff(kind) != 0) | (np.diff(warp) != 0) | (np.diff(cell) != 0)
    first = np.flatnonzero(change)
    length = np.diff(np.append(first, len(kind)))
    everywhere = np.array(list(product(range(cells), range(spec.warps))), np.int64).reshape(-1, 2)
    ends, heads = np.full(len(everywhere), len(kind)), np.repeat(everywhere, 2, 0)
    # Items in their final order: by cell; heads, then by warp; runs and their records, then the end.
    order_cell = np.concatenate((heads[:, 0], cell[first], cell, everywhere[:, 0]))
    order_warp = np.concatenate((np.full(len(heads), -1), warp[first], warp, everywhere[:, 1]))
    order_record = np.concatenate((np.arange(len(heads)), first, record, ends))
    order_sort = np.concatenate((np.zeros(len(heads)), np.zeros(len(first)), np.ones(len(record)), np.zeros(len(ends))))
    value = np.concatenate((
        np.zeros(len(heads), np.int64), kind[first] + (length << 16),
        windows, np.full(len(ends), -1),
    ))  # fmt: skip
    order = np.lexsort((order_sort, order_record, order_warp, order_cell))
    words = value[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    head_places = place[: len(heads)].reshape(cells, spec.warps, 2)
    starts = np.append(np.searchsorted(order_cell[order], np.arange(cells)), len(order))
    end_places = place[-len(ends) :].reshape(cells, spec.warps) if cells else np.zeros((0, spec.warps), np.int64)
    warp_starts = np.concatenate((head_places[:, -1:, 1] + 1, end_places[:, :-1] + 1), 1)
    words[head_places[..., 0]] = warp_starts - starts[:-1, None]
    return words, starts, head_places


@dataclass(frozen=True, eq=False)
class Tasks:
    """What the warps of the gradient do.

    Attributes
    ----------
    pieces : (pieces, 2) int32
        First filter and first channel of each piece.
    words : (pieces, tasks of a warp, warps, words of a task) int32
        See gradient.cuh.
    """

    pieces: Words
    words: Words


def tasks(layer: Layer, spec: GradientSpec) -> Tasks:
    """Lay out the gradient of the values."""
    kernels, room = layer.kernels, spec.warps * spec.tasks
    shapes, moved = np.array(spec.shapes.of_pattern), np.array(spec.shapes.moved)
    cell = kernels.filters // spec.filters, kernels.channels // spec.channels
    kernels = kernels[np.lexsort((kernels.channels, shapes[kernels.patterns], kernels.filters, cell[1], cell[0]))]
    filters, channels = kernels.filters // spec.filters, kernels.channels // spec.channels
    task, member = _cut(np.stack((kernels.filters, channels), 1), spec.task_kernels)
    first = np.flatnonzero(member == 0)
    piece, _ = _cut(np.stack((filters, channels), 1)[first], room)
    place = _dealt(piece, np.diff(np.append(first, len(task))), spec.warps, spec.tasks)

    words = np.full((int(piece.max(initial=-1)) + 1, room, spec.task_words), -1, np.int32)
    words[piece, place, 0] = kernels.filters[first] % spec.filters * spec.dy.words
    words[piece[task], place[task], 1 + 3 * member] = shapes[kernels.patterns]
    windows = kernels.channels % spec.channels * spec.x.words + moved[kernels.patterns]
    words[piece[task], place[task], 2 + 3 * member] = windows
    words[piece[task], place[task], 3 + 3 * member] = kernels.numbers
    pieces = np.zeros((len(words), 2), np.int32)
    pieces[piece] = np.stack((filters * spec.filters, channels * spec.channels), 1)[first]
    return Tasks(pieces, words.reshape(len(words), spec.tasks, spec.warps, spec.task_words))


def _dealt(piece: Integers, sizes: Integers, warps: int, tasks: int) -> Integers:
    """Return each task's place in its piece: the largest first, to the warp with the least to do that has room."""
    order = np.lexsort((-sizes, piece))
    rank = np.arange(len(order)) - np.searchsorted(piece[order], piece[order])
    load = np.zeros((int(piece.max(initial=-1)) + 1, warps))
    held, place = np.zeros(load.shape, np.int64), np.empty_like(order)
    for turn in range(int(rank.max(initial=-1)) + 1):
        these = order[rank == turn]
        where = piece[these]
        warp = np.where(held[where] < tasks, load[where], np.inf).argmin(1)
        place[these] = held[where, warp] * warps + warp
        held[where, warp] += 1
        load[where, warp] += sizes[these]
    return place


def _cut(keys: Integers, size: int) -> tuple[Integers, Integers]:
    """Cut runs of equal keys into even parts of at most `size`; return each row's part and its place there."""
    rows = np.arange(len(keys))
    changes = np.ones(len(keys), bool)
    changes[1:] = (np.diff(keys, axis=0) != 0).any(1)
    first = np.flatnonzero(changes)
    run = np.cumsum(changes) - 1
    length = np.diff(np.append(first, len(keys)))[run]
    inside, parts = rows - first[run], -(-length // size)
    # The first `length % parts` parts have one row more than the others.
    small, larger = length // parts, length % parts
    split = larger * (small + 1)
    place = np.where(inside < split, inside % (small + 1), (inside - split) % np.maximum(1, small))
    return np.cumsum(place == 0) - 1, place


__all__ = ["Kernels", "Program", "Tasks", "order_channels", "order_filters", "program", "tasks"]
