"""Compiles CUDA text with NVRTC and launches kernels through CuPy, on torch's current stream and torch's memory.

CuPy is imported where it is used, so that this module can be imported anywhere. CuPy keeps compiled kernels in a cache
on disk of its own, by the text and the options.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clicktrain.kernels.cuda.tiling import Limits

OPTIONS = ("--std=c++17",)
"""Options for NVRTC. No fast-math; multiply and add contract to FMA, the default."""
OLDEST = (7, 5)
"""Oldest compute capability that NVRTC of CUDA 13 compiles for."""


_ahead: set[str] = set()
"""What `compile_ahead` has compiled already."""


def compile_ahead(texts: Iterable[str]) -> None:
    """Compile units on all cores, into CuPy's cache on disk, where the first launch finds them."""
    waiting = sorted(set(texts) - _ahead, key=len)
    count = min(len(waiting), len(os.sched_getaffinity(0)))
    command = [sys.executable, str(Path(__file__).with_name("ahead.py"))]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(count)]
    for number, worker in enumerate(workers):
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([OPTIONS, waiting[number::count]]))
        worker.stdin.close()
    for worker in workers:
        worker.wait()  # what a worker could not compile fails again, loudly, at its launch
    _ahead.update(waiting)


Argument = Tensor | int | float | None
"""Of a kernel: a tensor is passed by address, None as null, a float as float32."""


class Launcher(Protocol):
    """Runs kernels; `CupyLauncher` on a GPU, the tests have one that runs the same text on the CPU."""

    def limits(self, device: torch.device) -> Limits:
        """Return what the device gives to a block."""
        ...

    def launch(
        self, text: str, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Argument]
    ) -> None:
        """Launch a kernel of a unit; the first argument is a tensor."""
        ...


class CupyLauncher:
    """Launches through `cupy.RawModule`."""

    def limits(self, device: torch.device) -> Limits:
        """Return what the device gives to a block."""
        return _limits(device.index if device.index is not None else torch.cuda.current_device())

    def launch(
        self, text: str, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Argument]
    ) -> None:
        """Launch a kernel on the current stream of the device of the first tensor; does not wait for it.

        CuPy's own call would take longer to pack the arguments than many a kernel to run: here they are written into
        words whose addresses go straight to the driver.
        """
        from cupy.cuda import driver, runtime

        leading = arguments[0]
        assert isinstance(leading, Tensor)
        device = leading.device
        current = torch.cuda.current_device()
        index = device.index if device.index is not None else current
        words = [a if type(a) is int else _word(a) for a in arguments]
        count = len(words)
        memory = (ctypes.c_uint64 * (2 * count))()
        first = ctypes.addressof(memory)
        _packing(count).pack_into(memory, 0, *words, *range(first, first + 8 * count, 8))
        stream = torch.cuda.current_stream(index).cuda_stream
        runtime.setDevice(index)  # makes its context the thread's, which the driver asks for
        try:
            function = _function(text, kernel, index)
            driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, first + 8 * count, 0)
        finally:
            if index != current:
                runtime.setDevice(current)


def available() -> Literal[True] | str:
    """Return True, or why kernels cannot be launched here."""
    try:
        import cupy
    except ImportError:
        return 'CuPy is not installed: pip install "clicktrain[cuda]"'
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (no NVIDIA GPU, no driver, or a torch built without CUDA)"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy sees no CUDA device: {error}"
    return too_old(torch.cuda.get_device_capability()) or True


def too_old(capability: tuple[int, int]) -> str | None:
    """Return why a GPU of this compute capability is of no use, or None."""
    if capability >= OLDEST:
        return None
    return "the GPU has compute capability {}.{}: the kernels need {}.{} or newer".format(*capability, *OLDEST)


def _word(argument: Argument) -> int:
    """Return a word of eight bytes: an address, or four bytes in its lower half."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return struct.unpack("i", struct.pack("f", argument))[0] if isinstance(argument, float) else argument or 0


@cache
def _packing(count: int) -> struct.Struct:
    return struct.Struct(f"{2 * count}q")


@cache
def _limits(index: int) -> Limits:
    import cupy

    attributes = cupy.cuda.Device(index).attributes
    return Limits(int(attributes["MaxSharedMemoryPerBlockOptin"]), int(attributes["MultiProcessorCount"]))


@cache
def _function(text: str, kernel: str, index: int) -> int:
    """Return the driver's handle of a kernel, loaded on a device and allowed all shared memory that a block can have.

    Layers that share a unit differ in what they need of it: the permission must not be that of the last one.
    """
    function = _module(text, index).get_function(kernel)
    function.max_dynamic_shared_size_bytes = _limits(index).shared_bytes
    return int(function.kernel.ptr)


@cache
def _module(text: str, index: int) -> Any:
    import cupy

    return cupy.RawModule(code=text, options=OPTIONS, backend="nvrtc")
