from __future__ import annotations

import pytest

from clicktrain.config import TrainConfig
from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase
from clicktrain.schedule import LRSchedule
from clicktrain.training.timeline import Timeline

TRAIN = TrainConfig.model_validate({"lr": 1.0, "schedule": {"kind": "multistep", "milestones": [2]}})


def test_epochs_count_on_over_phases() -> None:
    timeline = Timeline([Phase("a", 3), Phase("none", 0), Phase("b", 2)], TRAIN)
    assert timeline.epochs == 5
    assert [timeline.index(epoch) for epoch in range(5)] == [0, 0, 0, 2, 2]


def test_a_schedule_begins_anew_with_its_phase() -> None:
    own = Phase("b", 2, lr=0.5, schedule=LRSchedule("multistep", milestones=(1,)))
    timeline = Timeline([Phase("a", 3), own, Phase("c", 3)], TRAIN)
    rates = [timeline.lr(epoch) for epoch in range(8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.5, 0.05, 1, 1, 0.1])


def test_multistep_is_constant_within_an_epoch() -> None:
    timeline = Timeline([Phase("a", 3)], TRAIN)
    assert timeline.lr(1.99) == timeline.lr(1.0) == 1.0
    assert timeline.lr(2.0) == pytest.approx(0.1)


@pytest.mark.parametrize("phases", [[], [Phase("a", 0)]])
def test_a_run_needs_an_epoch(phases: list[Phase]) -> None:
    with pytest.raises(InvalidArgument, match="expected at least one epoch"):
        Timeline(phases, TRAIN)
