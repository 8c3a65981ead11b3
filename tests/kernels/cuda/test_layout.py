"""The filter-kernel reorder: every kernel once, warps even, windows shared as far as filters agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clicktrain.assignment import assign
from clicktrain.kernels import plan
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import gradient_tiling, layout, tiling
from clicktrain.patterns import official_pool
from tests.kernels.cases import Case
from tests.kernels.cuda.configurations import CONFIGURATIONS

USED = CONFIGURATIONS["squares"]
LAYER = Layer.forward(Case(official_pool(4), 21, 20, 2, (7, 8), (1, 1), (1, 1), 0.5, seed=1).plan())


def windows_loaded(program: layout.Program, kernels: int, spec) -> int:
    """Return the places in all programs: windows that are loaded, one for each record."""
    heads = 2 * spec.warps * (len(program.bounds) - 1)
    words = program.words
    runs = sum(1 for word in words[words >= 0] if word >= 1 << 16)
    ends = int((words == -1).sum())
    return len(words) - heads - runs - ends


def test_every_value_is_used_once_and_every_filter_has_a_slot():
    spec = USED.convolution(LAYER, "float32")
    made = layout.program(LAYER, spec)
    assert sorted(made.gather.tolist()) == list(range(len(LAYER.kernels.filters) * spec.entries))
    assert sorted(made.filter_of_slot[made.filter_of_slot >= 0].tolist()) == list(range(21))
    assert made.bounds[-1].tolist() == [len(made.words), len(made.gather)]


def test_filters_go_by_length():
    spec = CONFIGURATIONS["odd entries, stride 3"].convolution(LAYER, "float32")  # one slot: no partners
    lengths = np.bincount(LAYER.kernels.filters, minlength=21)[layout.order_filters(LAYER, spec)]
    assert (np.diff(lengths) <= 0).all()


@pytest.mark.parametrize(("share", "windows"), [(1, None), (2, 0.5)])
def test_filters_with_the_same_kernels_share_windows(share, windows):
    shared = assign(torch.rand(20, 16, 3, 3), official_pool(4), 160, share_filters=share)
    layer = Layer.forward(plan(shared, input_shape=(1, 16, 8, 8), padding=1))
    spec = USED.convolution(layer, "float32")
    loaded = windows_loaded(layout.program(layer, spec), 160, spec)
    if windows is None:
        assert 80 < loaded < 160  # some agree by chance
    else:
        assert loaded == 160 * windows


def test_tasks_hold_every_kernel_once():
    spec = USED.gradient(LAYER, "float32")
    made = layout.tasks(LAYER, spec)
    patterns, numbers = made.words[..., 1::3], made.words[..., 3::3]
    assert sorted(numbers[patterns >= 0].tolist()) == list(range(len(LAYER.kernels.filters)))
    assert (patterns[made.words[..., 0] < 0] < 0).all()
    assert made.words.shape[1:] == (spec.tasks, spec.warps, spec.task_words)
    assert (made.pieces[:, 0] % spec.filters == 0).all()
    assert (made.pieces[:, 1] % spec.channels == 0).all()


def test_warps_get_tasks_of_about_the_same_size():
    layer = Layer.forward(Case(official_pool(4), 32, 24, 2, (8, 8), (1, 1), (1, 1), 0.3, seed=2).plan())
    spec = gradient_tiling.cut(layer, "float32", (4, 4), 1, (2, 2, 2), 4, 4, 8, tiling.Limits(227 << 10, 132))
    made = layout.tasks(layer, spec)
    kernels = (made.words[..., 1::3] >= 0).sum((1, 3))  # of each piece and warp
    assert (kernels.max(1) <= 1.2 * kernels.mean(1)).all()


def test_runs_are_cut_evenly():
    keys = np.array([[0]] * 9 + [[1]] * 3 + [[2]] * 8)
    part, place = layout._cut(keys, 8)
    assert part.tolist() == [0] * 5 + [1] * 4 + [2] * 3 + [3] * 8
    assert place.tolist() == [*range(5), *range(4), *range(3), *range(8)]


def waiting(loads, order, size):
    """Return by how much longer a block takes than its warps work on average, with barriers between chunks."""
    chunks = -(-loads.shape[2] // size)
    ordered = np.take_along_axis(loads, order[:, None], 2)
    slowest = sum(ordered[:, :, c * size : (c + 1) * size].sum(2).max(1) for c in range(chunks))
    return slowest.sum() / loads.sum(2).mean(1).sum()


def test_channels_are_ordered_so_that_warps_wait_little():
    loads = (np.random.default_rng(0).random((3, 16, 130)) < 0.28).astype(np.int64)
    order = layout.order_channels(loads, 20)
    assert (np.sort(order) == np.arange(130)).all()
    by_number = np.tile(np.arange(130), (3, 1))
    assert waiting(loads, by_number, 20) > 1.6
    assert waiting(loads, order, 20) < 1.3


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 4, 20)])
def test_any_number_of_channels_can_be_ordered(shape):
    order = layout.order_channels(np.ones(shape, np.int64), 20)
    assert (np.sort(order) == np.arange(shape[2])).all()


def test_a_long_filter_shares_its_warp_with_a_short_one():
    assert layout._long_with_short(np.array([4, 2, 0, 1, 3])).tolist() == [4, 3, 2, 1, 0]
    assert layout._long_with_short(np.array([4, 2, 0, 1])).tolist() == [4, 1, 2, 0]
