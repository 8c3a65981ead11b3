"""From a plan to the arrays and functions of the gradient of the values (`struct Gradient`)."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from clicktrain.errors import BackendUnavailable
from clicktrain.kernels.cpu import accumulators, codegen
from clicktrain.kernels.cpu.accumulators import PIXELS, AccumulatorSpec, by_register, merged, taps_by_pixel
from clicktrain.kernels.cpu.codegen import LANES
from clicktrain.kernels.cpu.layer import Integers, Layer, stable_order
from clicktrain.kernels.cpu.library import Gradient, cache_bytes, instruction_set
from clicktrain.kernels.cpu.passes import Prepared, addresses, warn_once

TASK_SUMS, TASKS_PER_THREAD = 1 << 13, 4
"""Sums of a task, 256 KB, and the most tasks of a thread. Every task reads all of dy once, so that there should be few,
but the second-level cache should hold the sums of a task besides a chunk of dy."""
CHUNK_BYTES = 1 << 20
"""Of dy: with smaller chunks the sums are loaded and stored too often."""
STRAIGHT_PIXELS = 16
"""Of an output: up to so many, the code for it has no loops over pixels. So small planes are not fetched ahead either,
and a chunk must lie in half of the second-level cache, beside the input and the sums."""
RUN = 6
"""Kernels of one channel and pattern that a part of the filters should have at least: as many as share registers."""


def prepare_gradient(layer: Layer, blocks: int) -> Prepared:
    """Lay out the gradient of the values of a forward pass: kernels by part, channel, pattern and filter.

    A part is so many filters that those of one thread fit its caches together with its share of the result.
    """
    parts = _parts(layer, blocks)
    chunk = _chunk_vectors(layer) // -(-layer.filters // parts)  # whatever the threads: each end adds halves of pairs
    part = -(-layer.filters // max(parts, min(torch.get_num_threads(), _most_parts(layer))))
    kernels = layer.kernels
    channels = kernels.filters // part * layer.channels + kernels.channels  # of each part, one after the other
    runs = channels * len(layer.patterns) + kernels.patterns
    order = stable_order(runs, -(-layer.filters // part) * layer.channels * len(layer.patterns))
    kernels, channels = kernels[order], channels[order]
    starts = np.flatnonzero(np.diff(runs[order], prepend=-1))
    (out_h, out_w), (in_h, in_w) = layer.out_size, layer.in_size
    made = Prepared(Gradient(
        blocks=blocks, channels=layer.channels, in_h=in_h, in_w=in_w, filters=layer.filters, out_h=out_h, out_w=out_w,
        stride_h=layer.stride[0], stride_w=layer.stride[1], pad_h=layer.padding[0], pad_w=layer.padding[1],
        kernel_size=layer.kernel_size, entries=layer.entries, tasks=_tasks(layer),
        chunk_blocks=max(1, min(blocks, chunk // (out_w * out_h))),
        chunk_rows=out_h if _is_straight(layer) else max(1, min(out_h, chunk // out_w)),
    ), {})  # fmt: skip
    arrays = {
        "task_starts": _task_starts(channels[starts], starts, len(kernels.filters), made.structure.tasks),
        "run_starts": np.append(starts, len(kernels.filters)),
        "run_channels": kernels.channels[starts],
        "run_patterns": kernels.patterns[starts],
        "kernel_filters": kernels.filters,
        "kernel_ids": kernels.numbers,
        "positions": np.array(layer.patterns),
    }
    for name, array in arrays.items():
        made.add(name, np.ascontiguousarray(array, np.int32))
    if _gains_from_code(layer):
        _add_accumulators(made, layer)
    return made


def _gains_from_code(layer: Layer) -> bool:
    """Tell whether specialised accumulators are faster than generic ones.

    Of 1x1 layers on an Intel Xeon (family 6, model 85) they are: 1.05 to 1.19x under AVX2, 1.19 to 1.33x with pairs of
    pixels; but 0.93 to 0.98x where each row of 7 pixels leaves half a pair.
    """
    if len(layer.patterns) > codegen.MAX_PATTERNS:
        return False
    return layer.kernel_size > 1 or layer.out_size[1] % PIXELS[instruction_set()] == 0


def _is_straight(layer: Layer) -> bool:
    return math.prod(layer.out_size) <= STRAIGHT_PIXELS


def _chunk_vectors(layer: Layer) -> int:
    """Return the vectors of dy in a chunk."""
    return (cache_bytes(2) // 2 if _is_straight(layer) else CHUNK_BYTES) // (4 * LANES)


def _parts(layer: Layer, blocks: int) -> int:
    """Return so many parts of small images that one's dy is one chunk, if runs stay long enough.

    Then no sums are loaded and stored: 1.0 to 1.4x with 4 x 4 pixels and 64 or 128 images on a family 25, model 17
    EPYC. Larger images, whose chunks hold more work, gained it in places and lost as much in others.
    """
    if not _is_straight(layer):
        return 1
    vectors = blocks * layer.filters * math.prod(layer.out_size)
    return min(-(-vectors // _chunk_vectors(layer)), _most_parts(layer))


def _most_parts(layer: Layer) -> int:
    """Return the parts that leave runs long enough."""
    run = len(layer.kernels.filters) / max(1, layer.channels * len(layer.patterns))
    return max(1, int(run / RUN))


def _tasks(layer: Layer) -> int:
    threads = torch.get_num_threads()
    sums = len(layer.kernels.filters) * layer.entries // threads
    return threads * max(1, min(TASKS_PER_THREAD, sums // TASK_SUMS))


def _task_starts(channels: Integers, run_starts: Integers, kernels: int, tasks: int) -> Integers:
    """Cut the runs into tasks of about equally many kernels, between channels."""
    new_channel = np.flatnonzero(np.diff(channels, prepend=-1))
    wanted = np.arange(tasks) * kernels / tasks
    cut = np.append(new_channel, len(channels))[np.searchsorted(run_starts[new_channel], wanted)]
    return np.append(cut, len(channels))


def _add_accumulators(made: Prepared, layer: Layer) -> None:
    """Let a gradient use specialised accumulators, compiled if need be and possible."""
    axes = zip(layer.out_size, layer.in_size, layer.stride, layer.padding, strict=True)
    rows, pixels = (taps_by_pixel(o, i, layer.kernel_size, s, p) for o, i, s, p in axes)
    columns = by_register(pixels, instruction_set())
    (row_classes, row_ends), (column_classes, column_ends) = merged(rows), merged(columns)
    facts = (instruction_set(), layer.kernel_size, layer.patterns, layer.stride)
    if _is_straight(layer):
        spec = AccumulatorSpec(*facts, rows, columns, layer.in_size[1])
    else:
        spec = AccumulatorSpec(*facts, row_classes, column_classes)
    try:
        found = _addresses(spec)
    except BackendUnavailable as error:
        warn_once(str(error))
        return
    made.add("accumulators", np.array(found, np.uint64))
    made.add("row_ends", np.array(row_ends, np.int32))
    made.add("column_ends", np.array(column_ends, np.int64) * len(columns[0]) * LANES)
    made.structure.most_filters = spec.filters


@cache
def _addresses(spec: AccumulatorSpec) -> list[int]:
    return addresses(accumulators.library(spec), "clicktrain_accumulate", len(spec.patterns) * spec.filters)
