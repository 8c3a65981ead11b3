"""SET (Mocanu et al., 2018): connections grow at random."""

from __future__ import annotations

from baselines.topology import MovingTopology


class SET(MovingTopology):
    """Train sparse from the first step on; small connections move to random places.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018),
    in the settings of varun19299/rigl-reproducibility: a change after every epoch, a drop share of 0.5.
    Deviations: cosine annealing of the share and the stop at 75 % of the run, as RigL's authors compare it; the
    budget counts convolutions only, so first convolution, residual shortcuts and classifier stay dense.

    Parameters
    ----------
    target_compression, epochs, distribution, drop, every, stop
        See `baselines.topology.MovingTopology`.
    """

    name = "set"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 250,
        *,
        distribution: str = "erk",
        drop: float = 0.5,
        every: int | None = None,
        stop: float = 0.75,
    ) -> None:
        super().__init__(target_compression, epochs, distribution, drop, every, stop)

    def after_step(self) -> None:
        """Count the step, then move connections where that is due."""
        super().after_step()
        if self.is_due():
            self.move(self.random_scores())
