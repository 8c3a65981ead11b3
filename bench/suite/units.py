"""The units of what is tracked, where asv looks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Tracked = TypeVar("Tracked", bound=Callable[..., float])


def unit(name: str) -> Callable[[Tracked], Tracked]:
    """Return a decorator that names the unit of what a benchmark returns."""

    def named(benchmark: Tracked) -> Tracked:
        vars(benchmark)["unit"] = name
        return benchmark

    return named
