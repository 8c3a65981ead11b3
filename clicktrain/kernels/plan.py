"""Execution plan: everything about a pattern convolution that depends on its sparsity and its shapes."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.patterns import PRUNED, PatternPool, kept_positions

Pair = tuple[int, int]


class AssignmentLike(Protocol):
    """Anything that carries the pattern index of each kernel, as `clicktrain.Assignment` does."""

    @property
    def index(self) -> Tensor:
        """Pattern of each kernel, (C_out, C_in) uint8."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """One pattern convolution, ready to run: made by `plan`, shared through its cache, never changed.

    Attributes
    ----------
    index : Tensor, (C_out, C_in) uint8, on the CPU
        Pattern of each kernel, 255 = removed.
    pool : PatternPool
        The patterns.
    input_shape, output_shape : tuple of int
        (N, C_in, H, W) and (N, C_out, H_out, W_out).
    stride, padding : tuple of int
        Vertical and horizontal.
    digest : str
        SHA-256 of all of the above.
    """

    index: Tensor
    pool: PatternPool
    input_shape: tuple[int, int, int, int]
    stride: Pair
    padding: Pair
    digest: str

    @cached_property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, C_out, H_out, W_out) of the result."""
        n, _, h, w = self.input_shape
        return (n, self.index.shape[0], *output_size((h, w), self.pool.kernel_size, self.stride, self.padding))

    @cached_property
    def positions(self) -> Tensor:
        """Places of the kept weights in the flattened dense weight, (kept_kernels, entries) int64."""
        return kept_positions(self.index, self.pool)

    @cached_property
    def kept_kernels(self) -> int:
        """How many kernels are left."""
        return int(np.count_nonzero(self.index.numpy() != PRUNED))

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape (C_out, C_in, k, k) of the dense weight."""
        return (*self.index.shape, self.pool.kernel_size, self.pool.kernel_size)

    @property
    def values_shape(self) -> Pair:
        """Shape (kept_kernels, entries) of the values."""
        return (self.kept_kernels, self.pool.entries)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass, padding included."""
        return math.prod(self.values_shape) * self.input_shape[0] * self.output_shape[2] * self.output_shape[3]

    def __str__(self) -> str:
        kept, total = self.values_shape[0], self.index.numel()
        by_filter = (self.index != PRUNED).sum(1).tolist()
        by_pattern = torch.bincount(self.index[self.index != PRUNED], minlength=len(self.pool)).tolist()
        compression = total * self.pool.kernel_size**2 / max(1, kept * self.pool.entries)
        lines = [
            f"pattern convolution {self.input_shape} -> {self.output_shape}, stride {self.stride}, "
            f"padding {self.padding}",
            f"  kernels: {kept} of {total} kept, "
            f"{min(by_filter, default=0)} to {max(by_filter, default=0)} in a filter",
            f"  weights: {kept * self.pool.entries} kept, compression {compression:.2f}x, {self.macs} MACs",
            *(f"  pattern {pattern}: {count} kernels" for pattern, count in zip(self.pool, by_pattern, strict=True)),
            f"  digest {self.digest[:16]}",
        ]
        return "\n".join(lines)


def output_size(size: Pair, kernel_size: int, stride: Pair, padding: Pair) -> Pair:
    """Return (H_out, W_out) of a convolution without dilation."""
    h, w = ((s + 2 * p - kernel_size) // st + 1 for s, p, st in zip(size, padding, stride, strict=True))
    return (h, w)


def pair(value: int | tuple[int, ...] | list[int], name: str) -> Pair:
    """Return `value` as (vertical, horizontal); one integer stands for both."""
    both = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(both) != 2:
        raise InvalidArgument(f"{name}={value}: expected an integer or two")
    return both


_CACHE_SIZE = 1024
_cache: OrderedDict[str, Plan] = OrderedDict()


def plan(
    assignment: AssignmentLike | Tensor,
    pool: PatternPool | None = None,
    input_shape: tuple[int, ...] = (),
    stride: int | Pair = 1,
    padding: int | Pair = 0,
) -> Plan:
    """Build the plan of a pattern convolution, or take it from the cache of equal ones.

    Parameters
    ----------
    assignment : Assignment or Tensor, (C_out, C_in) uint8
        Pattern of each kernel, 255 = removed.
    pool : PatternPool, optional
        The patterns; an Assignment brings its own.
    input_shape : tuple of int
        (N, C_in, H, W).
    stride, padding : int or (int, int)
        As in `torch.nn.Conv2d`; stride at least 1, padding not negative.

    Raises
    ------
    InvalidArgument
        If a value cannot describe a convolution; the message names it.
    """
    index = assignment if isinstance(assignment, Tensor) else assignment.index
    pool = pool if pool is not None else getattr(assignment, "pool", None)
    if pool is None:
        raise InvalidArgument("pool: expected the PatternPool that the assignment refers to")
    index = index.detach().cpu().contiguous()
    shape = tuple(int(size) for size in input_shape)
    stride, padding = pair(stride, "stride"), pair(padding, "padding")
    digest = _digest(index, pool, shape, stride, padding)
    if digest not in _cache:
        _check(index, pool, shape, stride, padding)
        _cache[digest] = Plan(torch.from_numpy(index.numpy().copy()), pool, shape, stride, padding, digest)  # type: ignore[arg-type]
        if len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    _cache.move_to_end(digest)
    return _cache[digest]


def _digest(index: Tensor, pool: PatternPool, *rest: object) -> str:
    content = hashlib.sha256(repr((tuple(index.shape), str(index.dtype), pool.patterns, rest)).encode())
    content.update(index.numpy().tobytes())
    return content.hexdigest()


def _check(index: Tensor, pool: PatternPool, shape: tuple[int, ...], stride: Pair, padding: Pair) -> None:
    if index.dtype != torch.uint8 or index.ndim != 2:
        raise InvalidArgument(f"assignment: expected a uint8 (C_out, C_in) tensor, got {index.dtype} {index.ndim}-D")
    numbers = index.numpy()
    used = numbers[numbers != PRUNED]
    if used.size and int(used.max()) >= len(pool):
        raise InvalidArgument(f"assignment: index {int(used.max())} is outside the pool of {len(pool)} patterns")
    if len(shape) != 4 or shape[1] != index.shape[1] or min(shape) < 0:
        raise InvalidArgument(f"input_shape={shape}: expected (N, {index.shape[1]}, H, W)")
    if min(stride) < 1 or min(padding) < 0:
        raise InvalidArgument(f"stride={stride}, padding={padding}: expected at least 1 and at least 0")
    if min(output_size((shape[2], shape[3]), pool.kernel_size, stride, padding)) < 1:
        raise InvalidArgument(
            f"input_shape={shape} with padding={padding}: smaller than the {pool.kernel_size}x{pool.kernel_size} kernel"
        )
