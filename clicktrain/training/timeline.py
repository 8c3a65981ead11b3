"""The phases of a run on one axis of epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from clicktrain.config import TrainConfig
from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase


class Timeline:
    """Phases one after another; what a phase leaves open is the run's setting.

    Parameters
    ----------
    phases : sequence of Phase
        In order; those of no epochs are never entered.
    train : TrainConfig
        Settings of the run.

    Attributes
    ----------
    epochs : int
        Length of all phases together.

    Raises
    ------
    InvalidArgument
        The phases have no epoch.
    """

    def __init__(self, phases: Sequence[Phase], train: TrainConfig) -> None:
        self.phases = tuple(phases)
        self._train = train
        self._ends = list(accumulate(phase.epochs for phase in self.phases))
        self.epochs = self._ends[-1] if self._ends else 0
        if self.epochs < 1:
            raise InvalidArgument(f"phases {list(self.phases)}: expected at least one epoch")

    def index(self, epoch: int) -> int:
        """Return the index of the phase that an epoch lies in."""
        return bisect_right(self._ends, epoch)

    def begins(self, epoch: int) -> bool:
        """Return whether a phase begins with an epoch, and with it a fresh optimizer."""
        index = self.index(epoch)
        return epoch == self._ends[index] - self.phases[index].epochs

    def lr(self, position: float) -> float:
        """Return the learning rate at an epoch position (epoch + batch / batches) of the run."""
        index = self.index(int(position))
        phase = self.phases[index]
        schedule = phase.schedule or self._train.schedule.build()
        base = self._train.lr if phase.lr is None else phase.lr
        return base * schedule.factor(position - (self._ends[index] - phase.epochs), phase.epochs)
