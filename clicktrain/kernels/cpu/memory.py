"""Memory for blocked activations that is used again instead of going back to the operating system.

A training step allocates and frees the same large tensors over and over. The C library returns them to the system,
and the next step pays for every page anew: in a VGG-13 of batch 64, a quarter of the sparse step. Here, freed blocks
wait for the next tensor of their size, on huge pages where the system has them.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 17  # bytes; below, the C library keeps memory by itself
_HUGE_PAGE = 1 << 21
_IDLE_CALLS = 4096  # blocks that stay unused for so many allocations go back to the system


class Pool:
    """Blocks of memory by size, lent to tensors and taken back when the tensors are gone.

    Parameters
    ----------
    smallest : int
        Bytes from which on tensors get their memory here.
    idle_calls : int
        Blocks that were not needed during so many allocations are given up.
    """

    def __init__(self, smallest: int = _SMALLEST, idle_calls: int = _IDLE_CALLS) -> None:
        self.smallest, self.idle_calls = smallest, idle_calls
        self._free: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        self._calls = 0

    @property
    def free_bytes(self) -> int:
        """Memory that waits for its next use."""
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised float32 tensor."""
        size = 4 * math.prod(shape)
        if size < self.smallest:
            return torch.empty(shape)
        self._calls += 1
        if self._calls % self.idle_calls == 0:
            self._give_up_idle()
        waiting = self._free[size]
        block = waiting.pop()[1] if waiting else _allocate(size)
        view = block.view()  # what the tensor keeps alive, and whose end brings the block back
        key = id(view)
        self._lent[key] = weakref.ref(view, lambda _: self._take_back(key, size, block))
        return torch.from_numpy(view).view(shape)

    def _take_back(self, key: int, size: int, block: np.ndarray) -> None:
        del self._lent[key]
        self._free[size].append((self._calls, block))

    def _give_up_idle(self) -> None:
        oldest = self._calls - self.idle_calls
        for size, blocks in list(self._free.items()):
            self._free[size] = [entry for entry in blocks if entry[0] > oldest]


def _allocate(size: int) -> np.ndarray:
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= 2 * _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.float32)
    start = -array.ctypes.data % _HUGE_PAGE // 4
    return array[start : start + size // 4]


empty: Callable[..., Tensor] = Pool().empty
"""Return an uninitialised float32 tensor of a shape; see the module."""
