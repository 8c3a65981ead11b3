"""What kernels read in every call, laid out once: arrays on the device, for as long as their owner lives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """Return an array, flattened, on a device.

    Its memory is allocated by a thread of its own. While torch.compile prepares a CUDA graph (mode "reduce-overhead"),
    whatever the calling thread allocates comes from the graph's memory, and torch later hands out again what it does
    not know to be in use.
    """
    flat = torch.from_numpy(np.ascontiguousarray(array).ravel())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(flat.to, device).result()
