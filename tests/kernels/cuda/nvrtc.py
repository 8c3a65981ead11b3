"""Compiles CUDA text with NVRTC, which needs neither a GPU nor a driver, and reads what ptxas says about it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clicktrain.kernels.cuda.launch import OPTIONS


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes
    ----------
    registers : int
        Of a thread.
    spilled_bytes : int
        Stores and loads of registers that did not fit.
    stack_bytes : int
        Local memory of a thread.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int


def libraries() -> list[Path]:
    """Return the built-ins and NVRTC from the wheel nvidia-cuda-nvrtc, in the order in which to load them."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("libnvrtc*.so*"))
    return sorted((path for path in found if ".alt." not in path.name), key=lambda path: "builtins" not in path.name)


@cache
def _nvrtc() -> ctypes.CDLL:
    *builtins, nvrtc = libraries()
    for path in builtins:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(nvrtc))


def compile_for(text: str, architecture: str) -> dict[str, Resources]:
    """Compile a unit to machine code; return what each kernel uses."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"unit.cu", 0, None, None) == 0
    options = [*OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = nvrtc.nvrtcCompileProgram(program, len(options), words)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    said = log.value.decode()
    assert result == 0, said
    assert "warning" not in said, said
    return parse(said)


def parse(log: str) -> dict[str, Resources]:
    """Read ptxas's report."""
    kernels = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.partition("'")[0]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        )  # type: ignore[union-attr]
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        kernels[name] = Resources(registers, stores + loads, stack)
    return kernels
