"""One direction of a pattern convolution: its geometry and its kept kernels.

The input gradient is a forward pass over the transposed layer: filters and channels change places, patterns turn
by 180 degrees, and the input (the output gradient) is spread out by the stride. A pass therefore computes
`y[f, r] = sum of w[f, c, k] * x[c, (r * stride + k - padding) / spread]` over the kept taps k whose input exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clicktrain.kernels.plan import Plan
from clicktrain.patterns import PRUNED

Pair = tuple[int, int]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kept kernels of a layer in some order; arrays of one length, int64."""

    filters: Integers
    channels: Integers
    patterns: Integers
    numbers: Integers
    """Canonical number: the kernel's row in the values."""

    def __getitem__(self, order: Integers) -> Kernels:
        return Kernels(self.filters[order], self.channels[order], self.patterns[order], self.numbers[order])


@dataclass(frozen=True, eq=False)
class Layer:
    """A pass, before it is cut into tiles.

    Attributes
    ----------
    filters, channels : int
        Output and input channels of the pass.
    kernels : Kernels
        What is kept, by filter and channel.
    patterns : tuple of tuple of int
        Kept taps of each pattern, row-major, in the order in which they are added up; sorted, so that equal pools
        give equal code.
    reversed : bool
        The taps of a kernel have its values from last to first.
    """

    filters: int
    channels: int
    kernels: Kernels
    patterns: tuple[tuple[int, ...], ...]
    reversed: bool
    kernel_size: int
    in_size: Pair
    out_size: Pair
    stride: Pair
    spread: Pair
    padding: Pair

    @classmethod
    def forward(cls, plan: Plan) -> Layer:
        """Return the layer as it is."""
        filters, channels = plan.index.shape
        patterns, rank = _sorted_patterns([pattern.kept for pattern in plan.pool])
        return cls(
            filters, channels, _kernels(plan, rank), patterns, False, plan.pool.kernel_size,
            plan.input_shape[2:], plan.output_shape[2:], plan.stride, (1, 1), plan.padding,
        )  # fmt: skip

    @classmethod
    def transposed(cls, plan: Plan) -> Layer:
        """Return the layer whose forward pass is the input gradient."""
        filters, channels = plan.index.shape
        patterns, rank = _sorted_patterns([pattern.rotated().kept for pattern in plan.pool])
        kept = _kernels(plan, rank)
        kept = kept[stable_order(kept.channels, channels)]
        last = plan.pool.kernel_size - 1
        return cls(
            channels, filters, Kernels(kept.channels, kept.filters, kept.patterns, kept.numbers), patterns, True,
            plan.pool.kernel_size, plan.output_shape[2:], plan.input_shape[2:],
            (1, 1), plan.stride, (last - plan.padding[0], last - plan.padding[1]),
        )  # fmt: skip

    def strips(self, grid: Pair) -> tuple[Layer, Pair, Pair]:
        """Cut the images into a grid of equal strips.

        Returns
        -------
        layer : Layer
            The pass on one strip, whose input holds all that it reads: no padding is left.
        start, step : (int, int)
            Input pixel where the first strip starts (negative: in the padding), and from one strip to the next.
        """
        (out_h, in_h, padding_h, start_h, step_h), (out_w, in_w, padding_w, start_w, step_w) = (
            self._strip(axis, parts) for axis, parts in enumerate(grid)
        )
        layer = replace(self, out_size=(out_h, out_w), in_size=(in_h, in_w), padding=(padding_h, padding_w))
        return layer, (start_h, start_w), (step_h, step_w)

    def _strip(self, axis: int, parts: int) -> tuple[int, int, int, int, int]:
        """Return a strip's output and input size, padding, start and step along an axis."""
        stride, spread, padding = self.stride[axis], self.spread[axis], self.padding[axis]
        out = -(-self.out_size[axis] // (parts * spread)) * spread
        start = -(padding // spread)
        read = ((out - 1) * stride + self.kernel_size - 1 - padding) // spread - start + 1
        return out, max(1, read), padding + start * spread, start, out * stride // spread

    @property
    def entries(self) -> int:
        """Weights of a kernel."""
        return len(self.patterns[0])


def _sorted_patterns(patterns: list[tuple[int, ...]]) -> tuple[tuple[tuple[int, ...], ...], Integers]:
    """Return the patterns sorted, and the place of each given one among them."""
    ordered = sorted(patterns)
    return tuple(ordered), np.array([ordered.index(pattern) for pattern in patterns])


def _kernels(plan: Plan, rank: Integers) -> Kernels:
    index = plan.index.numpy()
    kept = np.flatnonzero(index != PRUNED)
    filters, channels = np.divmod(kept, max(1, index.shape[1]))
    return Kernels(filters, channels, rank[index.reshape(-1)[kept]], np.arange(len(kept)))


def stable_order(keys: Integers, size: int) -> Integers:
    """Return the order that sorts keys from 0 to below `size` (at most 2^32), equal ones left as they are.

    numpy sorts numbers of 16 bits by radix, ten times faster than larger ones.
    """
    low = np.argsort(keys.astype(np.uint16), kind="stable")  # the cast keeps the lowest 16 bits
    if size <= 1 << 16:
        return low
    return low[np.argsort((keys[low] >> 16).astype(np.uint16), kind="stable")]
