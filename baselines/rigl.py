"""RigL (Evci et al., ICML 2020): connections grow where the dense gradient is largest."""

from __future__ import annotations

from baselines.topology import MovingTopology
from clicktrain.flops import Densities


class RigL(MovingTopology):
    """Train sparse from the first step on; connections move to where the gradient is largest.

    Source: Evci et al., "Rigging the Lottery" (ICML 2020) and google-research/rigl: ERK, a drop share of 0.3 with
    cosine annealing, a change every 100 steps until 75 % of the run; in a step of change no weight is updated. Such
    a step needs the gradient of all weights and is charged for it.
    Deviations: the budget counts convolutions only, so first convolution, residual shortcuts and classifier stay
    dense (in the source ERK makes them sparse too).

    Parameters
    ----------
    target_compression, epochs, distribution, drop, every, stop
        See `baselines.topology.MovingTopology`.
    """

    name = "rigl"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 250,
        *,
        distribution: str = "erk",
        drop: float = 0.3,
        every: int | None = 100,
        stop: float = 0.75,
    ) -> None:
        super().__init__(target_compression, epochs, distribution, drop, every, stop)
        self._is_changing = False

    def after_backward(self) -> None:
        """Move connections where that is due, and then skip the update; else mask the gradients."""
        self._is_changing = self.is_due()
        if not self._is_changing:
            super().after_backward()
            return
        gradients = {name: weight.grad for name, weight in self.weights.items()}
        self.move({name: gradient.abs() for name, gradient in gradients.items() if gradient is not None})
        for parameter in self.model.parameters():
            parameter.grad = None  # optimizers pass over parameters without a gradient

    def after_step(self) -> None:
        """Count the step."""
        super().after_step()
        self._is_changing = False

    def densities(self) -> Densities:
        """Return the share of kept weights; in a step of change the grad-weight pass is dense."""
        if not self._is_changing:
            return super().densities()
        return {name: (forward, grad_input, 1.0) for name, (forward, grad_input, _) in self._densities.items()}
