"""How a function is cut up for tensor cores: rectangles of pixels, chunks of channels, warps of a block."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from math import ceil, gcd

from clicktrain.kernels.cuda.codegen import Dtype, Pair
from clicktrain.kernels.cuda.tensor_estimate import estimate
from clicktrain.kernels.cuda.tensor_geometry import Geometry, following, read_width
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, RESIDENT_WARPS, UNIT_BYTES, TensorSpec, Tile
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan
from clicktrain.patterns import PRUNED

MOST_TILES = 16
"""8-column tiles of a warp: 64 sums of a lane, which leaves room for all else in 128 registers."""
MOST_COLUMNS = 4
"""Tiles of 8 channels of a job: each number up to it is compiled."""
POSITIONS = (128, 64, 32, 16)
"""At most so many are in shared memory for the gradient of the values."""
MOST_CHANNELS = 64
"""Of a chunk."""


def forward_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the forward pass is cut up: the candidate with the smallest estimated time."""
    return _for_one_size(
        min(forward_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits)), plan
    )


def input_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the input gradient is cut up."""
    return _for_one_size(
        min(input_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits)), plan
    )


def values_spec(plan: Plan, dtype: Dtype, limits: Limits) -> TensorSpec:
    """Choose how the gradient of the values is cut up."""
    return _for_one_size(
        min(values_candidates(plan, dtype, limits), key=lambda spec: estimate(spec, plan, limits)), plan
    )


def _for_one_size(spec: TensorSpec, plan: Plan) -> TensorSpec:
    """Return the specification with the sizes of a plan in the text, where they save instructions."""
    x, y = plan.input_shape[1:], (plan.index.shape[0], *plan.output_shape[2:])
    source, target = (y, x) if spec.function == "grad_input" else (x, y)
    whole = plan.input_shape[0] % (IMAGES * spec.input.groups) == 0
    made = replace(spec, input=replace(spec.input, image=source), target=target, whole_groups=whole)
    return replace(made, output=replace(spec.output, image=y)) if spec.output else made


def forward_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the forward pass that are worth a thought."""
    geometry, filter_blocks, found = Geometry.forward(plan), plan.index.shape[0] // FILTERS, []
    for warps, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (16, 8, 4, 2)):
        if blocks > min(warps, filter_blocks) or warps % blocks:
            continue
        parts = warps // blocks
        for rect, groups in geometry.cuts(parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "forward", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1),
                vector=_vector(geometry, rect, tiles),
            )  # fmt: skip
            found += _with_channels(spec, plan.input_shape[1], limits)
    return found


