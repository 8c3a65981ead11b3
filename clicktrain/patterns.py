"""Kernel patterns: which positions of a k x k kernel are kept, and pools of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument

PRUNED = 255
"""The index that marks a removed kernel in an assignment; a pool therefore holds at most 255 patterns."""


@dataclass(frozen=True, order=True)
class Pattern:
    """The positions that a k x k kernel keeps.

    Parameters
    ----------
    kernel_size : int
        Side k of the kernel.
    kept : tuple of int
        Kept positions, row-major, ascending, each in [0, k*k).
    """

    kernel_size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kernel_size < 1:
            raise InvalidArgument(f"kernel_size={self.kernel_size}: expected at least 1")
        limit = self.kernel_size**2
        if not self.kept or list(self.kept) != sorted({p for p in self.kept if 0 <= p < limit}):
            raise InvalidArgument(f"kept={self.kept}: expected distinct ascending positions in [0, {limit})")

    def mask(self) -> Tensor:
        """Return the pattern as a bool tensor of shape (k, k)."""
        flat = torch.zeros(self.kernel_size**2, dtype=torch.bool)
        flat[list(self.kept)] = True
        return flat.view(self.kernel_size, self.kernel_size)

    def rotated(self) -> Pattern:
        """Return the pattern turned by 180 degrees (the one that the input gradient convolves with)."""
        last = self.kernel_size**2 - 1
        return Pattern(self.kernel_size, tuple(last - p for p in reversed(self.kept)))

    def __str__(self) -> str:
        rows = self.mask().int().tolist()
        return "/".join("".join("#" if kept else "." for kept in row) for row in rows)


@dataclass(frozen=True)
class PatternPool(Sequence[Pattern]):
    """The patterns that a model may use: all of one kernel size, all keeping the same number of entries.

    Parameters
    ----------
    patterns : tuple of Pattern
        1 to 255 distinct patterns. Their order is the index used by assignments.

    Raises
    ------
    InvalidArgument
        If the patterns differ in kernel size or entries, repeat, or are none or more than 255.
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.patterns) < PRUNED + 1:
            raise InvalidArgument(f"pool of {len(self.patterns)} patterns: expected 1 to {PRUNED}")
        if len(set(self.patterns)) != len(self.patterns):
            raise InvalidArgument("pool: the same pattern stands in it twice")
        for what in ("kernel_size", "entries"):
            seen = {len(p.kept) if what == "entries" else p.kernel_size for p in self.patterns}
            if len(seen) > 1:
                raise InvalidArgument(f"pool with {what} {sorted(seen)}: all patterns must have the same {what}")

    @classmethod
    def from_masks(cls, masks: Iterable[object]) -> PatternPool:
        """Build a pool from square arrays of zeros and ones.

        Parameters
        ----------
        masks : iterable of array-like, each (k, k)
            1 (or True) where the kernel keeps its weight.

        Raises
        ------
        InvalidArgument
            If a mask is not square, holds anything but 0 and 1, or does not fit the others.
        """
        patterns = []
        for number, mask in enumerate(masks):
            array = np.asarray(mask)
            if array.ndim != 2 or array.shape[0] != array.shape[1]:
                raise InvalidArgument(f"masks[{number}] has shape {array.shape}: expected a square (k, k) array")
            if not np.isin(array, (0, 1)).all():
                raise InvalidArgument(f"masks[{number}] holds values other than 0 and 1: {array.tolist()}")
            kept = tuple(int(p) for p in np.flatnonzero(array))
            patterns.append(Pattern(array.shape[0], kept))
        return cls(tuple(patterns))

    @property
    def kernel_size(self) -> int:
        """Side k of the kernels."""
        return self.patterns[0].kernel_size

    @property
    def entries(self) -> int:
        """Weights that each pattern keeps."""
        return len(self.patterns[0].kept)

    def masks(self) -> Tensor:
        """Return all patterns as a bool tensor of shape (P, k, k)."""
        return torch.stack([pattern.mask() for pattern in self.patterns])

    def positions(self) -> Tensor:
        """Return the kept positions, row-major, as an int64 tensor of shape (P, entries)."""
        return torch.tensor([pattern.kept for pattern in self.patterns])

    def rotated(self) -> PatternPool:
        """Return the pool with each pattern turned by 180 degrees, order kept."""
        return PatternPool(tuple(pattern.rotated() for pattern in self.patterns))

    def __len__(self) -> int:
        return len(self.patterns)

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self.patterns)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence overloads: an int or a slice
        return self.patterns[index]

    def __str__(self) -> str:
        return " ".join(str(pattern) for pattern in self.patterns)


