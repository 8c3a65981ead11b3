"""From a layer to the programs that the warps of window_gradient.cuh walk through. Pure data (numpy)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clicktrain.kernels.cpu.layer import Integers, Layer
from clicktrain.kernels.cuda.window_text import WindowSpec

Words = NDArray[np.int32]

WINDOW_KERNELS = 5
"""Kernels that take as long as a window takes to be copied and loaded."""


@dataclass(frozen=True, eq=False)
class Programs:
    """What the warps do.

    Attributes
    ----------
    words : int32
        See window_gradient.cuh.
    pieces : (pieces + 1, 3) int32
        First filter of each piece, where its words and where its totals start.
    places : (kernels,) int32
        Where the totals of each kernel are, by its canonical number.
    kernels : int
        Places, those that no kernel has among them.
    """

    words: Words
    pieces: Words
    places: Words
    kernels: int

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self.pieces) - 1


def programs(layer: Layer, spec: WindowSpec) -> Programs:
    """Lay out the gradient of the values."""
    kernels = layer.kernels
    chunk = kernels.filters // spec.filters
    order = np.lexsort((kernels.filters, kernels.patterns, kernels.channels, chunk))
    chunk, channel, number = chunk[order], kernels.channels[order], kernels.numbers[order]
    records = kernels.filters[order] % spec.filters * spec.plane_words * spec.pattern_span + kernels.patterns[order]

    heads = np.flatnonzero(np.diff(chunk * layer.channels + channel, prepend=-1))
    ends = np.append(heads[1:], len(order))
    words: list[Integers] = []
    places, pieces, word_count, total_count = np.zeros(len(order), np.int32), [], 0, 0
    for first, last in _cut(chunk[heads], channel[heads], ends - heads, spec):
        pieces.append((int(chunk[heads[first]]) * spec.filters, word_count, total_count))
        header, start = list[int](), 2 * spec.warps
        programs = list[Integers]()
        for runs in _dealt(heads[first:last], ends[first:last], spec):
            header += [start, total_count - pieces[-1][2]]
            for begin, end in runs:
                programs.append(np.array([channel[begin], end - begin], np.int64))
                programs.append(records[begin:end])
                places[number[begin:end]] = np.arange(total_count, total_count + end - begin)
                total_count += end - begin
                start += end - begin + 2
            programs.append(np.array([-1], np.int64))
            start += 1
            total_count = -(-total_count // spec.groups) * spec.groups
        words += [np.array(header, np.int64), *programs]
        word_count += start
    pieces.append((0, word_count, total_count))
    joined = np.concatenate([np.zeros(0, np.int64), *words]).astype(np.int32)
    return Programs(joined, np.array(pieces, np.int32), places, total_count)


def _cut(chunk: Integers, channel: Integers, sizes: Integers, spec: WindowSpec) -> list[tuple[int, int]]:
    """Cut the channels of each chunk of filters into pieces of so many channels and kernels at most."""
    found, first, held = [], 0, 0
    for here in range(len(sizes)):
        alike = chunk[here] == chunk[first] and channel[here] // spec.channels == channel[first] // spec.channels
        if here and (not alike or held + sizes[here] > spec.kernels):
            found.append((first, here))
            first, held = here, 0
        held += int(sizes[here])
    return [*found, (first, len(sizes))] if len(sizes) else []


def _dealt(heads: Integers, ends: Integers, spec: WindowSpec) -> list[list[tuple[int, int]]]:
    """Deal the channels of a piece to warps: the longest first, to the warp with the least to do.

    A channel with more kernels than a warp's share is divided.
    """
    most = max(spec.groups, -(-int((ends - heads).sum()) // spec.warps))
    runs = [
        (start, min(end, start + most))
        for head, end in zip(heads.tolist(), ends.tolist(), strict=True)
        for start in range(head, end, most)
    ]
    waiting, dealt = [(0, warp) for warp in range(spec.warps)], [list[tuple[int, int]]() for _ in range(spec.warps)]
    for run in sorted(runs, key=lambda run: run[0] - run[1]):
        load, warp = heapq.heappop(waiting)
        dealt[warp].append(run)
        heapq.heappush(waiting, (load + run[1] - run[0] + WINDOW_KERNELS, warp))
    return dealt
