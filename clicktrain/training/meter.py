"""What a run has spent: FLOPs of training, stage by stage, from what the method reports."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from clicktrain.flops import Densities, LayerCost, TrainingCost
from clicktrain.method import Method


class CostMeter:
    """Charges each step, and what a method spends between steps, to the method's current stage.

    Parameters
    ----------
    layers : list of LayerCost
        Of the dense network.

    Attributes
    ----------
    cost : TrainingCost
        The sums over all stages.
    by_stage : dict
        Stage name -> FLOPs.
    """

    def __init__(self, layers: list[LayerCost]) -> None:
        self.cost = TrainingCost(layers)
        self.by_stage: dict[str, float] = defaultdict(float)
        self._weights = {layer.name: layer.weights for layer in layers if layer.is_counted("all_convs")}
        self._extra = 0.0

    def add_step(self, stage: str, densities: Densities, images: int) -> None:
        """Charge one step on so many images."""
        before = self.cost.flops
        self.cost.add_step(densities, images)
        self.by_stage[stage] += self.cost.flops - before

    def add_extra(self, method: Method) -> None:
        """Charge what the method spent outside of steps since the last call."""
        new, self._extra = method.extra_flops - self._extra, method.extra_flops
        self.cost.extra(new)
        self.by_stage[method.stage] += new

    def density(self, densities: Densities) -> float:
        """Return the share of convolution weights that the forward pass uses."""
        used = sum(weights * densities.get(name, (1.0,))[0] for name, weights in self._weights.items())
        return used / sum(self._weights.values())

    def state_dict(self) -> dict[str, Any]:
        """Return all counters."""
        return {"cost": self.cost.state_dict(), "by_stage": dict(self.by_stage), "extra": self._extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all counters to those of `state_dict`."""
        self.cost.load_state_dict(state["cost"])
        self.by_stage = defaultdict(float, state["by_stage"])
        self._extra = state["extra"]
