"""What SET and RigL share: a network sparse from the first step on, whose connections move."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.budgets import check_distribution, largest, layer_counts
from baselines.masking import Masked
from clicktrain.errors import InvalidArgument


class MovingTopology(Masked):
    """Base of methods that drop small weights and let as many others grow, layer by layer.

    Parameters
    ----------
    target_compression, epochs
        See `baselines.masking.Masked`.
    distribution : {"erk", "uniform"}
        How the connections are spread over layers; they never move from one layer to another.
    drop : float
        Share of a layer's connections dropped at the first change; annealed with a cosine.
    every : int or None
        Steps between changes; None: an epoch.
    stop : float
        Fraction of the run after which the connections stay.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the target cannot be met.
    """

    def __init__(
        self, target_compression: float, epochs: int, distribution: str, drop: float, every: int | None, stop: float
    ) -> None:
        super().__init__(target_compression, epochs, check_distribution(distribution, ("erk", "uniform")))
        if not 0 < drop < 1:
            raise InvalidArgument(f"drop={drop}: expected a share between 0 and 1")
        if every is not None and every < 1:
            raise InvalidArgument(f"every={every}: expected at least 1 step")
        if not 0 <= stop <= 1:
            raise InvalidArgument(f"stop={stop}: expected a fraction of the run, 0 to 1")
        self.drop, self.every, self.stop = drop, every, stop

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Choose the first connections at random; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        counts = layer_counts(shapes, self.budget, self.distribution)
        scores = self.random_scores()
        self.set_masks({name: largest(scores[name], counts[name]) for name in shapes})

    def is_due(self) -> bool:
        """Tell whether connections change in the present step."""
        every = self.every or self.steps_per_epoch
        return 0 < self.step_number < self.stop * self.total_steps and self.step_number % every == 0

    def move(self, growth: Mapping[str, Tensor]) -> None:
        """Drop the smallest connections of each layer, and grow as many where `growth` is largest.

        A connection dropped may grow again at once, and then keeps its weight; all others begin at zero.
        """
        share = self.drop / 2 * (1 + math.cos(math.pi * self.step_number / (self.stop * self.total_steps)))
        moved = {}
        for name, mask in self._masks.items():
            active = int(mask.sum())
            magnitude = torch.where(mask, self.weights[name].detach().abs(), -1.0)
            stays = largest(magnitude, active - min(round(share * active), mask.numel() - active))
            candidates = torch.where(stays, -torch.inf, growth[name])
            moved[name] = stays | largest(candidates, active - int(stays.sum()))
        self.set_masks(moved)
