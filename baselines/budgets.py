"""Budgets of single weights: how many each layer keeps under a target for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument
from clicktrain.flops import LayerCost

Distribution = Literal["uniform", "erk", "global"]
"""How a budget is spread over layers: the same density in each, denser where layers are small (Erdos-Renyi kernel,
Evci et al., 2020), or wherever the weights are largest."""


def check_distribution(name: str, allowed: Sequence[str] = get_args(Distribution)) -> Distribution:
    """Return the name of a distribution that a method offers.

    Raises
    ------
    InvalidArgument
        It does not.
    """
    if name not in allowed:
        raise InvalidArgument(f"distribution={name!r}: expected {', '.join(allowed)}")
    return name  # type: ignore[return-value]


def total_budget(costs: Sequence[LayerCost], layers: Mapping[str, Tensor], target_compression: float) -> int:
    """Return how many weights the pruned layers may keep together, so that the target is met.

    Parameters
    ----------
    costs : sequence of LayerCost
        All layers of the dense model. As for ClickTrain, the target counts all convolutions but residual shortcuts.
    layers : mapping of Tensor
        Layer name -> weight, of the layers to be pruned.
    target_compression : float
        Dense / kept weights.

    Raises
    ------
    InvalidArgument
        If no choice meets the target, one weight a layer being the least; the message names what is feasible.
    """
    counted = [cost for cost in costs if cost.is_counted("paper")]
    dense = sum(cost.weights for cost in counted)
    fixed = sum(cost.weights for cost in counted if cost.name not in layers)
    most = dense / (fixed + len(layers))
    if not 1 <= target_compression <= most:
        raise InvalidArgument(
            f"target_compression={target_compression}: feasible are 1 to {most:.4g} for single weights of this model"
        )
    return math.floor(Fraction(dense) / Fraction(str(target_compression))) - fixed


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return the Erdos-Renyi kernel densities of layers: proportional to (sum of dimensions) / (product of them).

    Parameters
    ----------
    shapes : mapping
        Layer name -> shape of the weight, (C_out, C_in, k, k) or (outputs, inputs).
    density : float
        Kept / all weights of these layers together, in (0, 1].

    Returns
    -------
    dict
        Layer name -> density in (0, 1]; layers that would pass 1 are dense, and the others scaled up no further
        than the budget allows.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    dense: set[str] = set()
    while True:
        spread = sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        scale = (budget - sum(sizes[name] for name in dense)) / spread if spread else 0.0
        too_dense = {name for name in shapes if name not in dense and raw[name] * scale > 1}
        if not too_dense:
            return {name: 1.0 if name in dense else raw[name] * scale for name in shapes}
        dense |= too_dense


def layer_counts(shapes: Mapping[str, Sequence[int]], total: int, distribution: Distribution) -> dict[str, int]:
    """Return how many weights each layer keeps, at least one each, exactly `total` together.

    Parameters
    ----------
    shapes : mapping
        Layer name -> shape of the weight.
    total : int
        From the number of layers to the number of weights.
    distribution : {"uniform", "erk"}
        See `Distribution`; "global" needs scores, see `largest`.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    density = total / sum(sizes.values())
    densities = erk_densities(shapes, density) if distribution == "erk" else dict.fromkeys(shapes, density)
    ideal = {name: densities[name] * sizes[name] for name in shapes}
    counts = {name: min(max(1, math.floor(ideal[name])), sizes[name]) for name in shapes}
    # Rounding leaves a few weights over (or lacks them): they go to the layers that lost (won) most by it.
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        able = [name for name in shapes if 1 <= counts[name] + step <= sizes[name]]
        chosen = max(able, key=lambda name: step * (ideal[name] - counts[name]))
        counts[chosen] += step
    return counts


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a bool tensor that marks the `count` largest scores; of equals the first ones."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(scores.shape)


def largest_everywhere(scores: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
    """Mark the `total` largest scores of all layers together, after the largest one of each layer."""
    protected = {name: torch.where(largest(score, 1), torch.inf, score) for name, score in scores.items()}
    flat = largest(torch.cat([score.flatten() for score in protected.values()]), total)
    parts = torch.split(flat, [score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def by_magnitude(weights: Mapping[str, Tensor], total: int, distribution: Distribution) -> dict[str, Tensor]:
    """Return masks of the weights that are largest in magnitude, `total` of them, spread as asked for."""
    if distribution == "global":
        return largest_everywhere({name: weight.detach().abs() for name, weight in weights.items()}, total)
    counts = layer_counts({name: weight.shape for name, weight in weights.items()}, total, distribution)
    return largest_by_layer(weights, counts)


def largest_by_layer(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return masks of the weights that are largest in magnitude, so many in each layer."""
    return {name: largest(weight.detach().abs(), counts[name]) for name, weight in weights.items()}
