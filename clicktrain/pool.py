"""Dynamic pattern pools: which few of all patterns serve the trained weights best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clicktrain.assignment import pattern_scores
from clicktrain.errors import InvalidArgument
from clicktrain.patterns import Pattern, PatternPool, all_patterns

_SAMPLE = 1 << 15  # kernels, spread evenly over the layers, that coverage looks at


def frequency_pool(scores: Iterable[Tensor], size: int, entries: int = 4) -> PatternPool:
    """Return the patterns that are most often the best one of a kernel (the paper's way).

    Parameters
    ----------
    scores : iterable of Tensor, each (C_out, C_in, k, k)
        Importance by layer; all of one kernel size.
    size : int
        Patterns in the pool.
    entries : int
        Weights that each keeps.

    Returns
    -------
    PatternPool
        Most frequent first; equals by lexicographic order.
    """
    layers = _flat(scores, size, entries)
    return _most_frequent(torch.cat(layers), size, entries)


def coverage_pool(scores: Iterable[Tensor], size: int, entries: int = 4) -> PatternPool:
    """Return patterns that together retain the most importance (ours).

    Maximises the sum over kernels of the score under the best pattern of the pool, with scores normalised by
    layer so that each layer counts the same. Patterns are added greedily, which comes within 1 - 1/e of the
    optimum of this submodular function, and then exchanged one by one while that helps. Never a worse pool
    than `frequency_pool`'s: the better of both is returned.

    Parameters are those of `frequency_pool`.
    """
    layers = _flat(scores, size, entries)
    kernels = torch.cat([flat / flat.sum().clamp_min(torch.finfo(flat.dtype).tiny) for flat in layers])
    sample = kernels[:: max(1, len(kernels) // _SAMPLE)]
    ours = _exchanged(_extended((), sample, size, entries), sample)
    return max(ours, _most_frequent(kernels, size, entries), key=lambda pool: _total(kernels, pool))


def retained_importance(scores: Iterable[Tensor], pool: PatternPool) -> float:
    """Return the fraction of importance that the best pattern of each kernel keeps, mean over layers."""
    tiny = torch.finfo(torch.float64).tiny
    layers = _flat(scores, 1, pool.entries)
    return sum(_total(flat, pool) / max(float(flat.double().sum()), tiny) for flat in layers) / len(layers)


def _flat(scores: Iterable[Tensor], size: int, entries: int) -> list[Tensor]:
    """Return scores as (kernels, k*k) float32 matrices, after checking that a pool can be chosen from them."""
    layers = [layer.flatten(2).flatten(0, 1).float() for layer in scores]
    widths = {layer.shape[1] for layer in layers}
    if len(widths) != 1:
        raise InvalidArgument(f"scores: expected at least one layer and one kernel size, got {sorted(widths)} weights")
    limit = len(all_patterns(entries, _side(layers[0])))
    if not 1 <= size <= limit:
        raise InvalidArgument(f"size={size}: expected 1 to {limit} patterns of {entries} entries")
    return layers


def _side(kernels: Tensor) -> int:
    return math.isqrt(kernels.shape[1])


def _best_of_all(kernels: Tensor, entries: int) -> Tensor:
    """Return the positions (kernels, entries) of the largest scores, ascending: the best pattern there is."""
    order = kernels.argsort(dim=1, descending=True, stable=True)
    return order[:, :entries].sort(dim=1).values


def _patterns(positions: Tensor, side: int) -> list[Pattern]:
    return [Pattern(side, tuple(row)) for row in positions.tolist()]


def _most_frequent(kernels: Tensor, size: int, entries: int) -> PatternPool:
    found, counts = torch.unique(_best_of_all(kernels, entries), dim=0, return_counts=True)  # lexicographic order
    order = counts.argsort(descending=True, stable=True)[:size]
    return _extended(_patterns(found[order], _side(kernels)), kernels[:_SAMPLE], size, entries)


def _extended(chosen: Sequence[Pattern], kernels: Tensor, size: int, entries: int) -> PatternPool:
    """Add, up to `size`, the pattern that raises the retained total by the most each time."""
    candidates = all_patterns(entries, _side(kernels))
    pool = list(chosen)
    if len(pool) < size:
        by_pattern = kernels @ candidates.masks().flatten(1).to(kernels).T
    while len(pool) < size:
        taken = [candidates.index(pattern) for pattern in pool]
        best = by_pattern[:, taken].amax(1, keepdim=True) if taken else by_pattern.new_zeros(len(kernels), 1)
        total = torch.maximum(by_pattern, best).sum(0)
        total[taken] = -torch.inf
        pool.append(candidates[int((total == total.max()).nonzero()[0])])  # the first of equals
    return PatternPool(tuple(pool))


def _exchanged(pool: PatternPool, kernels: Tensor) -> PatternPool:
    """Replace patterns one by one by better ones, given the others, until none can be."""
    total, unchanged, number = _total(kernels, pool), 0, 0
    while unchanged < len(pool):
        others = pool.patterns[:number] + pool.patterns[number + 1 :]
        proposal = _extended(others, kernels, len(pool), pool.entries)
        improved = _total(kernels, proposal)
        if improved > total * (1 + 1e-6):
            pool, total, unchanged = proposal, improved, 0
        else:
            unchanged, number = unchanged + 1, (number + 1) % len(pool)
    return pool


def _total(kernels: Tensor, pool: PatternPool) -> float:
    """Return the score that the best patterns of a pool retain."""
    return float(pattern_scores(kernels, pool)[0].double().sum())
