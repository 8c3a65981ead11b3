"""Lays out passes by Winograd's transform: which filters share a channel, and the kernels' values at the points."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cpu.tiles import Choice

TILE = 4
"""Output pixels along each axis: F(4 x 4, 3 x 3)."""
FILTERS = 4
"""That are computed at once."""
CHANNELS = 128
"""Of a block, at most: their values at a point fill the first-level cache."""
FEW_CHANNELS, SMALL_PART, PART = 64, 32, 128
"""Filters whose products are transformed back before the next ones come; few, where a second-level cache can hold them
beside the transformed input. On a family 25, model 17 EPYC, over the best sweep: 64 channels at 32 x 32 pixels 1.38x
with parts of 16 or 32 filters, 1.33x with 64; 128 and 256 channels 1.14 to 1.32x with 16, 1.31 to 1.48x with 128."""
POINTS = np.array([
    [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
])  # fmt: skip
"""(6, 3) G: from three taps of a kernel to its values at the six points of an axis (Lavin & Gray, arXiv 1509.09308)."""


def applies(layer: Layer) -> bool:
    """Tell whether the transform exists for a pass: 3x3 taps, no stride."""
    return layer.kernel_size == 3 and layer.stride == layer.spread == (1, 1)


def part(layer: Layer) -> int:
    """Return how many filters are computed before their products are transformed back."""
    most = SMALL_PART if layer.channels <= FEW_CHANNELS else PART
    return min(most, -(-layer.filters // FILTERS) * FILTERS)


def choice(layer: Layer) -> Choice:
    """Return the only way to cut up a pass."""
    channels = max(1, layer.channels)
    blocks = -(-channels // CHANNELS)
    return Choice("winograd", (1, TILE, TILE), 1, -(-channels // blocks), 1)


def arrays(layer: Layer, channel_block: int) -> dict[str, NDArray[Any]]:
    """Return what `struct Pass` points to."""
    kernels, groups = layer.kernels, -(-layer.filters // FILTERS)
    block, channel = np.divmod(kernels.channels, channel_block)
    group, member = np.divmod(kernels.filters, FILTERS)
    lists, shape = block * groups + group, (-(-layer.channels // channel_block) * groups, channel_block)
    cell = lists * channel_block + channel
    kept = np.bincount(cell, 1 << member, shape[0] * shape[1]).astype(np.int64)  # the set of filters, as bits
    order = np.argsort(((lists << FILTERS) + kept[cell]) * channel_block + channel, kind="stable")
    kernels = kernels[order]
    cells = np.flatnonzero(kept)
    sets = (cells // channel_block << FILTERS) + kept[cells]
    runs = np.bincount(sets, minlength=shape[0] << FILTERS).reshape(shape[0], -1)[:, 1:]
    counts = np.stack([runs.sum(1), np.bincount(lists, minlength=shape[0])], axis=1)
    return {
        "starts": np.cumsum(counts, axis=0) - counts,
        "runs": runs.astype(np.uint16),
        "offsets": (cells[np.argsort(sets, kind="stable")] % channel_block).astype(np.int32),
        "gather": (kernels.numbers * layer.entries).astype(np.int32),
        "patterns": kernels.patterns.astype(np.uint8),
        "transforms": _transforms(layer).astype(np.float32),
    }


def _transforms(layer: Layer) -> NDArray[np.float64]:
    """Return (patterns, entries, 36): what each entry of a kernel adds to the points."""
    taps = np.array(layer.patterns)[:, :: -1 if layer.reversed else 1]
    rows, columns = POINTS.T[taps // 3], POINTS.T[taps % 3]
    outer: NDArray[np.float64] = rows[..., :, None] * columns[..., None, :]
    return outer.reshape(*taps.shape, -1)
