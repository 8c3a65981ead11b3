"""The memory of this process: how much it has used, and that it keeps what it has."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep() -> bool:
    """Make the C library keep all memory that this process frees, instead of handing it back to the system.

    A training step frees and needs the same memory over and over, and pays for every page that comes back: most of
    all in small networks, whose steps are short.

    Returns
    -------
    bool
        Whether it did: only glibc knows how.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def release() -> bool:
    """Make the C library hand back to the system what this process has freed, also what `keep` made it keep.

    Returns
    -------
    bool
        Whether there was something to hand back, and a C library that can.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return malloc_trim is not None and bool(malloc_trim(0))


def counted(name: str) -> int:
    """Return what Linux counts of this process under a name such as VmRSS or VmHWM, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak(device: torch.device) -> int:
    """Return the most memory that was ever in use, in bytes.

    On a GPU, of torch's tensors; on a CPU, of the whole process, Python, torch and data included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        return counted("VmHWM")  # ru_maxrss would not be less than what the parent had
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
