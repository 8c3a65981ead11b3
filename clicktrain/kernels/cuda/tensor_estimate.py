"""About how long a function takes on tensor cores, for each way to cut it up; by the arithmetic of tensor.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from clicktrain.kernels.cuda.region import LANES
from clicktrain.kernels.cuda.tensor_geometry import Geometry
from clicktrain.kernels.cuda.tensor_layout import most_steps
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, RESIDENT_WARPS, STEP, UNIT_BYTES, TensorSpec, Tile
from clicktrain.kernels.cuda.tiling import RESERVED_BYTES, Limits
from clicktrain.kernels.plan import Plan

BYTES_PER_CYCLE = 24
"""About what the second-level cache gives to a multiprocessor of an H200."""
COPY_LATENCY = 600
BARRIER = 60
LAUNCH = 1500
"""Cycles until a copy is there, until all warps have met, and until a block of threads has started and written."""
LOADS, CHUNK, LOADED_ROWS = 1100, 400, 16
"""Cycles that an H100 took for a load on which the next one depends, and about what starts a chunk's copies; and rows
whose place a thread reads before it copies their weights."""


@dataclass(frozen=True)
class Cost:
    """What one block of threads takes, in cycles.

    Attributes
    ----------
    blocks : float
        Blocks of threads.
    products, copying, writing : float
        What they take of a multiprocessor: shared memory and products, tiles and weights, results.
    chain : float
        The steps of its busiest warp, one after another.
    chunks : float
        Times that it waits for a copy.
    buffers : int
        Tiles in shared memory.
    through_registers : bool
        Whether copies take instructions of the warps that compute.
    start, each : float
        Waits for loads before the first copy is complete, and in each chunk.
    turns : float
        Times that it writes results; but for the last one, while copies are on their way.
    """

    blocks: float
    products: float
    copying: float
    writing: float
    chain: float
    chunks: float
    buffers: int
    through_registers: bool
    start: float = 0.0
    each: float = 0.0
    turns: float = 1.0

    def cycles(self, resident: int, limits: Limits) -> float:
        """Return the cycles of the whole function; copies overlap with products as far as there is more than one."""
        busiest = ceil(self.blocks / limits.multiprocessors)
        work = busiest * (max(self.products, self.copying + self.writing) + 0.2 * self.products)
        if self.through_registers:
            work = busiest * (self.products + self.copying + self.writing)
        return max(work, ceil(busiest / resident) * (LAUNCH + self.start + self._longest())) + 0.1 * work

    def _longest(self) -> float:
        """Return what a block takes alone once it has started: the first copy, then what takes longest."""
        of_copy, computing = self.copying / self.chunks, max(self.chain, self.products)
        if self.buffers == 1:
            return self.chunks * (COPY_LATENCY + self.each + 2 * BARRIER) + self.copying + computing + self.writing
        if self.through_registers:
            exposed = of_copy + 0.3 * self.copying + self.chunks * (COPY_LATENCY + self.each)
            return computing + exposed + self.writing
        ahead = self.buffers - 1
        waiting = max(of_copy, (COPY_LATENCY + of_copy) / ahead if self.chunks > ahead else 0.0)
        last = self.writing / self.turns
        of_chunk = max((computing + self.writing - last) / self.chunks + BARRIER + self.each, waiting)
        return COPY_LATENCY + of_copy + self.chunks * of_chunk + last


def estimate(spec: TensorSpec, plan: Plan, limits: Limits) -> float:
    """Return about how many cycles a function takes; good for choosing, no more."""
    cost = {"forward": _forward, "grad_input": _input, "grad_values": _values}[spec.function]
    return cost(spec, plan, limits).cycles(resident(spec, plan, limits), limits)


def _forward(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    channels, sets = plan.input_shape[1], ceil(plan.index.shape[0] // FILTERS / spec.blocks)
    chunks = ceil(channels / spec.input.channels)
    walks, splits = walks_and_splits(sets, spec, plan, limits)
    turns = ceil(walks / splits)
    loads = LOADS * spec.blocks * _kept(plan) * spec.entries / (LOADED_ROWS * spec.warps * LANES / 4)
    steps = turns * (_kept(plan) * spec.entries / STEP + 0.5 * chunks)
    weights = spec.blocks * steps * (FILTERS * STEP * 2 / BYTES_PER_CYCLE + 7)
    return Cost(
        splits * sets,
        spec.warps * steps * (2.3 * spec.tiles + 6),
        turns * channels * _copy_cycles(spec.input, spec.batch_last) + weights / (turns if spec.all_rows else 1),
        turns * _write_cycles(spec, plan.output_shape[3], spec.blocks * FILTERS),
        steps * (8 * spec.tiles + 40), turns * chunks, spec.buffers, not spec.batch_last,
        start=2 * LOADS + (loads if spec.all_rows else 0), turns=turns,
        each=CHUNK + (0 if spec.all_rows else LOADS + loads / chunks),
    )  # fmt: skip


def _input(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    channels, filter_blocks = plan.input_shape[1], plan.index.shape[0] // FILTERS
    sets, kept = ceil(channels / spec.channels), _kept(plan)
    of_pattern = kept / len(plan.pool) / sets  # channels
    jobs = len(plan.pool) * ceil(of_pattern / (8 * spec.columns))  # of a block of filters
    columns = ceil(of_pattern / 8) / max(1, ceil(of_pattern / (8 * spec.columns)))
    additions = 8 * spec.tiles * columns
    job = spec.entries * (spec.tiles * max(4.0, 2 * columns) + 2 * columns) + additions
    alone = spec.entries * (8 * spec.tiles * columns + 60) + additions + 200
    weights = FILTERS * filter_blocks * kept / sets * spec.entries * (2 / BYTES_PER_CYCLE + 0.04)
    copying = FILTERS * filter_blocks * _copy_cycles(spec.input, spec.batch_last)
    return Cost(
        _places(spec, plan) * sets, filter_blocks * jobs * spec.parts * job, copying + weights,
        _write_cycles(spec, plan.input_shape[3], spec.channels),
        filter_blocks * ceil(jobs / (spec.warps // spec.parts)) * alone, ceil(filter_blocks / spec.blocks),
        spec.buffers, not spec.batch_last,
    )  # fmt: skip


def _values(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    assert spec.output is not None
    filter_blocks, channels = plan.index.shape[0] // FILTERS, plan.input_shape[1]
    chunks, room = ceil(channels / spec.input.channels), spec.warps // spec.parts
    steps = max(1, ceil(_kept(plan) * spec.entries / (chunks * STEP) + 0.3))
    jobs = spec.blocks * ceil(steps / spec.tiles)
    pieces = ceil(filter_blocks / spec.blocks) * chunks * ceil(jobs / room)
    walks, splits = walks_and_splits(pieces, spec, plan, limits)
    turns, pairs, of_job = ceil(walks / splits), ceil(spec.positions / 2), min(spec.tiles, steps)
    partial = 2 * 4 * plan.values_shape[0] * spec.entries * splits * spec.parts  # bytes, written and read
    return Cost(
        pieces * splits, turns * min(room, jobs) * pairs * (5.2 * of_job + 6),
        turns * sum(tile.channels * _copy_cycles(tile, spec.batch_last) for tile in (spec.input, spec.output)),
        partial / BYTES_PER_CYCLE / (pieces * splits), turns * ceil(pairs / spec.parts) * (16 * of_job + 60), turns,
        spec.buffers, not spec.batch_last,
    )  # fmt: skip


def _kept(plan: Plan) -> float:
    """Return the kernels of a filter, on average."""
    return plan.values_shape[0] / plan.index.shape[0]


def _places(spec: TensorSpec, plan: Plan) -> int:
    """Return how many rectangles and groups of images there are."""
    geometry = Geometry.transposed(plan) if spec.function == "grad_input" else Geometry.forward(plan)
    rects = geometry.rects(spec.rect)
    return ceil(plan.input_shape[0] / (IMAGES * spec.input.groups)) * rects[0] * rects[1]


def _write_cycles(spec: TensorSpec, width: int, channels: int) -> float:
    """Return the cycles for the results; pieces of a sector of 32 bytes count as whole ones."""
    if spec.batch_last:
        partial = _sectors(spec.input.groups)
    else:
        partial = 2 if spec.rect[1] < min(STEP, width) else 1
    return partial * 2 * spec.positions * channels * IMAGES / BYTES_PER_CYCLE


def _sectors(groups: int) -> float:
    """Return by how much single units cost more than whole sectors of memory, and those more than whole lines."""
    return 2.0 if groups == 1 else 1.2 if groups == 2 else 1.0


def _copy_cycles(tile: Tile, batch_last: bool) -> float:
    """Return about how many cycles of a multiprocessor the copy of one channel takes."""
    if batch_last:
        return tile.groups * tile.copied[0] * tile.copied[1] * (_sectors(tile.groups) * UNIT_BYTES / BYTES_PER_CYCLE)
    words = tile.groups * tile.copied[0] * tile.copied[1]
    return words * (2 * IMAGES * tile.width / BYTES_PER_CYCLE + 0.3)


def resident(spec: TensorSpec, plan: Plan, limits: Limits) -> int:
    """Return how many blocks of threads share a multiprocessor."""
    used = spec.shared_bytes + RESERVED_BYTES
    if spec.function == "forward":
        used += row_bytes(spec, plan)
    elif spec.function == "grad_input":
        used += spec.weight_bytes(ceil(_kept(plan) * spec.channels / plan.input_shape[1]))
    return max(1, min(RESIDENT_WARPS // spec.warps, (limits.shared_bytes + RESERVED_BYTES) // used))


def row_bytes(spec: TensorSpec, plan: Plan) -> int:
    """Return the shared memory of the forward pass for rows and their bounds."""
    steps = most_steps(plan, spec.input.channels, spec.blocks)[spec.all_rows]
    return spec.row_bytes(steps, ceil(plan.input_shape[1] / spec.input.channels))


def walks_and_splits(pieces: int, spec: TensorSpec, plan: Plan, limits: Limits) -> tuple[int, int]:
    """Return how many steps a walk over all positions has, and into how many shares it is divided.

    Each of so many pieces is walked over by blocks of threads that are resident all at once.
    """
    rects = Geometry.forward(plan).rects(spec.rect)
    walks = rects[0] * rects[1] * ceil(plan.input_shape[0] / (IMAGES * spec.input.groups))
    wanted = resident(spec, plan, limits) * limits.multiprocessors // max(1, pieces)
    return walks, max(1, min(walks, wanted))
