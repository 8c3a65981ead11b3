"""The compiled library: finds it, chooses the instruction set, and mirrors the structures of `abi.h`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Literal

from clicktrain.errors import BackendUnavailable
from clicktrain.kernels import build, sources

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
"""Best first."""

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Pass(ctypes.Structure):
    """`struct Pass`: a convolution pass."""

    _fields_ = (
        *((name, _i32) for name in (
            "blocks", "channels", "in_h", "in_w", "filters", "out_h", "out_w", "tile_blocks", "tile_h", "tile_w",
            "band", "window_h", "window_w", "window_pitch", "start_h", "start_w", "stride_h", "stride_w",
            "spread_h", "spread_w", "phases", "groups", "channel_block", "channel_blocks", "part", "record_weights",
            "reversed", "part_runs", "list_runs", "streaming", "whole_tiles", "keeps_sums",
            "reads_values", "woven", "max_pool",
        )),
        ("records", _i64),
        *((name, _pointer) for name in ("order", "starts", "runs", "offsets", "gather", "sweeps")),
        *((name, _i32) for name in ("grid_h", "grid_w", "strip_h", "strip_w", "before_h", "before_w")),
        ("neighbours", _pointer),
        ("entries", _i32),
        ("transforms", _pointer),
        ("patterns", _pointer),
    )  # fmt: skip


class Gradient(ctypes.Structure):
    """`struct Gradient`: the gradient of the values."""

    _fields_ = (
        *((name, _i32) for name in (
            "blocks", "channels", "in_h", "in_w", "filters", "out_h", "out_w", "stride_h", "stride_w",
            "pad_h", "pad_w", "kernel_size", "entries", "chunk_blocks", "chunk_rows", "tasks",
        )),
        *((name, _pointer) for name in (
            "task_starts", "run_starts", "run_channels", "run_patterns", "kernel_filters", "kernel_ids", "positions",
            "accumulators", "row_ends", "column_ends",
        )),
        ("most_filters", _i32),
    )  # fmt: skip


class Lanes(ctypes.Structure):
    """`struct Lanes`: how NCHW images become lanes."""

    _fields_ = tuple(
        (name, _i32)
        for name in (
            "images", "channels", "image_h", "image_w", "blocks", "lane_h", "lane_w", "grid_h", "grid_w",
            "start_h", "start_w", "step_h", "step_w",
        )
    )  # fmt: skip


class Strips(ctypes.Structure):
    """`struct Strips`: an activation whose lanes are strips of images, or images."""

    _fields_ = tuple(
        (name, _i32)
        for name in ("blocks", "channels", "height", "width", "grid_h", "grid_w", "image_h", "image_w", "images")
    )


class Pooling(ctypes.Structure):
    """`struct Pooling`."""

    _fields_ = (
        ("x", Strips),
        *((name, _i32) for name in (
            "out_h", "out_w", "size_h", "size_w", "stride_h", "stride_w", "pad_h", "pad_w", "average",
        )),
    )  # fmt: skip


class AdaptivePooling(ctypes.Structure):
    """`struct AdaptivePooling`."""

    _fields_ = tuple((name, _i32) for name in ("planes", "in_h", "in_w", "out_h", "out_w"))


class Linear(ctypes.Structure):
    """`struct Linear`."""

    _fields_ = tuple((name, _i32) for name in ("images", "inputs", "outputs"))


class Step(ctypes.Structure):
    """`struct Step`: one step of a network."""

    _fields_ = (
        *((name, _i32) for name in ("kind", "relu", "x_buffer", "residual_buffer", "y_buffer", "unused")),
        *((name, _i64) for name in ("x", "residual", "y", "floats")),
        *((name, _pointer) for name in ("geometry", "weights", "bias")),
    )


@cache
def load() -> ctypes.CDLL:
    """Return the library: the one built at installation if it is of these sources, else one compiled now.

    Raises
    ------
    BackendUnavailable
        If there is neither a library nor a way to compile one.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = sources.DIRECTORY / f"_kernels{suffix}"
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.clicktrain_digest.restype = ctypes.c_char_p
            if library.clicktrain_digest().decode() == sources.digest():
                return library
    units = tuple((path.name, path.read_text()) for path in sources.sources())
    return build.load(build.Library("kernels", units))


@cache
def instruction_set() -> str:
    """Return the best instruction set that library and machine have, or what CLICKTRAIN_ISA asks for.

    Raises
    ------
    BackendUnavailable
        If CLICKTRAIN_ISA names one that is unknown or that this machine lacks.
    """
    has = {
        "avx512": bool(load().clicktrain_has_avx512()),
        "avx2": bool(load().clicktrain_has_avx2()),
        "portable": True,
    }
    wanted = os.environ.get("CLICKTRAIN_ISA")
    if wanted is None:
        return next(name for name in INSTRUCTION_SETS if has[name])
    if wanted not in has:
        raise BackendUnavailable(f"CLICKTRAIN_ISA={wanted}: expected one of {', '.join(INSTRUCTION_SETS)}")
    if not has[wanted]:
        raise BackendUnavailable(f"CLICKTRAIN_ISA={wanted}: this machine does not have it")
    return wanted


@cache
def cache_bytes(level: Literal[1, 2]) -> int:
    """Return the bytes of a core's data cache of the first or second level, as far as the machine tells."""
    return int(load().clicktrain_cache_bytes(level)) or {1: 1 << 15, 2: 1 << 20}[level]


@cache
def wide_registers() -> bool:
    """Tell whether kernels use 512-bit registers and this machine computes all of one at once."""
    return instruction_set() == "avx512" and bool(load().clicktrain_wide_registers())


@cache
def function(name: str) -> Callable[..., None]:
    """Return a function of the chosen instruction set that takes addresses and, last, the number of threads."""
    found = load()[f"clicktrain_{instruction_set()}_{name}"]
    operands = 2 if name in ("pack", "unpack", "gather_weights") else 3
    found.argtypes = (*[_pointer] * (operands + 1), ctypes.c_int)
    found.restype = None
    return found


@cache
def run_steps() -> Callable[..., None]:
    """Return the function that runs steps: their address and number, buffers, seconds or None, threads."""
    found = load()[f"clicktrain_{instruction_set()}_run_steps"]
    found.argtypes = (_pointer, _i64, _pointer, _pointer, ctypes.c_int)
    found.restype = None
    return found


@cache
def sweep_taps(rows: int, columns: int, step: int) -> int | None:
    """Return the address of the generic sweep for a tile, or None if it is not compiled."""
    find = load()[f"clicktrain_{instruction_set()}_sweep_taps"]
    find.restype = _pointer
    address: int | None = find(rows, columns, step)
    return address


def available() -> Literal[True] | str:
    """Return True, or why there is no library."""
    try:
        instruction_set()
    except BackendUnavailable as error:
        return str(error)
    return True
