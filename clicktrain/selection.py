"""From importance scores to the sparsity of a whole model: pool, budget and assignment of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clicktrain.assignment import Assignment, Ranking, assign, pattern_scores
from clicktrain.budget import LayerSize, from_ratios, share_out
from clicktrain.errors import InvalidArgument
from clicktrain.flops import LayerCost, layer_costs
from clicktrain.layers import check_prunable
from clicktrain.patterns import PatternPool, full_pool, official_pool
from clicktrain.pool import coverage_pool, frequency_pool

PoolChoice = Literal["coverage", "frequency", "official"]


@dataclass(frozen=True)
class Sparsity:
    """How sparse a model is to become, and from which patterns.

    Parameters
    ----------
    target_compression : float, optional
        Dense / kept convolution weights, residual shortcuts not counted; shared out over the layers.
    target_flops : float, optional
        Dense / remaining inference MACs of all convolutions; shared out over the layers.
    ratios : sequence or mapping of float, optional
        Percent of kernels to remove in each layer, in the order in which the model runs them or by name.
    pool : {"coverage", "frequency", "official"} or PatternPool
        Patterns for 3x3 kernels: chosen from the scores, or given.
    patterns : int
        Size of a chosen pool.
    entries : int
        Weights that each pattern of a chosen pool keeps.
    rank_by : {"kernel", "pattern"}
        See `clicktrain.assignment.assign`.
    share_filters : int
        Filters of a block that keep the same kernels and patterns; see there.

    Raises
    ------
    InvalidArgument
        Unless exactly one of the three budgets is given and all else has a meaning.
    """

    target_compression: float | None = None
    target_flops: float | None = None
    ratios: Sequence[float] | Mapping[str, float] | None = None
    pool: PoolChoice | PatternPool = "coverage"
    patterns: int = 4
    entries: int = 4
    rank_by: Ranking = "pattern"
    share_filters: int = 1

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in ("target_compression", "target_flops", "ratios")}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) != 1:
            raise InvalidArgument(
                f"budget: {' and '.join(given) or 'none'} given, expected one of {', '.join(budgets)}"
            )
        for name in ("target_compression", "target_flops"):
            if budgets[name] is not None and not float(budgets[name]) > 0:
                raise InvalidArgument(f"{name}={budgets[name]}: expected a ratio above 1")
        if isinstance(self.pool, str) and self.pool not in get_args(PoolChoice):
            raise InvalidArgument(f"pool={self.pool!r}: expected a PatternPool or {', '.join(get_args(PoolChoice))}")
        if self.pool == "official":
            official_pool(self.patterns)
        if self.share_filters < 1:
            raise InvalidArgument(f"share_filters={self.share_filters}: expected at least 1")
        if self.rank_by not in get_args(Ranking):
            raise InvalidArgument(f"rank_by={self.rank_by!r}: expected {' or '.join(get_args(Ranking))}")


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """What is chosen for one layer.

    Attributes
    ----------
    patterns : Assignment
        A pattern for every kernel, none removed.
    kept : Assignment
        The same with connectivity pruned.
    """

    patterns: Assignment
    kept: Assignment


def prunable_layers(model: nn.Module, input_shape: Sequence[int]) -> dict[str, nn.Conv2d]:
    """Return the convolutions that ClickTrain prunes, in the order in which the model runs them.

    These are all but the first one, which sees the image, and residual shortcuts.

    Parameters
    ----------
    model : nn.Module
        Run once without gradient; its state stays as it was.
    input_shape : (int, int, int)
        Channels, height and width of an image that the model accepts.

    Raises
    ------
    InvalidArgument
        If such a layer is grouped, dilated or not square, or the model has none.
    """
    chosen: dict[str, nn.Conv2d] = {}
    for cost in layer_costs(model, input_shape):
        module = model.get_submodule(cost.name)
        if isinstance(module, nn.Conv2d) and _is_prunable(cost):
            check_prunable(module, cost.name)
            chosen[cost.name] = module
    if not chosen:
        raise InvalidArgument(f"model {type(model).__name__} has no convolution to prune beside its first")
    return chosen


def _is_prunable(cost: LayerCost) -> bool:
    return cost.kind == "conv" and not cost.is_first and not cost.is_shortcut


def select(scores: Mapping[str, Tensor], costs: Sequence[LayerCost], sparsity: Sparsity) -> dict[str, LayerSelection]:
    """Choose pool, budget and assignment of every layer that has scores.

    Parameters
    ----------
    scores : mapping of Tensor, each (C_out, C_in, k, k)
        Importance by layer, in the order in which the model runs them.
    costs : sequence of LayerCost
        All layers of the model, from `clicktrain.flops.layer_costs`.
    sparsity : Sparsity
        Budget and patterns.

    Returns
    -------
    dict
        Layer name -> LayerSelection.
    """
    pools = _pools(scores, sparsity)
    positions = {cost.name: cost.positions for cost in costs}
    sizes = {name: LayerSize.of(score.shape, pools[name].entries, positions[name]) for name, score in scores.items()}
    retained = {name: pattern_scores(score.flatten(2), pools[name])[0] for name, score in scores.items()}
    kept = kept_kernels(sizes, retained, costs, sparsity)
    chosen = {}
    for name, score in scores.items():
        share = sparsity.share_filters
        patterns = assign(score, pools[name], sizes[name].kernels, share_filters=share)
        chosen[name] = LayerSelection(patterns, assign(score, pools[name], kept[name], sparsity.rank_by, share))
    return chosen


def _pools(scores: Mapping[str, Tensor], sparsity: Sparsity) -> dict[str, PatternPool]:
    """Choose one pool for all 3x3 layers; kernels of other sizes are only kept or removed."""
    squares = [score for score in scores.values() if score.shape[-1] == 3]
    pool = _pool(squares, sparsity) if squares else full_pool(3)
    sizes = {name: score.shape[-1] for name, score in scores.items()}
    return {name: pool if size == 3 else full_pool(size) for name, size in sizes.items()}


def _pool(scores: Sequence[Tensor], sparsity: Sparsity) -> PatternPool:
    if isinstance(sparsity.pool, PatternPool):
        return sparsity.pool
    if sparsity.pool == "official":
        return official_pool(sparsity.patterns)
    choose = coverage_pool if sparsity.pool == "coverage" else frequency_pool
    return choose(scores, sparsity.patterns, sparsity.entries)


def check_budget(shapes: Mapping[str, Sequence[int]], costs: Sequence[LayerCost], sparsity: Sparsity) -> None:
    """Raise InvalidArgument if layers of these shapes (C_out, C_in, k, k) cannot meet the budget."""
    entries = sparsity.entries if isinstance(sparsity.pool, str) else sparsity.pool.entries
    positions = {cost.name: cost.positions for cost in costs}
    sizes = {
        name: LayerSize.of(shape, entries if shape[-1] == 3 else shape[-1] ** 2, positions[name])
        for name, shape in shapes.items()
    }
    kept_kernels(
        sizes, {name: torch.ones(size.filters, size.channels) for name, size in sizes.items()}, costs, sparsity
    )


def kept_kernels(
    sizes: Mapping[str, LayerSize],
    retained: Mapping[str, Tensor],
    costs: Sequence[LayerCost],
    sparsity: Sparsity,
) -> dict[str, int]:
    """Return the kept kernels of each layer to be pruned.

    Parameters
    ----------
    sizes : mapping
        Layer name -> size, in the order in which the model runs them.
    retained : mapping of Tensor, each (C_out, C_in)
        Importance that each kernel would retain; not used for given ratios.
    costs : sequence of LayerCost
        All layers of the model, from `clicktrain.flops.layer_costs`.
    sparsity : Sparsity
        The budget.

    Raises
    ------
    InvalidArgument
        If the budget cannot be met, see `clicktrain.budget`.
    """
    if sparsity.ratios is not None:
        return from_ratios(sizes, sparsity.ratios)
    if sparsity.target_compression is not None:
        dense = [cost for cost in costs if cost.is_counted("paper") and cost.name not in sizes]
        return share_out(sizes, retained, sparsity.target_compression, sum(cost.weights for cost in dense))
    assert sparsity.target_flops is not None
    dense = [cost for cost in costs if cost.kind == "conv" and cost.name not in sizes]
    return share_out(sizes, retained, sparsity.target_flops, sum(cost.macs for cost in dense), "macs")