@cache
def all_patterns(entries: int = 4, kernel_size: int = 3) -> PatternPool:
    """Return every pattern that keeps `entries` of kernel_size**2 positions, in lexicographic order.

    For 4 of 9 these are the C(9, 4) = 126 candidates of the dynamic pool.
    """
    total = kernel_size**2
    if not 1 <= entries <= total:
        raise InvalidArgument(f"entries={entries}: expected 1 to {total} for a {kernel_size}x{kernel_size} kernel")
    return PatternPool(tuple(Pattern(kernel_size, kept) for kept in combinations(range(total), entries)))


# The released pattern library in its order (row-major positions). The twelfth matrix keeps {3, 5, 7, 8} while
# the comment beside it gives the number of {3, 4, 7, 8}: probably a typing error, so both can be had.
_OFFICIAL = (
    (4, 5, 7, 8), (3, 4, 6, 7), (1, 2, 4, 5), (0, 1, 3, 4),
    (5, 6, 7, 8), (3, 4, 5, 7), (1, 4, 5, 7), (1, 3, 4, 7),
    (0, 1, 2, 4), (3, 6, 7, 8), (0, 1, 2, 3), (3, 5, 7, 8),
)  # fmt: skip
_PATTERN_12 = {"matrix": (3, 5, 7, 8), "comment": (3, 4, 7, 8)}


@cache
def official_pool(size: int, pattern_12: Literal["matrix", "comment"] = "matrix") -> PatternPool:
    """Return the fixed pool of the released ClickTrain code.

    Parameters
    ----------
    size : {4, 8, 12}
        Number of patterns; the pool of 4 are the four 2x2 squares.
    pattern_12 : {"matrix", "comment"}
        Which reading of the twelfth pattern: the released matrix {3, 5, 7, 8}, or the number in the comment
        beside it, {3, 4, 7, 8}. Matters for size 12 only.
    """
    if size not in (4, 8, 12):
        raise InvalidArgument(f"size={size}: the official pools have 4, 8 or 12 patterns")
    if pattern_12 not in _PATTERN_12:
        raise InvalidArgument(f"pattern_12={pattern_12!r}: expected 'matrix' or 'comment'")
    kept = (*_OFFICIAL[:11], _PATTERN_12[pattern_12])[:size]
    return PatternPool(tuple(Pattern(3, positions) for positions in kept))


@cache
def full_pool(kernel_size: int) -> PatternPool:
    """Return the pool of the one pattern that keeps all of a k x k kernel (connectivity pruning only)."""
    return PatternPool((Pattern(kernel_size, tuple(range(kernel_size**2))),))


def kept_positions(index: Tensor, pool: PatternPool) -> Tensor:
    """Return where the kept weights of a layer stand in its flattened dense weight.

    Parameters
    ----------
    index : Tensor, (C_out, C_in) uint8
        Pattern of each kernel, `PRUNED` where the kernel is removed.
    pool : PatternPool
        The patterns.

    Returns
    -------
    Tensor, (kept_kernels, entries) int64
        Positions in canonical order: kernels row-major by (o, i), entries row-major within the pattern.
    """
    flat = index.flatten()
    kernels = torch.nonzero(flat != PRUNED).squeeze(1)
    inside = pool.positions().to(index.device)[flat[kernels].long()]
    return kernels[:, None] * pool.kernel_size**2 + inside
