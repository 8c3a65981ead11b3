"""Dense training: what every other method is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from clicktrain.method import Method, Phase


class Dense(Method):
    """Ordinary training of the whole network.

    Parameters
    ----------
    epochs : int
        Length of the run.
    """

    name = "dense"
    recordable = True

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase, at the run's own settings."""
        return [Phase("dense", self.epochs)]

    @property
    def dense_epochs(self) -> int:
        """All epochs: this is what the others share."""
        return self.epochs
