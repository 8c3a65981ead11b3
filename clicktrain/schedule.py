"""When things happen: the stages of ClickTrain and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clicktrain.errors import InvalidArgument

Kind = Literal["constant", "multistep", "cosine", "onecycle"]


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate over a phase, as a factor on its base value.

    Parameters
    ----------
    kind : {"constant", "multistep", "cosine", "onecycle"}
        `multistep` is piecewise constant and changes between epochs; `cosine` and `onecycle` change at each
        step. `onecycle` rises linearly to the base value and falls linearly to zero.
    milestones : tuple of int
        Epochs after which `multistep` multiplies by `gamma`.
    gamma : float
        Factor of `multistep`.
    warmup : float
        Epochs of linear rise at the start (`onecycle`: its peak; 0 means a quarter of the phase).
    """

    kind: Kind = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "multistep", "cosine", "onecycle"):
            raise InvalidArgument(f"kind={self.kind!r}: expected constant, multistep, cosine or onecycle")
        if list(self.milestones) != sorted(self.milestones):
            raise InvalidArgument(f"milestones={self.milestones}: expected ascending epochs")
        if self.warmup < 0:
            raise InvalidArgument(f"warmup={self.warmup}: expected 0 or more epochs")

    def factor(self, position: float, epochs: int) -> float:
        """Return the factor at an epoch position (epoch + batch / batches) of a phase of `epochs` epochs."""
        if self.kind == "onecycle":
            peak = self.warmup or epochs / 4
            return min(position / peak, (epochs - position) / (epochs - peak)) if peak < epochs else position / peak
        rise = min(1.0, position / self.warmup) if self.warmup else 1.0
        if self.kind == "multistep":
            return rise * self.gamma ** sum(milestone <= int(position) for milestone in self.milestones)
        if self.kind == "cosine":
            along = max(0.0, position - self.warmup) / max(epochs - self.warmup, 1e-12)
            return rise * 0.5 * (1 + math.cos(math.pi * along))
        return rise

    def total(self, first: int, last: int, epochs: int, steps_per_epoch: int) -> float:
        """Return the sum of the factor over all steps of the epochs [first, last)."""
        steps = range(first * steps_per_epoch, last * steps_per_epoch)
        return sum(self.factor(step / steps_per_epoch, epochs) for step in steps)


@dataclass(frozen=True)
class Stages:
    """The boundaries of a ClickTrain run, in epochs: dense, then regularised, then sparse.

    Parameters
    ----------
    select_at : int
        Epoch at whose start importance is measured and patterns are chosen; dense before, regularised after.
    prune_at : int
        Epoch of the hard prune; sparse from there.
    epochs : int
        Length of the run.

    Raises
    ------
    InvalidArgument
        Unless 0 <= select_at <= prune_at < epochs.
    """

    select_at: int
    prune_at: int
    epochs: int

    def __post_init__(self) -> None:
        if not 0 <= self.select_at <= self.prune_at < self.epochs:
            raise InvalidArgument(
                f"stages select_at={self.select_at}, prune_at={self.prune_at}, epochs={self.epochs}: "
                "expected 0 <= select_at <= prune_at < epochs"
            )

    @classmethod
    def scaled(cls, select: float, prune: float, epochs: int) -> Stages:
        """Place the boundaries at fractions of a run, rounded to whole epochs."""
        return cls(round(select * epochs), round(prune * epochs), epochs)

    def name(self, epoch: int) -> Literal["dense", "regularized", "sparse"]:
        """Return the stage that an epoch belongs to."""
        if epoch < self.select_at:
            return "dense"
        return "regularized" if epoch < self.prune_at else "sparse"
