"""A narrower dense network of the same size or cost as a pruned one: what every pruning method has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.shrinking import Shrinking
from clicktrain.errors import InvalidArgument
from clicktrain.flops import layer_costs


class SmallDense(Shrinking):
    """Ordinary training of the network with fewer channels in every layer, from the first step on.

    The widest network of one width multiplier that fits the budget: each group of channels keeps the same share of
    them, rounded down, at least one; what rounding left over is spent on single channels. The first channels of the
    dense network stay, and their initial weights are scaled by sqrt(dense inputs / inputs left), so that activations
    begin as large as in the dense network.

    Parameters
    ----------
    target_compression : float, optional
        Dense / remaining convolution weights, residual shortcuts not counted.
    target_flops : float, optional
        Dense / remaining inference MACs of all convolutions. Exactly one of the two.
    epochs : int
        Length of the run.

    Raises
    ------
    InvalidArgument
        Unless exactly one budget is given; in `setup`, if it cannot be met or channels cannot be followed.
    """

    name = "small-dense"

    def __init__(
        self, target_compression: float | None = None, epochs: int = 160, *, target_flops: float | None = None
    ) -> None:
        super().__init__(epochs)
        if (target_compression is None) == (target_flops is None):
            raise InvalidArgument("budget: expected exactly one of target_compression and target_flops")
        self.target_compression, self.target_flops = target_compression, target_flops

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and make it narrow; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        costs = layer_costs(model, tuple(example_input.shape[1:]))
        by_flops = self.target_flops is not None
        counted = [cost for cost in costs if cost.is_counted("all_convs" if by_flops else "paper")]
        self._costs = {cost.name: cost.macs if by_flops else cost.weights for cost in counted}
        left = self._widest()
        inputs = {name: self.layer(name).weight[0].numel() for name in self.layers}
        self.shrink({number: torch.arange(count) for number, count in left.items()})
        with torch.no_grad():
            for name, before in inputs.items():
                self.layer(name).weight.mul_(math.sqrt(before / self.layer(name).weight[0].numel()))

    def _widest(self) -> dict[int, int]:
        """Return by group the channels of the widest network that fits."""
        target = self.target_compression if self.target_flops is None else self.target_flops
        assert target is not None
        dense = sum(self._costs.values())
        groups = [group.channels for group in self.graph.groups if not group.is_fixed]
        # Channel counts change at these widths only.
        widths = sorted({kept / channels for channels in groups for kept in range(1, channels + 1)})
        most = dense / self._cost(self._counts(0.0))
        if not 1 <= target <= most:
            name = "target_compression" if self.target_flops is None else "target_flops"
            raise InvalidArgument(f"{name}={target}: feasible are 1 to {most:.4g} for a narrower network")
        low, high = -1, len(widths) - 1  # the cost of `low` fits, -1 being one channel everywhere
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._cost(self._counts(widths[middle])) * target <= dense
            low, high = (middle, high) if fits else (low, middle - 1)
        return self._filled(self._counts(widths[low] if low >= 0 else 0.0), dense / target)

    def _filled(self, counts: dict[int, int], budget: float) -> dict[int, int]:
        """Spend what rounding left over on single channels, for the groups that lost most by it first."""
        groups = self.graph.groups
        while True:
            order = sorted(counts, key=lambda number: counts[number] / groups[number].channels)
            for number in order:
                more = counts | {number: counts[number] + 1}
                if counts[number] < groups[number].channels and self._cost(more) <= budget:
                    counts = more
                    break
            else:
                return counts

    def _counts(self, width: float) -> dict[int, int]:
        return {
            number: max(1, math.floor(width * group.channels + 1e-9))
            for number, group in enumerate(self.graph.groups)
            if not group.is_fixed
        }

    def _cost(self, counts: dict[int, int]) -> float:
        """Return the weights or MACs of the counted convolutions at these numbers of channels."""
        total = 0.0
        for name, dense in self._costs.items():
            cost = float(dense)
            for number in (self.graph.reads[name], self.graph.writes[name]):
                if number in counts:
                    cost = cost * counts[number] / self.graph.groups[number].channels
            total += cost
        return total
