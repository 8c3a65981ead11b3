"""The memory plan: where each intermediate result lies in one arena, decided before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 16  # floats: a cache line


@dataclass(eq=False)
class Storage:
    """Memory of a result.

    Attributes
    ----------
    floats : int
        Size.
    buffer : int
        ARENA, or the number of another buffer, in which it lies alone.
    offset : int
        Floats from the start of the buffer.
    first, last : int
        Numbers of the steps that write it first and read it last.
    """

    floats: int
    buffer: int
    offset: int = 0
    first: int = -1
    last: int = -1

    def used_by(self, step: int) -> None:
        """Keep it alive during a step."""
        self.first = step if self.first < 0 else min(self.first, step)
        self.last = max(self.last, step)


ARENA, INPUT, OUTPUT = range(3)


def plan_arena(storages: Iterable[Storage]) -> int:
    """Place storages of the arena so that those alive at the same time do not overlap; returns its size in floats.

    The largest goes first, each into the lowest gap that is large enough.
    """
    placed: list[Storage] = []
    size = 0
    for storage in sorted(storages, key=lambda s: (-s.floats, s.first)):
        if storage.buffer != ARENA:
            continue
        offset = 0
        for other in sorted(placed, key=lambda s: s.offset):
            if other.first > storage.last or storage.first > other.last:
                continue
            if offset + storage.floats <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.floats) // ALIGNMENT) * ALIGNMENT)
        storage.offset = offset
        size = max(size, offset + storage.floats)
        placed.append(storage)
    return size
