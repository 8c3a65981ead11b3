"""Assignment: which pattern each kernel of a layer keeps, and how it is chosen from importance scores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.patterns import PRUNED, PatternPool, kept_positions

Ranking = Literal["kernel", "pattern"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """The sparsity of one convolution: a pattern for each kernel, or none where the kernel is removed.

    Masks, plans, counts and FLOPs derive from it, never from `weight != 0`.

    Parameters
    ----------
    index : Tensor, (C_out, C_in) uint8
        Index into `pool`, or 255 (`PRUNED`) for a removed kernel.
    pool : PatternPool
        The patterns that `index` refers to.

    Raises
    ------
    InvalidArgument
        If `index` is not a uint8 matrix or refers to a pattern outside the pool.
    """

    index: Tensor
    pool: PatternPool

    def __post_init__(self) -> None:
        if self.index.dtype != torch.uint8 or self.index.ndim != 2:
            raise InvalidArgument(
                f"index: expected a uint8 tensor (C_out, C_in), got {self.index.dtype} {tuple(self.index.shape)}"
            )
        used = self.index[self.index != PRUNED]
        if used.numel() and int(used.max()) >= len(self.pool):
            raise InvalidArgument(
                f"index refers to pattern {int(used.max())}, but the pool has {len(self.pool)} patterns"
            )

    @cached_property
    def kept_kernels(self) -> int:
        """Number of kernels that stay."""
        return int((self.index != PRUNED).sum())

    @property
    def kept_weights(self) -> int:
        """Number of weights that stay: kept kernels times entries of a pattern."""
        return self.kept_kernels * self.pool.entries

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer."""
        return self.index.numel() * self.pool.kernel_size**2

    @property
    def density(self) -> float:
        """Kept weights / weights, in [0, 1]."""
        return self.kept_weights / self.weights

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        """Shape (C_out, C_in, k, k) of the dense weight."""
        k = self.pool.kernel_size
        return (self.index.shape[0], self.index.shape[1], k, k)

    def mask(self) -> Tensor:
        """Return the kept weights as a bool tensor of shape (C_out, C_in, k, k)."""
        masks = self.pool.masks().to(self.index.device)
        none = masks.new_zeros(1, *masks.shape[1:])
        row = torch.where(self.index == PRUNED, len(self.pool), self.index.long())
        return torch.cat([masks, none])[row]

    def gather(self, dense: Tensor) -> Tensor:
        """Take the kept entries of a dense (C_out, C_in, k, k) tensor, as values (kept_kernels, entries)."""
        if tuple(dense.shape) != self.dense_shape:
            raise InvalidArgument(f"dense has shape {tuple(dense.shape)}: expected {self.dense_shape}")
        return dense.flatten()[kept_positions(self.index, self.pool).to(dense.device)]

    def scatter(self, values: Tensor) -> Tensor:
        """Put values (kept_kernels, entries) at their places in a dense tensor of zeros; undoes `gather`."""
        positions = kept_positions(self.index, self.pool).to(values.device)
        if values.shape != positions.shape:
            raise InvalidArgument(f"values: expected shape {tuple(positions.shape)}, got {tuple(values.shape)}")
        dense = values.new_zeros(self.weights)
        return dense.index_put((positions.flatten(),), values.flatten()).view(self.dense_shape)

    def digest(self) -> str:
        """Return a SHA-256 of index and pool: equal for equal assignments on any machine."""
        content = hashlib.sha256(str((tuple(self.index.shape), self.pool.patterns)).encode())
        content.update(self.index.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()


def assign(
    scores: Tensor, pool: PatternPool, kept_kernels: int, rank_by: Ranking = "kernel", share_filters: int = 1
) -> Assignment:
    """Give every kernel its best pattern and keep the most important kernels of the layer.

    Each kernel takes the pattern that retains most of its score. Then exactly `kept_kernels` kernels stay:
    the best one of each filter, so that no output channel dies, and the best of all the others. Equal scores
    are settled by index: the lower pattern, the earlier kernel.

    Parameters
    ----------
    scores : Tensor, (C_out, C_in, k, k) float
        Importance of each weight, not negative.
    pool : PatternPool
        Patterns of kernel size k.
    kept_kernels : int
        Kernels that stay, from C_out to C_out * C_in.
    rank_by : {"kernel", "pattern"}
        Rank kernels by the score of the whole kernel (the released code) or of what their pattern retains.
    share_filters : int
        Blocks of so many neighbouring filters keep the same kernels with the same patterns, chosen by importance
        summed over the block; it divides C_out. Of `kept_kernels`, what does not make a whole block is removed.

    Returns
    -------
    Assignment
        On the device of `scores`.
    """
    if scores.ndim != 4 or tuple(scores.shape[2:]) != (pool.kernel_size,) * 2:
        raise InvalidArgument(
            f"scores of shape {tuple(scores.shape)}: expected (C_out, C_in, {pool.kernel_size}, {pool.kernel_size})"
        )
    filters, channels = scores.shape[:2]
    if not filters <= kept_kernels <= filters * channels:
        raise InvalidArgument(
            f"kept_kernels={kept_kernels}: expected {filters} (one in each filter) to {filters * channels}"
        )
    if share_filters < 1 or filters % share_filters:
        raise InvalidArgument(f"share_filters={share_filters}: expected a divisor of the {filters} filters")
    flat = scores.double().reshape(filters // share_filters, share_filters, channels, -1).sum(1)
    if not bool(torch.isfinite(flat).all()):
        raise InvalidArgument("scores: expected finite importance scores, found NaN or infinity")
    retained, best = pattern_scores(flat, pool)
    kernel_scores = flat.sum(2) if rank_by == "kernel" else retained
    keep = _best_kernels(kernel_scores, kept_kernels // share_filters)
    shared = torch.where(keep, best, PRUNED).to(torch.uint8)
    return Assignment(shared.repeat_interleave(share_filters, 0), pool)


def pattern_scores(flat_scores: Tensor, pool: PatternPool) -> tuple[Tensor, Tensor]:
    """Return what the best pattern of each kernel retains, and its index.

    Parameters
    ----------
    flat_scores : Tensor, (..., k*k) float
        Importance of each weight.
    pool : PatternPool
        Patterns of kernel size k.

    Returns
    -------
    retained : Tensor, (...)
        Score under the best pattern.
    best : Tensor, (...) int64
        Its index; the lowest of equals.
    """
    masks = pool.masks().flatten(1).to(flat_scores)
    by_pattern = flat_scores @ masks.T
    best = _first_argmax(by_pattern)
    return by_pattern.gather(-1, best.unsqueeze(-1)).squeeze(-1), best


def _first_argmax(table: Tensor) -> Tensor:
    """Return the argmax over the last axis, the lowest index of equals (torch.argmax promises none)."""
    ranks = torch.arange(table.shape[-1], 0, -1, device=table.device)
    is_best = table == table.amax(-1, keepdim=True)
    return (is_best * ranks).argmax(-1)


def _best_kernels(kernel_scores: Tensor, count: int) -> Tensor:
    """Return a bool matrix with `count` True: the best kernel of each row first, then the best of the rest."""
    guaranteed = torch.zeros_like(kernel_scores, dtype=torch.bool)
    guaranteed.scatter_(1, _first_argmax(kernel_scores).unsqueeze(1), True)
    order = torch.where(guaranteed, torch.inf, kernel_scores).flatten().argsort(descending=True, stable=True)
    keep = torch.zeros_like(guaranteed).flatten()
    keep[order[:count]] = True
    return keep.view_as(guaranteed)
