"""What element-wise methods share: masks over the convolutions that ClickTrain prunes, at the same budget.

Masked-out weights are zero and stay so. The arithmetic of such a layer is dense; its cost is counted by the
weights that exist, as the publications count it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.budgets import Distribution, by_magnitude, check_distribution, total_budget
from clicktrain.data.seeding import derived_generator
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.flops import Densities, LayerCost, layer_costs
from clicktrain.method import Batches, Method, Phase
from clicktrain.selection import prunable_layers


class Masked(Method):
    """Base of methods that keep single weights; a subclass decides when and which.

    Parameters
    ----------
    target_compression : float
        Dense / kept convolution weights, counted as ClickTrain's: residual shortcuts left out, the first
        convolution counted and dense.
    epochs : int
        Length of the (first phase of the) run.
    distribution : {"uniform", "erk", "global"}
        How the budget is spread over layers, see `baselines.budgets.Distribution`.

    Attributes
    ----------
    budget : int
        Weights that the pruned layers keep together at the end; known after `setup`.
    kept : int
        Weights that the masks keep now; 0 before there are masks.
    step_number : int
        Number of the present step, at the length of the present phase's epochs.
    """

    recordable = True

    def __init__(self, target_compression: float, epochs: int, distribution: str = "uniform") -> None:
        if epochs < 1:
            raise InvalidArgument(f"epochs={epochs}: expected at least 1")
        self.target_compression, self.epochs = target_compression, epochs
        self.distribution: Distribution = check_distribution(distribution)
        self.budget = self.kept = 0
        self.step_number = 0
        self.steps_per_epoch = 1
        self._masks: dict[str, Tensor] = {}
        self._densities: dict[str, tuple[float, float, float]] = {}
        self._convs: dict[str, nn.Conv2d] = {}

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase, at the run's own settings."""
        return [Phase(self.name, self.epochs)]

    @property
    def dense_epochs(self) -> int:
        """The whole first phase, where that is called dense: see `Method.dense_epochs`."""
        return self.epochs if self.phases[0].name == "dense" else 0

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that may be masked, by layer name."""
        return {name: conv.weight for name, conv in self._convs.items()}

    @property
    def total_steps(self) -> int:
        """Steps of the first phase, once an epoch has begun."""
        return self.epochs * self.steps_per_epoch

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and its optimizer, and check the budget; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        shape = tuple(example_input.shape[1:])
        self._convs = prunable_layers(model, shape)
        self.budget = self.choose_budget(layer_costs(model, shape))

    def choose_budget(self, costs: Sequence[LayerCost]) -> int:
        """Return the weights that the layers in `weights` keep together, or raise InvalidArgument."""
        return total_budget(costs, self.weights, self.target_compression)

    def on_epoch(self, epoch: int, loader: Batches) -> None:
        """Learn how many steps an epoch has, and with it the number of the next one."""
        self.steps_per_epoch = max(1, len(loader))
        self.step_number = epoch * self.steps_per_epoch  # not counted: dense epochs may be another run's

    def after_backward(self) -> None:
        """Zero the gradients of masked-out weights, so that momentum and decay leave these at zero."""
        for name, mask in self._masks.items():
            gradient = self._convs[name].weight.grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0.0)

    def after_step(self) -> None:
        """Count the step."""
        self.step_number += 1

    def finish(self) -> nn.Module:
        """Return the model, with zeros where weights were masked out.

        Raises
        ------
        ClickTrainError
            More weights are left than the budget allows: the run was cut short.
        """
        if self.kept != self.budget:
            raise ClickTrainError(
                f"finish() of {self.name} after {self.step_number} steps: the budget of {self.budget} weights "
                f"is not reached yet: train on"
            )
        return self.model

    def masks(self) -> dict[str, Tensor]:
        """Return what is kept, by layer name; empty before anything is chosen."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def densities(self) -> Densities:
        """Return the share of kept weights of each masked layer, in all three passes."""
        return self._densities

    def magnitude_masks(self, total: int) -> dict[str, Tensor]:
        """Return masks of the `total` largest weights, spread as the method was told."""
        return by_magnitude(self.weights, total, self.distribution)

    def random_scores(self) -> dict[str, Tensor]:
        """Return uniform random numbers for every weight: functions of the seed, the step and the layer."""
        return {
            name: torch.rand(
                weight.shape, generator=derived_generator("connections", self.seed, self.step_number, number)
            ).to(weight.device)
            for number, (name, weight) in enumerate(self.weights.items())
        }

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Adopt masks: weights outside become zero, and so does what the optimizer remembers of them."""
        self.adopt(masks)
        with torch.no_grad():
            for name, mask in self._masks.items():
                weight = self._convs[name].weight
                weight.masked_fill_(~mask, 0.0)
                for entry in self.optimizer.state.get(weight, {}).values():
                    if isinstance(entry, Tensor) and entry.shape == weight.shape:
                        entry.masked_fill_(~mask, 0.0)

    def adopt(self, masks: Mapping[str, Tensor]) -> None:
        """Take masks as they are, without touching any weight."""
        self._masks = {name: mask.to(self._convs[name].weight.device) for name, mask in masks.items()}
        counts = {name: int(mask.sum()) for name, mask in self._masks.items()}
        self.kept = sum(counts.values())
        self._densities = {name: (count / self._masks[name].numel(),) * 3 for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return masks and progress."""
        masks = {name: mask.cpu() for name, mask in self._masks.items()}
        return {"masks": masks, "step": self.step_number, "steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; the weights come with the model's own state."""
        self.step_number, self.steps_per_epoch = state["step"], state["steps_per_epoch"]
        self.adopt(state["masks"])
