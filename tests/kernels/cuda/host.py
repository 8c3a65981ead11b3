"""Runs the text of CUDA units on the CPU: g++ compiles it behind the host's `platform.cuh`."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from clicktrain.kernels.cuda import backend, codegen
from clicktrain.kernels.cuda.launch import Argument
from clicktrain.kernels.cuda.tiling import Limits

PLATFORM = codegen.DIRECTORY / "host" / "platform.cuh"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-psabi", "-Wno-unused-result")
ORDERS = {"forward": 0, "reverse": 1, "random": 2, "eager": 3}
Order = Literal["forward", "reverse", "random", "eager"]
FAILURES = {1: "a barrier that not all threads reach", 2: "an access out of bounds", 3: "a misaligned access"}

SMALL = Limits(shared_bytes=16 << 10, multiprocessors=4, warps=2, lane_pixels=8)
"""Small blocks and patches, so that small tensors have several chunks, blocks and groups."""


class Fault(Exception):
    """What the host found a kernel doing."""


class HostLauncher:
    """A `Launcher` that runs kernels on the CPU, between guard pages.

    Parameters
    ----------
    directory : Path
        For compiled units.
    limits : Limits
        What blocks get.
    orders : sequence of {"forward", "reverse", "random", "eager"}
        Orders of the threads, taken in turn, launch by launch.
    """

    def __init__(
        self, directory: Path, limits: Limits = SMALL, orders: Sequence[Order] = ("forward", "reverse", "random")
    ) -> None:
        self.directory, self.limits_, self.orders = directory, limits, orders
        self.launches = 0
        self.edit = str  # changes the text before it is compiled
        self.texts: set[str] = set()
        self.kernels: set[str] = set()

    def limits(self, device: torch.device) -> Limits:
        return self.limits_

    def launch(
        self, text: str, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[Argument]
    ) -> None:
        library = compiled(self.edit(host_unit(text)), self.directory)
        self.texts.add(text)
        self.kernels.add(kernel)
        tensors, words, keep = [], [], []
        for position, value in enumerate(arguments):
            if isinstance(value, Tensor):
                size = value.numel() * value.element_size()
                # Arrays end at a guard page or start at one, in turn.
                memory = library.guarded_new(ctypes.c_size_t(size), (self.launches + position) % 3 != 0)
                data = library.guarded_data(ctypes.c_void_p(memory))
                ctypes.memmove(data, value.data_ptr(), size)
                tensors.append((memory, data, value, size))
                word: ctypes.c_void_p | ctypes.c_int | ctypes.c_float = ctypes.c_void_p(data)
            else:
                kind = ctypes.c_float if isinstance(value, float) else ctypes.c_int
                word = ctypes.c_void_p(None) if value is None else kind(value)
            keep.append(word)
            words.append(ctypes.addressof(word))
        order = self.orders[self.launches % len(self.orders)]
        self.launches += 1
        result = library[f"launch_{kernel}"](
            ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_size_t(shared), ORDERS[order],
            ctypes.c_uint(self.launches), (ctypes.c_void_p * len(words))(*words),
        )  # fmt: skip
        for memory, data, value, size in tensors:
            ctypes.memmove(value.data_ptr(), data, size)
            library.guarded_delete(ctypes.c_void_p(memory))
        if result:
            raise Fault(f"{kernel}: {FAILURES[result]}")


def kernel_text(text: str) -> str:
    """Return a unit's text without the device's platform."""
    platform = codegen._source("platform.cuh")
    assert text.startswith(platform)
    return text[len(platform) :]


def host_unit(text: str) -> str:
    """Return a unit for the CPU, without its platform: the very same kernels, and entries to launch them."""
    kernels = kernel_text(text)
    names = re.findall(r'extern "C" __global__ void __launch_bounds__\([\w, ]+\)\s+(\w+)\(', kernels)
    entries = [
        f'extern "C" int launch_{name}(unsigned blocks, unsigned threads, size_t shared, int order, unsigned seed,\n'
        f"    void** arguments) {{ return host::launch(host::Entry<{name}>::run, blocks, threads, shared, order, seed,"
        " arguments); }"
        for name in names
    ]
    return "\n".join([kernels, *entries, ""])


@cache
def compiled(unit: str, directory: Path) -> ctypes.CDLL:
    header = _precompiled_header(directory)
    path = directory / f"{hashlib.sha256(unit.encode()).hexdigest()[:32]}.so"
    source = path.with_suffix(".cpp")
    source.write_text(unit)
    subprocess.run(["g++", *FLAGS, "-shared", "-include", str(header), "-o", str(path), str(source)], check=True)
    library = ctypes.CDLL(str(path))
    library.guarded_new.restype = library.guarded_data.restype = ctypes.c_void_p
    return library


@cache
def _precompiled_header(directory: Path) -> Path:
    """Return the host's platform next to its precompiled form, which g++ takes instead."""
    header = directory / "platform.cuh"
    header.write_text(PLATFORM.read_text())
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", "-o", f"{header}.gch", str(header)], check=True)
    return header


@contextmanager
def on_host(launcher: HostLauncher) -> Iterator[HostLauncher]:
    """Let the CUDA backend compute on CPU tensors with a host launcher; new memory is NaN."""
    empty = torch.empty

    def poisoned(*arguments: object, **options: object) -> Tensor:
        made: Tensor = empty(*arguments, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "launcher", launcher)
        patch.setattr(backend, "DEVICE_TYPE", "cpu")
        patch.setattr(torch, "empty", poisoned)
        backend.forget()
        yield launcher
    backend.forget()
