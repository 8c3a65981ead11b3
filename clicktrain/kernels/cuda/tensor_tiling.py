"""How a function is cut up for tensor cores: rectangles of pixels, chunks of channels, warps of a block."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, gcd
from weakref import WeakKeyDictionary

from clicktrain.kernels.cuda.codegen import Dtype, Pair
from clicktrain.kernels.cuda.tensor_estimate import estimate, row_bytes
from clicktrain.kernels.cuda.tensor_geometry import Geometry, following, read_width
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, RESIDENT_WARPS, UNIT_BYTES, TensorSpec, Tile
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan
from clicktrain.patterns import PRUNED

MOST_TILES = 16
"""8-column tiles of a warp: 64 sums of a lane, which leaves room for all else in 128 registers."""
MOST_OF_JOB = 8
"""The same for a job of the input gradient, whose sums come and go by way of other registers."""
MOST_COLUMNS = 3
"""Tiles of 8 channels of a job: each number up to it is compiled."""
POSITIONS = (128, 64, 32, 16)
"""At most so many are in shared memory for the gradient of the values."""
MOST_CHANNELS = 64
"""Of a chunk."""


def forward_spec(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> TensorSpec:
    """Choose how the forward pass is cut up: the candidate with the smallest estimated time."""
    return _best(forward_candidates(plan, dtype, limits, batch_last), plan, limits)


def input_spec(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> TensorSpec:
    """Choose how the input gradient is cut up."""
    return _best(input_candidates(plan, dtype, limits, batch_last), plan, limits)


def values_spec(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> TensorSpec:
    """Choose how the gradient of the values is cut up."""
    return _best(values_candidates(plan, dtype, limits, batch_last), plan, limits)


def _best(candidates: list[TensorSpec], plan: Plan, limits: Limits) -> TensorSpec:
    return for_one_size(min(candidates, key=lambda spec: estimate(spec, plan, limits)), plan)


def for_one_size(spec: TensorSpec, plan: Plan) -> TensorSpec:
    """Return the specification with the sizes of a plan in the text, where they save instructions."""
    x, y = plan.input_shape[1:], (plan.index.shape[0], *plan.output_shape[2:])
    source, target = (y, x) if spec.function == "grad_input" else (x, y)
    whole = plan.input_shape[0] % (IMAGES * spec.input.groups) == 0
    made = replace(spec, input=replace(spec.input, image=source), target=target, whole_groups=whole)
    return replace(made, output=replace(spec.output, image=y)) if spec.output else made


def forward_candidates(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> list[TensorSpec]:
    """Return the ways to cut up the forward pass that are worth a thought."""
    geometry, filter_blocks = Geometry.forward(plan, batch_last), plan.index.shape[0] // FILTERS
    found = []
    for warps, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (16, 8, 4, 2)):
        if blocks > min(warps, filter_blocks) or warps % blocks:
            continue
        parts = warps // blocks
        for rect, groups in geometry.cuts(parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "forward", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1),
                vector=_vector(geometry, rect, tiles), batch_last=batch_last,
            )  # fmt: skip
            found += _with_channels(spec, plan, limits)
    return found


def input_candidates(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> list[TensorSpec]:
    """Return the ways to cut up the input gradient that are worth a thought."""
    geometry, found = Geometry.transposed(plan, batch_last), []
    filter_blocks, all_buffers = plan.index.shape[0] // FILTERS, (2, 3, 4) if batch_last else (2,)
    for warps, parts, tiles, blocks, buffers in product(
        _warps(limits), (16, 8, 4, 2, 1), (8, 4, 2, 1), (4, 2, 1), all_buffers
    ):
        if parts > warps or warps % parts or blocks > filter_blocks or (buffers - 1) * blocks > filter_blocks:
            continue
        for rect, groups in geometry.cuts(2 * parts * tiles, plan.input_shape[0]):
            spec = TensorSpec(
                "grad_input", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, FILTERS * blocks),
                vector=_vector(geometry, rect, 2 * parts * tiles), buffers=buffers, batch_last=batch_last,
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
            columns = max(
                1, min(MOST_OF_JOB // spec.tiles, MOST_COLUMNS, ceil(_of_pattern(plan) * even / channels / 8))
            )
            made = replace(spec, channels=even, columns=columns)
            kept = _most_kept(plan, even)
            jobs = min(len(plan.pool), kept) + kept // (8 * columns)  # at most
            if made.shared_bytes + made.weight_bytes(kept) + made.job_bytes(jobs) <= limit:
                found.append(made)
                break
            most = even - 1
    return found


def _of_pattern(plan: Plan) -> float:
    """Return how many channels of a block of filters keep a pattern, on average."""
    return plan.values_shape[0] / (plan.index.shape[0] * len(plan.pool))


_kept: WeakKeyDictionary[Plan, dict[int, int]] = WeakKeyDictionary()


def _most_kept(plan: Plan, channels: int) -> int:
    """Return the most kernels that a filter keeps among the channels of a set."""
    known = _kept.setdefault(plan, {})
    if channels not in known:
        kept, starts = (plan.index[::FILTERS] != PRUNED).numpy(), range(0, plan.index.shape[1], channels)
        known[channels] = max(int(kept[:, start : start + channels].sum(1).max()) for start in starts)
    return known[channels]


def values_candidates(plan: Plan, dtype: Dtype, limits: Limits, batch_last: bool = False) -> list[TensorSpec]:
    """Return the ways to cut up the gradient of the values that are worth a thought."""
    geometry, filters = Geometry.forward(plan, batch_last), plan.index.shape[0]
    found = []
    cuts = sorted({cut for most in POSITIONS for cut in geometry.cuts(most, plan.input_shape[0])})
    all_tiles = (6, 2) if batch_last else (6, 4, 2)
    for warps, parts, blocks, tiles in product(_warps(limits), (8, 4, 2, 1), (8, 4, 2, 1), all_tiles):
        if parts > warps or warps % parts or blocks > filters // FILTERS:
            continue
        for rect, groups in cuts:
            spec = TensorSpec(
                "grad_values", dtype, plan.pool.entries, warps, blocks, parts, tiles, rect, geometry.stride,
                geometry.padding, geometry.tile(rect, groups, 1), _output_tile(geometry, rect, groups, blocks),
                batch_last=batch_last,
            )  # fmt: skip
            found += _with_channels(spec, plan, limits)
    return found


def _output_tile(geometry: Geometry, rect: Pair, groups: int, blocks: int) -> Tile:
    """Return the tile of dy: all units that a pair of positions reads, at odd pitches."""
    pixels = rect[0] * rect[1]
    group_pitch = geometry.group_pitch(pixels + pixels * groups % 2, groups) if geometry.batch_last else pixels
    units = groups * group_pitch
    width = 1 if geometry.batch_last else read_width(gcd(geometry.target[1], rect[1]), rect[1])
    whole = (rect[0] >= geometry.target[0], rect[1] >= geometry.target[1])
    return Tile(
        blocks * FILTERS, groups, rect, rect[1], group_pitch, following(units + units % 2, 1, 2),
        (rect[0], rect[1] // width), whole, width,
    )  # fmt: skip


def _with_channels(spec: TensorSpec, plan: Plan, limits: Limits) -> list[TensorSpec]:
    """Return the specification with as many channels in a chunk as fit into shared memory once, twice, or 4 times.

    Where the forward pass has all channels in one chunk, one buffer may be enough: other blocks of threads compute
    while it is filled. With two the next view is copied meanwhile; batch last, more of them bring more bytes on their
    way. Each chunk costs a barrier, so that few large ones come first.
    """
    found, channels, forward = [], plan.input_shape[1], spec.function == "forward"
    many = () if not spec.batch_last else (3, 4, 6) if forward else (3,)
    for resident, buffers in product((1, 2, 4), (*((1,) if forward else ()), 2, *many)):
        if resident > 1 and resident * spec.warps > RESIDENT_WARPS:
            continue
        parts = (1, 2, max(1, buffers - 1)) if forward else (1,)
        for wanted in sorted({MOST_CHANNELS, *(ceil(channels / part) for part in parts)}, reverse=True):
            made = _with_chunks(replace(spec, buffers=buffers), wanted, plan, limits, resident)
            found += [one for one in made if buffers > 1 or one.input.channels == channels]
    return list(dict.fromkeys(found))


def _with_chunks(spec: TensorSpec, most: int, plan: Plan, limits: Limits, resident: int) -> list[TensorSpec]:
    """Return the specification with chunks of even size, at most so many channels, that fit; none if none does."""
    channels, limit = plan.input_shape[1], limits.shared_of(resident)
    fixed = UNIT_BYTES * (spec.zeros + spec.buffers * (spec.output.units if spec.output else 0))
    most = min(most, channels, (limit - fixed) // (UNIT_BYTES * spec.buffers * spec.input.channel_pitch))
    while most >= 1:
        even = ceil(channels / ceil(channels / most))
        made = _with_rows(replace(spec, input=replace(spec.input, channels=even)), plan, limits)
        if made.shared_bytes + (row_bytes(made, plan) if spec.function == "forward" else 0) <= limit:
            return [made]
        most = even - 1
    return []


def _with_rows(spec: TensorSpec, plan: Plan, limits: Limits) -> TensorSpec:
    """Return the specification of the forward pass with the rows of all chunks at once, if a block has room for them.

    Whether other blocks of threads then find room is not asked: to wait for weights in each chunk costs more.
    """
    made = replace(spec, all_rows=spec.function == "forward")
    fits = made.all_rows and made.shared_bytes + row_bytes(made, plan) <= limits.shared_bytes
    return made if fits else spec


def _warps(limits: Limits) -> list[int]:
    return sorted({min(w, limits.warps) for w in (16, 8, 4)}, reverse=True)


def _vector(geometry: Geometry, rect: Pair, positions: int) -> int:
    """Return how many neighbouring pixels of a rectangle can be written at once: of a row, or of several whole ones."""
    rows, columns = geometry.target
    if geometry.batch_last:
        return 1
    for vector in (8, 4, 2):
        of_row = columns % vector == rect[1] % vector == 0
        of_rows = rect[1] == columns and rows % rect[0] == 0 == rect[0] * columns % vector
        if (of_row or of_rows) and positions % vector == 0:
            return vector
    return 1
