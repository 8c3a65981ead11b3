"""From a plan to the arrays that the tensor-core kernels walk through. Pure data (numpy), testable without a GPU."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product
from weakref import WeakKeyDictionary

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

    Blocks come in sets; a chunk's rows of all blocks of a set are neighbours, and so are a set's chunks.

    Attributes
    ----------
    offsets : int32
        Place of each row in the tile of its chunk, in units; -1: a row of zeros, to make the steps whole.
    places : int32
        Which of the values the row has for the block's first filter; -1 likewise.
    bounds : (sets, chunks * blocks of a set + 1) int32
        Where the rows of each block start in each chunk of channels, and where the last ones end.
    strides : (blocks,) int32
        Values of a filter: from one filter of the block to the next.
    step_strides : (steps,) int32
        The same for the block of each step of 16 rows.
    """

    offsets: Words
    places: Words
    bounds: Words
    strides: Words
    step_strides: Words


def rows(plan: Plan, tile: Tile, together: int = 1) -> Rows:
    """Lay out the matrices for the forward pass and the gradient of the values, in sets of so many blocks."""
    chunks, entries = -(-plan.input_shape[1] // tile.channels), plan.pool.entries
    taps, cut = tap_places(plan.pool, tile), blocks(plan)
    strides = [len(block.channels) * entries for block in cut]
    by_chunk = [_by_chunk(block, tile, taps) for block in cut]
    offsets: list[int] = []
    places: list[int] = []
    bounds: list[int] = []
    step_strides: list[int] = []
    for first in range(0, len(cut), together):
        for chunk, number in product(range(chunks), range(first, first + together)):
            bounds.append(len(offsets))
            if number >= len(cut):
                continue
            for place, row in without_conflicts(by_chunk[number][chunk]):
                offsets += row
                places += range(place, place + entries)
            missing = -len(offsets) % STEP
            offsets += [-1] * missing
            places += [-1] * missing
            step_strides += [strides[number]] * (len(offsets) // STEP - len(step_strides))
        bounds.append(len(offsets))
    made = _words(bounds).reshape(-1, chunks * together + 1)
    return Rows(_words(offsets), _words(places), made, _words(strides), _words(step_strides))


def _by_chunk(block: Block, tile: Tile, taps: list[list[int]]) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
    """Return for each chunk of channels the kernels of a block: place of its values, and places of its rows."""
    found = defaultdict(list)
    for j, (channel, pattern) in enumerate(zip(block.channels, block.patterns, strict=True)):
        start = channel % tile.channels * tile.channel_pitch
        row = tuple(start + tap for tap in taps[pattern])
        found[channel // tile.channels].append(((block.base + j) * len(row), row))
    return found


_steps_of: WeakKeyDictionary[Plan, dict[tuple[int, int], tuple[int, int]]] = WeakKeyDictionary()


def most_steps(plan: Plan, channels: int, together: int) -> tuple[int, int]:
    """Return the most steps of 16 rows of a chunk of so many channels, and of all chunks, for so many blocks."""
    known = _steps_of.setdefault(plan, {})
    if (channels, together) not in known:
        kept = (plan.index[::FILTERS] != PRUNED).numpy().astype(np.int64)
        of_chunk = np.add.reduceat(kept, np.arange(0, kept.shape[1], channels), axis=1)
        steps = -(-of_chunk * plan.pool.entries // STEP)
        of_set = np.add.reduceat(steps, np.arange(0, len(steps), together), axis=0)
        known[channels, together] = int(of_set.max()), int(of_set.sum(1).max())
    return known[channels, together]


@dataclass(frozen=True, eq=False)
class Jobs:
    """What the warps of the input gradient do.

    Attributes
    ----------
    words : (jobs, spec.job_words) int32
        Tiles of 8 channels; places of the pattern's taps in a tile of dy, in units, in the order of the values;
        channels in the set (-1: none); which of the set's kernels theirs are.
    bounds : (sets of channels, blocks + 1) int32
        Where the jobs of a set and block of filters start, and where they end.
    kernels : (sets of channels, blocks, 2) int32
        Place of the values of a set's first kernel in the block's first filter, and kernels of the set in a filter.
    strides : (blocks,) int32
        As in `Rows`.
    """

    words: Words
    bounds: Words
    kernels: Words
    strides: Words


def input_jobs(plan: Plan, spec: TensorSpec) -> Jobs:
    """Lay out the input gradient: for each set of channels and block of filters, jobs of one pattern, large first."""
    channels, entries = plan.input_shape[1], plan.pool.entries
    taps = [places[::-1] for places in tap_places(plan.pool.rotated(), spec.input)]  # in the order of the values
    cut = blocks(plan)
    words: list[list[int]] = []
    bounds: list[int] = []
    kernels: list[int] = []
    for first in range(0, channels, spec.channels):
        for block in cut:
            bounds.append(len(words))
            start, end = (bisect_left(block.channels, c) for c in (first, first + spec.channels))
            kernels += ((block.base + start) * entries, end - start)
            words += sorted(_jobs(block, range(start, end), first, spec, taps), key=lambda job: -job[0])
        bounds.append(len(words))
    made = np.array(words or [[0] * spec.job_words], np.int32)
    return Jobs(
        made, _words(bounds).reshape(-1, len(cut) + 1),
        _words(kernels).reshape(-1, len(cut), 2), _words([len(block.channels) * entries for block in cut]),
    )  # fmt: skip


def _jobs(block: Block, kernels: range, first: int, spec: TensorSpec, taps: list[list[int]]) -> list[list[int]]:
    """Return the jobs of a block of filters for some of its kernels, in a set of channels from `first` on."""
    by_pattern: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for j in kernels:
        by_pattern[block.patterns[j]].append((block.channels[j] - first, j - kernels.start))
    most, jobs = 8 * spec.columns, []
    for pattern, members in by_pattern.items():
        ordered = spread_over_banks(members)
        for part in (ordered[start : start + most] for start in range(0, len(ordered), most)):
            padded = part + [(-1, 0)] * (most - len(part))
            # The four lanes of a row add to every second channel of a tile of 8.
            tiles = [padded[start + i // 2 + i % 2 * 4] for start in range(0, most, 8) for i in range(8)]
            job = [-(-len(part) // 8), *taps[pattern], *(c for c, _ in tiles), *(j for _, j in tiles)]
            jobs.append(job + [0] * (spec.job_words - len(job)))
    return jobs


def spread_over_banks(members: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Order (channel, kernel) so that fours of neighbours have channels that differ modulo 4, as far as they can."""
    waiting: list[list[tuple[int, int]]] = [[], [], [], []]
    for member in reversed(members):
        waiting[member[0] % 4].append(member)
    ordered: list[tuple[int, int]] = []
    while len(ordered) < len(members):
        four: list[tuple[int, int]] = []
        for bank in sorted(waiting, key=len, reverse=True) * 4:  # the fullest again where others are empty
            if bank and len(four) < 4:
                four.append(bank.pop())
        ordered += four
    return ordered


def value_jobs(bounds: Words, spec: TensorSpec) -> tuple[Words, Words]:
    """Lay out the gradient of the values.

    Parameters
    ----------
    bounds : (blocks, chunks + 1) int32
        Of `Rows` in which each set is one block.
    spec : TensorSpec
        How the function is cut up.

    Returns
    -------
    jobs : (pieces, warps // parts, 3) int32
        Block of filters in the piece (-1: no job), first row, steps.
    pieces : (pieces, 2) int32
        First block of filters and first channel.
    """
    room = spec.warps // spec.parts
    jobs: list[list[tuple[int, int, int]]] = []
    pieces: list[tuple[int, int]] = []
    for first in range(0, len(bounds), spec.blocks):
        for chunk in range(bounds.shape[1] - 1):
            found = [
                (slot, start, steps)
                for slot, (begin, end) in enumerate(bounds[first : first + spec.blocks, chunk : chunk + 2].tolist())
                for start, steps in _steps(begin, end, spec.tiles)
            ]
            for start in range(0, len(found), room):
                part = found[start : start + room]
                jobs.append(part + [(-1, 0, 0)] * (room - len(part)))
                pieces.append((first, chunk * spec.input.channels))
    return np.array(jobs, np.int32).reshape(-1, room, 3), np.array(pieces, np.int32).reshape(-1, 2)


def _steps(begin: int, end: int, most: int) -> list[tuple[int, int]]:
    """Cut rows into parts of at most so many steps, evenly; return first row and steps of each."""
    steps = (end - begin) // STEP
    parts = -(-steps // most)
    cuts = [steps * part // parts for part in range(parts + 1)] if parts else []
    return [(begin + STEP * a, b - a) for a, b in pairwise(cuts)]


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
