"""Budgets: how many kernels each layer keeps, from given ratios or from one target for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument

Cost = Literal["weights", "macs"]


@dataclass(frozen=True)
class LayerSize:
    """What a budget must know of one layer to be pruned.

    Attributes
    ----------
    filters, channels : int
        C_out and C_in.
    kernel_weights : int
        Weights of a dense kernel, k*k.
    entries : int
        Weights that a kept kernel keeps.
    pixels : int
        Output pixels H_out * W_out, so that one kept weight costs `pixels` MACs.
    """

    filters: int
    channels: int
    kernel_weights: int
    entries: int
    pixels: int

    @classmethod
    def of(cls, weight_shape: Sequence[int], entries: int, pixels: int) -> LayerSize:
        """Build from the shape (C_out, C_in, k, k) of a dense weight."""
        filters, channels, height, width = weight_shape
        return cls(filters, channels, height * width, entries, pixels)

    @property
    def kernels(self) -> int:
        """Kernels of the layer, C_out * C_in."""
        return self.filters * self.channels

    def dense_cost(self, cost: Cost) -> int:
        """Weights or MACs of the dense layer."""
        return self.kernels * self.kernel_weights * (self.pixels if cost == "macs" else 1)

    def kernel_cost(self, cost: Cost) -> int:
        """Weights or MACs of one kept kernel."""
        return self.entries * (self.pixels if cost == "macs" else 1)


def from_ratios(layers: Mapping[str, LayerSize], ratios: Mapping[str, float] | Sequence[float]) -> dict[str, int]:
    """Return kept kernels by layer for given pruning ratios.

    Parameters
    ----------
    layers : mapping
        Layer name -> size, in the order in which the model runs them.
    ratios : mapping or sequence of float
        Percent of kernels removed, by name or in that order; ceil(ratio * kernels / 100) are removed.

    Raises
    ------
    InvalidArgument
        If the number or names of ratios are not those of the layers, or a ratio is outside [0, 100) or leaves
        a filter without a kernel.
    """
    if not isinstance(ratios, Mapping):
        if len(ratios) != len(layers):
            raise InvalidArgument(f"ratios: {len(ratios)} values for {len(layers)} prunable layers")
        ratios = dict(zip(layers, ratios, strict=True))
    if set(ratios) != set(layers):
        odd = sorted(set(ratios) ^ set(layers))
        raise InvalidArgument(f"ratios: layers {', '.join(odd)} are missing or unknown")
    return {name: layer.kernels - _removed(name, layer, ratios[name]) for name, layer in layers.items()}


def _removed(name: str, layer: LayerSize, ratio: float) -> int:
    if not 0 <= ratio < 100:
        raise InvalidArgument(f"ratio {ratio} of layer {name}: expected percent in [0, 100)")
    removed = math.ceil(Fraction(str(ratio)) * layer.kernels / 100)  # exact: 0.55 is not a binary fraction
    if layer.kernels - removed < layer.filters:
        raise InvalidArgument(f"ratio {ratio} of layer {name}: leaves a filter without a kernel")
    return removed


def feasible_interval(layers: Mapping[str, LayerSize], fixed: int, cost: Cost = "weights") -> tuple[float, float]:
    """Return the smallest and the largest compression that patterns and connectivity can reach.

    At the smallest every kernel keeps its pattern, at the largest every filter keeps one kernel.

    Parameters
    ----------
    layers : mapping
        Layers to be pruned.
    fixed : int
        Cost of the counted layers that stay dense, such as the first convolution.
    cost : {"weights", "macs"}
        What is compressed.
    """
    dense = fixed + sum(layer.dense_cost(cost) for layer in layers.values())
    most = fixed + sum(layer.kernels * layer.kernel_cost(cost) for layer in layers.values())
    least = fixed + sum(layer.filters * layer.kernel_cost(cost) for layer in layers.values())
    return dense / most, dense / least


def share_out(
    layers: Mapping[str, LayerSize],
    kernel_scores: Mapping[str, Tensor],
    target: float,
    fixed: int,
    cost: Cost = "weights",
) -> dict[str, int]:
    """Return kept kernels by layer so that one target for the model is met with the most importance retained.

    Maximises the sum over layers of log(retained fraction of importance). The logarithm keeps any layer from
    being emptied, and makes scores of different layers comparable without a scale. Kernels enter best first,
    so each layer's curve is concave and taking the best gain for its cost, until the budget is spent, is
    optimal up to the last kernel.

    Parameters
    ----------
    layers : mapping
        Layer name -> size.
    kernel_scores : mapping of Tensor, each (C_out, C_in)
        Importance that each kernel would retain.
    target : float
        Dense cost / remaining cost, over the layers and `fixed`; the result reaches at least this.
    fixed : int
        Cost of the counted layers that stay dense.
    cost : {"weights", "macs"}
        What the target counts: weights (`target_compression`) or inference MACs (`target_flops`).

    Raises
    ------
    InvalidArgument
        If the target is outside the feasible interval, which the message names.
    """
    low, high = feasible_interval(layers, fixed, cost)
    if not low <= target <= high:
        what = "target_compression" if cost == "weights" else "target_flops"
        raise InvalidArgument(f"{what}={target}: feasible are {low:.4g} to {high:.4g} for this model")
    dense = fixed + sum(layer.dense_cost(cost) for layer in layers.values())
    kept = {name: layer.filters for name, layer in layers.items()}
    spent = fixed + sum(layer.filters * layer.kernel_cost(cost) for layer in layers.values())
    gains, owner, costs = _gains(layers, kernel_scores, cost)
    order = (gains / costs).argsort(descending=True, stable=True)
    running = spent + costs[order].cumsum(0)
    affordable = int((running <= math.floor(Fraction(dense) / Fraction(str(target)))).sum())
    counts = torch.bincount(owner[order[:affordable]], minlength=len(layers)).tolist()
    return {name: kept[name] + count for name, count in zip(layers, counts, strict=True)}


def _gains(
    layers: Mapping[str, LayerSize], kernel_scores: Mapping[str, Tensor], cost: Cost
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gain, layer number and cost of each kernel beyond the one that every filter keeps anyway."""
    gains, owner, costs = [], [], []
    for number, (name, layer) in enumerate(layers.items()):
        scores = kernel_scores[name].double().cpu()
        best, column = scores.max(1)
        rest = scores.scatter(1, column[:, None], -1.0).flatten().sort(descending=True).values[: -len(best) or None]
        total = scores.sum().clamp_min(torch.finfo(scores.dtype).tiny)
        # A part in a million for each kernel, so that kernels without any score still have an order and a gain.
        floor = 1e-6 / scores.numel()
        base = best.sum() / total + floor * len(best)
        curve = torch.cat([base[None], base + (rest / total + floor).cumsum(0)])
        gains.append(curve.log().diff())
        owner.append(torch.full((len(rest),), number))
        costs.append(torch.full((len(rest),), layer.kernel_cost(cost), dtype=torch.int64))
    return torch.cat(gains), torch.cat(owner), torch.cat(costs)
