"""Gradual magnitude pruning (Zhu & Gupta, 2017): ever more of the smallest weights go while training runs."""

from __future__ import annotations

from baselines.masking import Masked
from baselines.ramp import CubicRamp


class GradualMagnitude(Masked):
    """Prune the smallest weights during training, along a cubic ramp.

    Source: Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878). Begin, end and interval are those of the
    CIFAR runs in google-research/rigl (20,000 to 75,000 of 97,656 steps, every 1,000), as fractions of the run.
    Deviations: a masked weight is set to zero and cannot return (in the source it keeps its last value); the budget
    counts convolutions only, so the classifier stays dense.

    Parameters
    ----------
    target_compression, epochs
        See `baselines.masking.Masked`.
    distribution : {"uniform", "erk", "global"}
        "uniform" is the source's: the same sparsity in each layer.
    begin, end : float
        Where the ramp begins and ends, as fractions of the run.
    every : int, optional
        Steps between two changes of the masks; unset: a hundredth of the run.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the target cannot be met.
    """

    name = "gradual-magnitude"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 160,
        *,
        distribution: str = "uniform",
        begin: float = 0.2,
        end: float = 0.77,
        every: int | None = None,
    ) -> None:
        super().__init__(target_compression, epochs, distribution)
        self.ramp = CubicRamp(begin, end, every)

    @property
    def stage(self) -> str:
        """Return "dense" before the first weight goes, then "pruning", then "sparse"."""
        if not self._masks:
            return "dense"
        return "sparse" if self.kept == self.budget else "pruning"

    def before_forward(self) -> None:
        """Prune, where the ramp says so."""
        if self.ramp.is_due(self.step_number, self.total_steps):
            weights = sum(weight.numel() for weight in self.weights.values())
            kept = self.ramp.kept(self.step_number, self.total_steps, weights, self.budget)
            self.set_masks(self.magnitude_masks(kept))