def input_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the input gradient that are worth a thought."""
    geometry, found = Geometry.transposed(plan), []
    for warps, parts, tiles, blocks in product(_warps(limits), (8, 4, 2, 1), (8, 4, 2, 1), (4, 2, 1)):
        if parts > warps or warps % parts or blocks > plan.index.shape[0] // FILTERS:
            continue
        for rect, groups in geometry.cuts(2 * parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "grad_input", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, FILTERS * blocks),
                vector=_vector(geometry, rect, 2 * parts * tiles),
            )  # fmt: skip
            found += _with_sums(spec, plan, limits)
    return found


def _with_sums(spec: TensorSpec, plan: Plan, limits: Limits) -> list[TensorSpec]:
    """Return the specification with sums of as many channels as fit into shared memory once, twice, or 4 times.

    The weights are those of the channels that a block of filters keeps, which is taken to be even over the channels
    and checked.
    """
    channels, most_kept = plan.input_shape[1], _most_kept(plan, plan.input_shape[1])
    of_channel = replace(spec, channels=1).shared_bytes - spec.shared_bytes
    of_channel += ceil(spec.weight_bytes(most_kept) / channels)
    found = []
    for resident in (1, 2, 4):
        limit = limits.shared_bytes // resident
        if resident > 1 and resident * spec.warps > RESIDENT_WARPS:
            continue
        most = min(channels, (limit - spec.shared_bytes) // of_channel)
        while most >= 1:
            even = ceil(channels / ceil(channels / most))
            columns = max(1, min(MOST_TILES // spec.tiles, MOST_COLUMNS, ceil(_of_pattern(plan) * even / channels / 8)))
            made = replace(spec, channels=even, columns=columns)
            if made.shared_bytes + made.weight_bytes(_most_kept(plan, even)) <= limit:
                found.append(made)
                break
            most = even - 1
    return found


def _of_pattern(plan: Plan) -> float:
    """Return how many channels of a block of filters keep a pattern, on average."""
    return plan.values_shape[0] / (plan.index.shape[0] * len(plan.pool))


@cache
def _most_kept(plan: Plan, channels: int) -> int:
    """Return the most kernels that a filter keeps among the channels of a set."""
    kept = (plan.index[::FILTERS] != PRUNED).numpy()
    return max(int(kept[:, first : first + channels].sum(1).max()) for first in range(0, kept.shape[1], channels))


def values_candidates(plan: Plan, dtype: Dtype, limits: Limits) -> list[TensorSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought."""
    geometry, (filters, channels) = Geometry.forward(plan), plan.index.shape
    found = []
    for warps, parts, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (8, 4, 2, 1), (6, 4, 2)):
        if parts > warps or warps % parts or blocks > filters // FILTERS:
            continue
        cuts = {cut for most in POSITIONS for cut in geometry.cuts(most, plan.input_shape[0])}
        for rect, groups in sorted(cuts):
            spec = TensorSpec(
                "grad_values", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1), _output_tile(geometry, rect, groups, blocks),
            )  # fmt: skip
            found += _with_channels(spec, channels, limits)
    return found


def _output_tile(geometry: Geometry, rect: Pair, groups: int, blocks: int) -> Tile:
    """Return the tile of dy: all units that a pair of positions reads, at odd pitches."""
    positions = groups * rect[0] * rect[1]
    width = read_width(gcd(geometry.target[1], rect[1]), rect[1])
    whole = (rect[0] >= geometry.target[0], rect[1] >= geometry.target[1])
    return Tile(
        blocks * FILTERS, groups, rect, rect[1], rect[0] * rect[1], following(positions + positions % 2, 1, 2),
        (rect[0], rect[1] // width), whole, width,
    )  # fmt: skip


def _with_channels(spec: TensorSpec, channels: int, limits: Limits) -> list[TensorSpec]:
    """Return the specification with as many channels in a chunk as fit into shared memory once, twice, or 4 times.

    Where the forward pass has all channels in one chunk, one buffer is enough.
    """
    found = []
    for resident, single in product((1, 2, 4), (True, False)):
        if resident > 1 and resident * spec.warps > RESIDENT_WARPS:
            continue
        buffers = 1 if single and spec.function == "forward" else 2
        fixed = UNIT_BYTES * (spec.zeros + buffers * (spec.output.units if spec.output else 0))
        room = (limits.shared_bytes // resident - fixed) // (UNIT_BYTES * buffers * spec.input.channel_pitch)
        most = min(channels if single else MOST_CHANNELS, channels, room)
        if most < 1 or (buffers == 1 and most < channels):
            continue
        even = ceil(channels / ceil(channels / most))
        made = replace(spec, input=replace(spec.input, channels=even), buffers=buffers)
        if made.shared_bytes <= limits.shared_bytes // resident:
            found.append(made)
    return found


def _warps(limits: Limits) -> list[int]:
    return sorted({min(w, limits.warps) for w in (16, 8, 4)}, reverse=True)


def _vector(geometry: Geometry, rect: Pair, positions: int) -> int:
    """Return how many neighbouring pixels of a rectangle can be written at once: of a row, or of several whole ones."""
    rows, columns = geometry.target
    for vector in (8, 4, 2):
        of_row = columns % vector == rect[1] % vector == 0
        of_rows = rect[1] == columns and rows % rect[0] == 0 == rect[0] * columns % vector
        if (of_row or of_rows) and positions % vector == 0:
            return vector
    return 1
