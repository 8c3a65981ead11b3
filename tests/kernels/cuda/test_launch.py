"""What reaches CuPy, seen by a stand-in for it: argument types, shared memory, device and stream."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from clicktrain.kernels.cuda import launch


class Kernel:
    max_dynamic_shared_size_bytes = 0

    def __init__(self, log):
        self.log = log

    def __call__(self, grid, block, arguments, *, shared_mem):
        self.log.append((grid, block, arguments, shared_mem, self.max_dynamic_shared_size_bytes))


@pytest.fixture
def log(monkeypatch):
    """Put a stand-in in CuPy's place that writes down what it is asked for."""
    entries = []

    class Module:
        def __init__(self, code, options, backend):
            entries.append(("module", code, options, backend))

        def get_function(self, name):
            entries.append(("function", name))
            return Kernel(entries)

    def context(name):
        def enter(*arguments):
            entries.append((name, *arguments))
            return contextlib.nullcontext()

        return enter

    cuda = types.SimpleNamespace(Device=context("device"), ExternalStream=context("stream"), Stream=object)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, RawModule=Module))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    caches = (launch._function, launch._module, launch._stream)
    for cache in caches:
        cache.cache_clear()
    yield entries
    for cache in caches:
        cache.cache_clear()


def test_a_launch(log):
    x = torch.zeros(4)
    for _ in range(2):
        launch.CupyLauncher().launch("text", "convolve", 5, 64, 100_000, (x, None, 7))
    assert log[0] == ("device", 3)
    assert log[1] == ("stream", 77, 3)
    assert log[2] == ("module", "text", ("--std=c++17",), "nvrtc")
    assert log[3] == ("function", "convolve")
    grid, block, arguments, shared, allowed = log[4]
    assert (grid, block, shared, allowed) == ((5,), (64,), 100_000, 100_000)
    assert [type(a) for a in arguments] == [np.uint64, np.uint64, np.int32]
    assert [int(a) for a in arguments] == [x.data_ptr(), 0, 7]
    assert [entry for entry in log if entry[0] in ("module", "function")] == log[2:4]  # compiled once


def test_little_shared_memory_needs_no_permission(log):
    launch.CupyLauncher().launch("text", "arrange", 1, 256, 0, (torch.zeros(1),))
    assert log[-1][3:] == (0, 0)


def test_a_stream_of_torch_by_the_protocol():
    assert launch._TorchStream(99).__cuda_stream__() == (0, 99)
