"""Compiles CUDA text with NVRTC and launches kernels through CuPy, on torch's current stream and torch's memory.

CuPy is imported where it is used, so that this module can be imported anywhere. CuPy keeps compiled kernels in a cache
on disk of its own, by the text and the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clicktrain.kernels.cuda.tiling import Limits

OPTIONS = ("--std=c++17",)
"""Options for NVRTC. No fast-math; multiply and add contract to FMA, the default."""
OLDEST = (7, 5)
"""Oldest compute capability that NVRTC of CUDA 13 compiles for."""


class Launcher(Protocol):
    """Runs kernels; `CupyLauncher` on a GPU, the tests have one that runs the same text on the CPU."""

    def limits(self, device: torch.device) -> Limits:
        """Return what the device gives to a block."""
        ...

    def launch(
        self, text: str, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Launch a kernel of a unit; tensors are passed by address, None is a null pointer."""
        ...


class CupyLauncher:
    """Launches through `cupy.RawModule`."""

    def limits(self, device: torch.device) -> Limits:
        """Return what the device gives to a block."""
        return _limits(device.index if device.index is not None else torch.cuda.current_device())

    def launch(
        self, text: str, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Launch a kernel on the current stream of the device of the first tensor; does not wait for it."""
        import cupy

        device = next(a.device for a in arguments if isinstance(a, Tensor))
        index = device.index if device.index is not None else torch.cuda.current_device()
        stream = torch.cuda.current_stream(device).cuda_stream
        with cupy.cuda.Device(index), _stream(stream, index):
            function = _function(text, kernel, index, shared)
            function((blocks,), (threads,), tuple(map(_argument, arguments)), shared_mem=shared)


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


def _argument(value: Tensor | int | None) -> Any:
    """Return a kernel argument as CuPy takes it: an address of eight bytes or an integer of four."""
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    return np.uint64(0) if value is None else np.int32(value)


@cache
def _limits(index: int) -> Limits:
    import cupy

    attributes = cupy.cuda.Device(index).attributes
    return Limits(int(attributes["MaxSharedMemoryPerBlockOptin"]), int(attributes["MultiProcessorCount"]))


class _TorchStream:
    """A stream of torch by address, as CuPy 14 takes it (the CUDA stream protocol)."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._address)


@cache
def _stream(address: int, index: int) -> Any:
    """Return CuPy's view of a stream of torch."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_TorchStream(address))
    return cupy.cuda.ExternalStream(address, index)


@cache
def _function(text: str, kernel: str, index: int, shared: int) -> Any:
    """Return a kernel, loaded on a device and allowed so much shared memory."""
    function = _module(text, index).get_function(kernel)
    if shared > 48 << 10:  # more than every kernel may have
        function.max_dynamic_shared_size_bytes = shared
    return function


@cache
def _module(text: str, index: int) -> Any:
    import cupy

    return cupy.RawModule(code=text, options=OPTIONS, backend="nvrtc")
