"""What the published FLOPs can mean: every released configuration under each accounting, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from clicktrain import official
from clicktrain.algorithm import PRESETS
from clicktrain.planning import plan_report
from clicktrain.schedule import Stages
from reproductions.claims import BY_ID

PUBLISHED_TRAINING = BY_ID["training-flops-saved"].published
PUBLISHED_INFERENCE = BY_ID["inference-flops-saved"].published

ACCOUNTINGS = {
    "A": "sparse from the hard prune on",
    "B": "sparse from the selection on",
    "C": "as B, in two of three passes",
    "D": "density falls from selection to hard prune",
}
"""See `clicktrain.flops.accountings`; A is what is executed."""


@dataclass(frozen=True)
class Saving:
    """What a configuration saves of dense training, in percent, by schedule and accounting.

    Attributes
    ----------
    config : str
        Address of the released configuration.
    schedule : str
        "released", or a preset of ClickTrain at the same ratios.
    training : dict of str to float
        By accounting.
    inference : float
        Of the convolutions' FLOPs of a forward pass.
    """

    config: str
    schedule: str
    training: dict[str, float]
    inference: float


@dataclass(frozen=True)
class Group:
    """All configurations with a result under one schedule and accounting, as a range of percent."""

    schedule: str
    accounting: str
    savings: tuple[float, ...]

    @property
    def name(self) -> str:
        """What a figure calls it."""
        return f"{self.schedule}, {self.accounting}"

    @property
    def inside(self) -> int:
        """How many of them lie in the published range."""
        low, high = PUBLISHED_TRAINING
        return sum(low <= value <= high for value in self.savings)


@cache
def savings() -> tuple[Saving, ...]:
    """Return the savings of every released CIFAR configuration of which an accuracy is known."""
    return tuple(_savings())


def _savings() -> Iterator[Saving]:
    for config in official.ROWS:
        if not config.reported:
            continue
        schedules = {"released": config.stages} | {
            name: Stages.scaled(preset.select, preset.prune, config.stages.epochs) for name, preset in PRESETS.items()
        }
        for name, stages in schedules.items():
            plan = plan_report(config=config.address, stages=stages)
            yield Saving(config.address, name, plan.training_flops_saved, plan.inference_macs_saved)


def groups() -> list[Group]:
    """Return the savings by schedule and accounting; of our own schedules only what they execute."""
    found = savings()
    wanted = [("released", accounting) for accounting in ACCOUNTINGS] + [(name, "A") for name in PRESETS]
    return [
        Group(schedule, key, tuple(each.training[key] for each in found if each.schedule == schedule))
        for schedule, key in wanted
    ]


def inference() -> tuple[float, ...]:
    """Return the inference savings of the configurations."""
    return tuple(each.inference for each in savings() if each.schedule == "released")
