"""From a plan to the arrays that the tensor-core kernels walk through. Pure data (numpy), testable without a GPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clicktrain.kernels.cuda.tensor_text import FILTERS, STEP, TensorSpec, Tile
from clicktrain.kernels.plan import Plan
from clicktrain.patterns import PRUNED, PatternPool

Words = NDArray[np.int32]
BANKS = 8
"""Units that shared memory delivers at once: rows of a matrix that differ modulo 8 do not collide."""


@dataclass(frozen=True)
class Block:
    """What 16 neighbouring filters keep in common.

    Attributes
    ----------
    channels, patterns : tuple of int
        Of the kernels of one filter, by channel.
    base : int
        The first kernel of the first filter, as a row of the values.
    """

    channels: tuple[int, ...]
    patterns: tuple[int, ...]
    base: int


def blocks(plan: Plan) -> list[Block]:
    """Return the blocks of a plan in which blocks of 16 filters are equal."""
    found, base = [], 0
    for row in plan.index[::FILTERS].numpy():
        channels = np.flatnonzero(row != PRUNED)
        found.append(Block(tuple(channels.tolist()), tuple(row[channels].tolist()), base))
        base += FILTERS * len(channels)
    return found


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of the matrices of all blocks: (channel, tap) as places in a tile.

    Attributes
    ----------
    offsets : int32
        Place of each row in the tile of its chunk, in units; -1: a row of zeros, to make the steps whole.
    places : int32
        Which of the values the row has for the block's first filter; -1 likewise.
    bounds : (blocks, chunks + 1) int32
        Where the rows of a block start in each chunk of channels, and where they end.
    strides : (blocks,) int32
        Values of a filter: from one filter of the block to the next.
    """

    offsets: Words
    places: Words
    bounds: Words
    strides: Words


def rows(plan: Plan, tile: Tile) -> Rows:
    """Lay out the matrices for the forward pass and the gradient of the values."""
    chunks, entries = -(-plan.input_shape[1] // tile.channels), plan.pool.entries
    taps = tap_places(plan.pool, tile)
    offsets: list[int] = []
    places: list[int] = []
    bounds, strides = [], []
    for block in blocks(plan):
        strides.append(len(block.channels) * entries)
        by_chunk = defaultdict(list)
        for j, (channel, pattern) in enumerate(zip(block.channels, block.patterns, strict=True)):
            start = channel % tile.channels * tile.channel_pitch
            row = tuple(start + tap for tap in taps[pattern])
            by_chunk[channel // tile.channels].append(((block.base + j) * entries, row))
        for chunk in range(chunks):
            bounds.append(len(offsets))
            for place, row in without_conflicts(by_chunk[chunk]):
                offsets += row
                places += range(place, place + entries)
            missing = -len(offsets) % STEP
            offsets += [-1] * missing
            places += [-1] * missing
        bounds.append(len(offsets))
    return Rows(_words(offsets), _words(places), _words(bounds).reshape(-1, chunks + 1), _words(strides))


def tap_places(pool: PatternPool, tile: Tile) -> list[list[int]]:
    """Return the places of each pattern's taps relative to a position, in units."""
    k = pool.kernel_size
    return [[tap // k * tile.row_pitch + tap % k for tap in pattern.kept] for pattern in pool]


def without_conflicts(kernels: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Order the kernels of a chunk so that, as far as they can, the 8 rows of a matrix are in different banks.

    Parameters
    ----------
    kernels : list of (int, tuple of int)
        Place of a kernel's values, and places of its rows in the tile.
    """
    if not kernels or BANKS % len(kernels[0][1]):
        return kernels
    waiting: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for kernel in reversed(kernels):
        waiting[sum(1 << bank for bank in {place % BANKS for place in kernel[1]})].append(kernel)
    ordered: list[tuple[int, tuple[int, ...]]] = []
    taken = 0
    while waiting:
        if len(ordered) * len(kernels[0][1]) % BANKS == 0:
            taken = 0
        fitting = [banks for banks in waiting if not banks & taken] or list(waiting)
        banks = max(fitting, key=lambda banks: len(waiting[banks]))  # the most frequent first: others are scarce
        ordered.append(waiting[banks].pop())
        taken |= banks
        if not waiting[banks]:
            del waiting[banks]
    return ordered


def _words(numbers: list[int]) -> Words:
    return np.array(numbers or [0], np.int32)


__all__ = ["Block", "Rows", "TensorSpec", "blocks", "rows", "tap_places", "without_conflicts"]
