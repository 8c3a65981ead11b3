"""Dynamic pruning with feedback (Lin et al., ICLR 2020): prune for the forward pass, learn with all weights."""

from __future__ import annotations

from baselines.ramp import CubicRamp
from baselines.straight_through import SoftMasked


class DPF(SoftMasked):
    """Compute with the largest weights only, and apply that network's gradient to all of them.

    Source: Lin et al., "Dynamic model pruning with feedback" (ICLR 2020, arXiv 2006.07253): masks by magnitude anew
    every 16 steps along a cubic ramp; pruned weights feel the gradient too and can return; one run, no retraining.
    Deviations: no official code was found, so interval and end of the ramp are from descriptions; the budget counts
    convolutions only, so the classifier stays dense. After `end` the masks still move, at the final budget.

    Parameters
    ----------
    target_compression, epochs
        See `baselines.masking.Masked`.
    distribution : {"global", "uniform", "erk"}
        How the budget is spread over layers.
    begin, end : float
        Where the ramp begins and ends, as fractions of the run.
    every : int
        Steps between two changes of the masks.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the target cannot be met.
    """

    name = "dpf"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 300,
        *,
        distribution: str = "global",
        begin: float = 0.0,
        end: float = 0.75,
        every: int = 16,
    ) -> None:
        super().__init__(target_compression, epochs, distribution)
        self.ramp = CubicRamp(begin, end, every)
        self.every = every

    def before_forward(self) -> None:
        """Choose masks anew, where that is due."""
        step, steps = self.step_number, self.total_steps
        if self.ramp.is_due(step, steps) or (self.ramp.is_over(step, steps) and step % self.every == 0):
            weights = sum(weight.numel() for weight in self.weights.values())
            self.adopt(self.magnitude_masks(self.ramp.kept(step, steps, weights, self.budget)))
