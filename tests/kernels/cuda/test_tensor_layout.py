"""What the tensor-core kernels read beside the operands: rows, blocks and jobs, and their order."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from clicktrain.kernels.cuda import tensor_estimate, tensor_layout, tensor_tiling
from tests.kernels.cuda.shared import CASE, SHARED, SQUARES, USED, SharedCase


def test_every_value_has_one_row():
    made, spec = CASE.plan(), USED.forward_spec(None, "float16", None)
    rows = tensor_layout.rows(made, spec.input)
    assert (rows.bounds % 16 == 0).all()
    assert ((rows.offsets < 0) == (rows.places < 0)).all()
    kept = [p + f * s for (first, last), s in zip(rows.bounds[:, [0, -1]], rows.strides, strict=True)
            for p in rows.places[first:last] if p >= 0 for f in range(16)]  # fmt: skip
    assert sorted(kept) == list(range(made.values_shape[0] * made.values_shape[1]))
    assert rows.offsets.max() < spec.input.units


@pytest.mark.parametrize("together", [1, 2, 4])
def test_rows_of_a_set_of_blocks_are_neighbours(together):
    made, tile = CASE.plan(), USED.forward_spec(None, "float16", None).input
    rows, alone = tensor_layout.rows(made, tile, together), tensor_layout.rows(made, tile)
    chunks = alone.bounds.shape[1] - 1
    assert rows.bounds.shape == (-(-5 // together), chunks * together + 1)
    assert (rows.bounds[1:, 0] == rows.bounds[:-1, -1]).all()
    assert rows.bounds[-1, -1] == len(rows.places) == 16 * len(rows.step_strides)
    for number, chunk in product(range(5), range(chunks)):
        in_set = chunk * together + number % together
        (first, end), (begin, last) = rows.bounds[number // together, in_set:][:2], alone.bounds[number, chunk:][:2]
        for found, wanted in ((rows.places, alone.places), (rows.offsets, alone.offsets)):
            assert (found[first:end] == wanted[begin:last]).all()
        assert (rows.step_strides[first // 16 : end // 16] == rows.strides[number]).all()
    of_chunk = np.diff(rows.bounds[:, ::together]) // 16
    most = tensor_layout.most_steps(made, tile.channels, together)
    assert most == (of_chunk.max(), of_chunk.sum(1).max())


def test_blocks_of_threads_walk_over_several_views():
    spec = USED.forward_spec(None, "float16", None)
    walks, splits = tensor_estimate.walks_and_splits(3, spec, CASE.plan(), SHARED)
    assert 1 < splits < walks
    assert walks % splits  # and several chunks of channels
    assert spec.input.channels < 17


def test_kernels_are_ordered_against_bank_conflicts():
    kernels = [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3)), (2, (4, 5, 6, 7)), (3, (12, 13, 14, 15))]
    ordered = tensor_layout.without_conflicts(kernels)
    assert sorted(ordered) == kernels
    for first, second in (ordered[:2], ordered[2:]):
        assert len({place % 8 for place in first[1] + second[1]}) == 8
    alone = [(0, (0, 1, 2)), (1, (5, 6, 7))]  # three rows do not divide eight: left as they are
    assert tensor_layout.without_conflicts(alone) == alone
    made = SharedCase(SQUARES, 16, 64, 8, (8, 8), (1, 1), (1, 1), 0.5, seed=1).plan()
    rows = tensor_layout.rows(made, tensor_tiling.Geometry.forward(made).tile((2, 8), 1, 64)).offsets
    eights = [rows[k : k + 8] for k in range(0, len(rows), 8) if (rows[k : k + 8] >= 0).all()]
    assert sum(len(set((eight % 8).tolist())) == 8 for eight in eights) > 0.7 * len(eights)


def test_channels_are_ordered_against_bank_conflicts():
    members = [(channel, number) for number, channel in enumerate((0, 1, 4, 5, 8, 10, 13, 15, 16, 20, 21))]
    ordered = tensor_layout.spread_over_banks(members)
    assert sorted(ordered) == members
    assert {channel % 4 for channel, _ in ordered[:4]} == {0, 1, 2, 3}
    assert [len({channel % 4 for channel, _ in ordered[start : start + 4]}) for start in (4, 8)] == [2, 2]


def test_jobs_hold_every_kernel_once():
    made, spec = CASE.plan(), USED.input_spec(None, "float16", None)
    jobs = tensor_layout.input_jobs(made, spec)
    columns = 8 * spec.columns
    # The tap at the lower right of a kernel is the first one of the rotated kernel: pixels look back.
    rotated = tensor_layout.tap_places(SQUARES.rotated(), spec.input)
    patterns = {tuple(places[::-1]): number for number, places in enumerate(rotated)}
    for number, block in enumerate(tensor_layout.blocks(made)):
        found = []
        for part, first in enumerate(range(0, 17, spec.channels)):
            start, kernels = jobs.kernels[part, number]
            assert start == (block.base + sum(c < first for c in block.channels)) * 4
            for word in jobs.words[jobs.bounds[part, number] : jobs.bounds[part, number + 1]]:
                tiles, taps, channels, places = word[0], word[1:5], word[5 : 5 + columns], word[5 + columns :]
                found += [(first + c, patterns[tuple(taps)]) for c in channels if c >= 0]
                assert 8 * tiles >= (channels >= 0).sum() > 8 * (tiles - 1)
                assert places.max() < kernels
        assert sorted(found) == list(zip(block.channels, block.patterns, strict=True))
