"""The filter-kernel reorder: every kernel once, warps even, windows shared as far as filters agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clicktrain.assignment import assign
from clicktrain.kernels import plan
from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import layout
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
    numbers = made.words[..., 2 + spec.task_filters :]
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(len(LAYER.kernels.filters)))
    assert made.words.shape[1:] == (spec.tasks, spec.warps, spec.task_words)
    assert (made.pieces[:, 0] % spec.filters == 0).all()
    assert (made.pieces[:, 1] % spec.channels == 0).all()
