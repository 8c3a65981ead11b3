"""About how long a function takes on tensor cores, for each way to cut it up; by the arithmetic of tensor.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from clicktrain.kernels.cuda.tensor_geometry import Geometry
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, RESIDENT_WARPS, STEP, TensorSpec, Tile
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan

BYTES_PER_CYCLE = 24
"""About what the second-level cache gives to a multiprocessor of an H200."""
COPY_LATENCY = 600
LAUNCH = 1500
"""Cycles until a copy is there, and until a block of threads has started and written."""


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
    """

    blocks: float
    products: float
    copying: float
    writing: float
    chain: float
    chunks: float

    def cycles(self, resident: int, limits: Limits) -> float:
        """Return the cycles of the whole function; copies overlap with products as far as there is more than one."""
        busiest = ceil(self.blocks / limits.multiprocessors)
        work = busiest * (self.products + self.copying + self.writing)
        exposed = self.copying * (1 / self.chunks + 0.3) + self.chunks * COPY_LATENCY + LAUNCH
        longest = max(self.chain, self.products) + exposed + self.writing
        return max(work, ceil(busiest / resident) * longest) + 0.1 * work


def estimate(spec: TensorSpec, plan: Plan, limits: Limits) -> float:
    """Return about how many cycles a function takes; good for choosing, no more."""
    cost = {"forward": _forward, "grad_input": _input, "grad_values": _values}[spec.function]
    return cost(spec, plan, limits).cycles(resident(spec, limits), limits)


def _forward(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    channels, filter_blocks = plan.input_shape[1], plan.index.shape[0] // FILTERS
    chunks = ceil(channels / spec.input.channels)
    steps = _kept(plan) * spec.entries / STEP + 0.5 * chunks
    weights = spec.blocks * steps * FILTERS * STEP * 2 / BYTES_PER_CYCLE
    return Cost(
        _places(spec, plan) * ceil(filter_blocks / spec.blocks), spec.warps * steps * (2.6 * spec.tiles + 10) + weights,
        channels * _copy_cycles(spec.input), _write_cycles(spec, plan.output_shape[3], spec.blocks * FILTERS),
        steps * (8 * spec.tiles + 60), chunks,
    )  # fmt: skip


def _input(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    channels, filter_blocks = plan.input_shape[1], plan.index.shape[0] // FILTERS
    sets, kept = ceil(channels / spec.channels), _kept(plan)
    of_pattern = kept / len(plan.pool) / sets  # channels
    jobs = len(plan.pool) * ceil(of_pattern / (8 * spec.columns))  # of a block of filters
    columns = ceil(of_pattern / 8) / max(1, ceil(of_pattern / (8 * spec.columns)))
    additions = 10 * spec.tiles * columns
    job = spec.entries * (spec.tiles * max(4.0, 2 * columns) + 2 * columns) + additions
    alone = spec.entries * (8 * spec.tiles * columns + 60) + 3 * additions + 200
    weights = FILTERS * filter_blocks * kept / sets * spec.entries * (2 / BYTES_PER_CYCLE + 0.04)
    return Cost(
        _places(spec, plan) * sets, filter_blocks * jobs * spec.parts * job,
        FILTERS * filter_blocks * _copy_cycles(spec.input) + weights,
        _write_cycles(spec, plan.input_shape[3], spec.channels),
        filter_blocks * ceil(jobs / (spec.warps // spec.parts)) * alone, ceil(filter_blocks / spec.blocks),
    )  # fmt: skip


def _values(spec: TensorSpec, plan: Plan, limits: Limits) -> Cost:
    assert spec.output is not None
    filter_blocks, channels = plan.index.shape[0] // FILTERS, plan.input_shape[1]
    chunks, room = ceil(channels / spec.input.channels), spec.warps // spec.parts
    steps = max(1, ceil(_kept(plan) * spec.entries / (chunks * STEP) + 0.3))
    jobs = spec.blocks * ceil(steps / spec.tiles)
    pieces = ceil(filter_blocks / spec.blocks) * chunks * ceil(jobs / room)
    walks, splits = value_splits(pieces, spec, plan, limits)
    turns, pairs, of_job = ceil(walks / splits), ceil(spec.positions / 2), min(spec.tiles, steps)
    partial = 2 * 4 * plan.values_shape[0] * spec.entries * splits * spec.parts  # bytes, written and read
    return Cost(
        pieces * splits, turns * min(room, jobs) * pairs * (5.2 * of_job + 6),
        turns * (spec.input.channels * _copy_cycles(spec.input) + spec.output.channels * _copy_cycles(spec.output)),
        partial / BYTES_PER_CYCLE / (pieces * splits), turns * ceil(pairs / spec.parts) * (16 * of_job + 60), turns,
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
    partial = 2 if spec.rect[1] < min(STEP, width) else 1
    return partial * 2 * spec.positions * channels * IMAGES / BYTES_PER_CYCLE


def _copy_cycles(tile: Tile) -> float:
    """Return about how many cycles of a multiprocessor the copy of one channel takes."""
    words = tile.groups * tile.copied[0] * tile.copied[1]
    return words * (2 * IMAGES * tile.width / BYTES_PER_CYCLE + 0.3)


def resident(spec: TensorSpec, limits: Limits) -> int:
    """Return how many blocks of threads share a multiprocessor."""
    return max(1, min(RESIDENT_WARPS // spec.warps, limits.shared_bytes // spec.shared_bytes))


def value_splits(pieces: int, spec: TensorSpec, plan: Plan, limits: Limits) -> tuple[int, int]:
    """Return how many steps a walk over all positions has, and into how many shares it is divided."""
    rects = Geometry.forward(plan).rects(spec.rect)
    walks = rects[0] * rects[1] * ceil(plan.input_shape[0] / (IMAGES * spec.input.groups))
    wanted = resident(spec, limits) * limits.multiprocessors // max(1, pieces)
    return walks, max(1, min(walks, wanted))
