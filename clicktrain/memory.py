"""How much memory this process has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


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
