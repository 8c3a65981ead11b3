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
    """

    filter_of_slot: Words
    words: Words
    gather: Words
    bounds: Words

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

    Where the slots of a warp can share windows, each filter is followed by the one, among those of about its length,
    that has most kernels of the same channel and pattern.
    """
    lengths = np.bincount(layer.kernels.filters, minlength=layer.filters)
    order = np.argsort(-lengths, kind="stable")
    if max(map(len, spec.sets)) < 2:
        return order
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


def program(layer: Layer, spec: ConvolutionSpec) -> Program:
    """Lay out a convolution."""
    order = order_filters(layer, spec)
    blocks, chunks = -(-layer.filters // spec.filters), -(-layer.channels // spec.channels)
    filter_of_slot = np.full(blocks * spec.filters, -1, np.int32)
    filter_of_slot[: layer.filters] = order
    place = np.empty(layer.filters, np.int64)
    place[order] = np.arange(layer.filters)

    unit, kind, channel, numbers = _records(layer, spec, place)
    warp, cell = unit % spec.warps, unit // spec.warps * chunks + channel // spec.channels
    by_program = np.lexsort((channel, kind, warp, cell))
    kind, channel, numbers, warp, cell = (a[by_program] for a in (kind, channel, numbers, warp, cell))
    words, word_starts, heads = _words(kind, channel, warp, cell, blocks * chunks, spec)

    kept = numbers >= 0
    entries = np.arange(spec.entries)[:: -1 if layer.reversed else 1]
    gather = (numbers[kept][:, None] * spec.entries + entries).ravel()
    weights = np.zeros((blocks * chunks, spec.warps), np.int64)
    np.add.at(weights, (cell, warp), kept.sum(1) * spec.entries)
    weight_starts = np.append(0, np.cumsum(weights.sum(1)))
    words[heads[..., 1]] = np.cumsum(weights, 1) - weights
    return Program(
        filter_of_slot, words.astype(np.int32), gather.astype(np.int32),
        np.stack((word_starts, weight_starts), 1).astype(np.int32),
    )  # fmt: skip


def _records(layer: Layer, spec: ConvolutionSpec, place: Integers) -> tuple[Integers, Integers, Integers, Integers]:
    """Merge the kernels of a warp that have channel and pattern in common, as far as `spec.sets` allows.

    Returns
    -------
    unit, kind, channel : (records,) int64
        Warp, counted over all blocks; pattern and set; channel.
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
    return rest // layer.channels, pattern * len(spec.sets) + sets, rest % layer.channels, served


def _words(
    kind: Integers, channel: Integers, warp: Integers, cell: Integers, cells: int, spec: ConvolutionSpec
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
        channel % spec.channels * spec.window_floats, np.full(len(ends), -1),
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
    cell = kernels.filters // spec.filters, kernels.channels // spec.channels
    kernels = kernels[np.lexsort((kernels.filters, kernels.channels, kernels.patterns, cell[1], cell[0]))]
    filters, channels = kernels.filters // spec.filters, kernels.channels // spec.channels
    task, member = _cut(np.stack((filters, channels, kernels.channels, kernels.patterns), 1), spec.task_filters)
    first = np.flatnonzero(member == 0)
    piece, place = _cut(np.stack((filters, channels), 1)[first], room)

    words = np.zeros((int(piece.max(initial=-1)) + 1, room, spec.task_words), np.int32)
    words[:, :, 0] = -1
    words[:, :, 2 + spec.task_filters :] = -1
    words[piece, place, 0] = kernels.patterns[first]
    words[piece, place, 1] = kernels.channels[first] % spec.channels * spec.window_floats
    words[piece[task], place[task], 2 + member] = kernels.filters % spec.filters * spec.patch_floats
    words[piece[task], place[task], 2 + spec.task_filters + member] = kernels.numbers
    pieces = np.zeros((len(words), 2), np.int32)
    pieces[piece] = np.stack((filters * spec.filters, channels * spec.channels), 1)[first]
    return Tasks(pieces, words.reshape(len(words), spec.tasks, spec.warps, spec.task_words))


def _cut(keys: Integers, size: int) -> tuple[Integers, Integers]:
    """Cut runs of equal keys into parts of at most `size`; return each row's part and its place there."""
    rows = np.arange(len(keys))
    changes = np.ones(len(keys), bool)
    changes[1:] = (np.diff(keys, axis=0) != 0).any(1)
    inside = rows - np.maximum.accumulate(np.where(changes, rows, 0))
    place = inside % size
    return np.cumsum(place == 0) - 1, place


__all__ = ["Kernels", "Program", "Tasks", "order_filters", "program", "tasks"]
