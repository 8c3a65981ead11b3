"""What reaches CuPy, seen by a stand-in for it: argument types, shared memory, device and stream."""

from __future__ import annotations

import ctypes
import sys
import types

import pytest
import torch

from clicktrain.kernels.cuda import launch
from clicktrain.kernels.cuda.tiling import Limits


class Kernel:
    """A kernel as CuPy loads it."""

    max_dynamic_shared_size_bytes = 0
    kernel = types.SimpleNamespace(ptr=4711)


@pytest.fixture
def log(monkeypatch):
    """Put a stand-in in CuPy's place that writes down what it is asked for."""
    entries = []
    loaded = Kernel()

    class Module:
        def __init__(self, code, options, backend):
            entries.append(("module", code, options, backend))

        def get_function(self, name):
            entries.append(("function", name))
            return loaded

    def launch_kernel(function, *rest):
        *shape, shared, stream, places, extra = rest
        addresses = (ctypes.c_uint64 * 3).from_address(places)
        arguments = [ctypes.c_uint64.from_address(address).value for address in addresses]
        entries.append((function, tuple(shape), shared, stream, arguments, extra, loaded.max_dynamic_shared_size_bytes))

    driver = types.SimpleNamespace(launchKernel=launch_kernel)
    runtime = types.SimpleNamespace(setDevice=lambda index: entries.append(("device", index)))
    cuda = types.ModuleType("cupy.cuda")
    cuda.driver, cuda.runtime = driver, runtime
    cupy = types.ModuleType("cupy")
    cupy.cuda, cupy.RawModule = cuda, Module
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=70 + index))
    monkeypatch.setattr(launch, "_limits", lambda index: Limits(227 << 10, 132))
    for cache in (launch._function, launch._module):
        cache.cache_clear()
    yield entries
    for cache in (launch._function, launch._module):
        cache.cache_clear()


def test_a_launch(log):
    x = torch.zeros(4)
    for _ in range(2):
        launch.CupyLauncher().launch("text", "convolve", 5, 64, 100_000, (x, None, 7))
    assert log[0] == ("device", 3)
    assert log[1] == ("module", "text", ("--std=c++17",), "nvrtc")
    assert log[2] == ("function", "convolve")
    assert log[3] == (4711, (5, 1, 1, 64, 1, 1), 100_000, 73, [x.data_ptr(), 0, 7], 0, 227 << 10)
    assert log[4:] == [("device", 3), log[3]]  # compiled and loaded once


def test_a_unit_serves_layers_that_need_less_and_more_shared_memory(log):
    for shared in (100_000, 60_000, 100_000):
        launch.CupyLauncher().launch("text", "convolve", 1, 256, shared, (torch.zeros(1), 1, 2))
    launches = [entry for entry in log if entry[0] == 4711]
    assert [(entry[2], entry[-1]) for entry in launches] == [(s, 227 << 10) for s in (100_000, 60_000, 100_000)]


def test_another_device_is_current_only_for_the_launch(log, monkeypatch):
    monkeypatch.setattr(launch, "Tensor", types.SimpleNamespace)
    there = types.SimpleNamespace(device=types.SimpleNamespace(index=1), data_ptr=lambda: 1234)
    launch.CupyLauncher().launch("text", "finish", 1, 256, 0, (there, 1, 2))
    assert [entry for entry in log if entry[0] == "device"] == [("device", 1), ("device", 3)]
    assert log[-2][3:5] == (71, [1234, 1, 2])


def test_compiling_ahead_goes_to_all_cores_once(monkeypatch, tmp_path):
    fake = tmp_path / "cupy.py"
    fake.write_text(
        "import pathlib, uuid\n"
        "class RawModule:\n"
        "    def __init__(self, code, options, backend):\n"
        "        self.said = f'{code} {options} {backend}'\n"
        "    def compile(self):\n"
        f"        (pathlib.Path({str(tmp_path)!r}) / f'{{uuid.uuid4()}}.said').write_text(self.said)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "_ahead", set())
    for _ in range(2):
        launch.compile_ahead(["one", "two", "three", "one"])
    said = sorted(path.read_text() for path in tmp_path.glob("*.said"))
    assert said == [f"{text} ('--std=c++17',) nvrtc" for text in ("one", "three", "two")]
