"""Learning rates and stages."""

import math

import pytest

from clicktrain.errors import InvalidArgument
from clicktrain.schedule import LRSchedule, Stages


def test_multistep_changes_after_the_milestone_epochs():
    schedule = LRSchedule("multistep", milestones=(55, 131))
    rates = [schedule.factor(epoch, 190) for epoch in (0, 54, 54.99, 55, 130.5, 131, 189)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_starts_at_one_and_ends_near_zero():
    schedule = LRSchedule("cosine")
    assert schedule.factor(0, 10) == 1
    assert schedule.factor(5, 10) == pytest.approx(0.5)
    assert schedule.factor(10, 10) == pytest.approx(0)


def test_warmup_rises_linearly():
    assert LRSchedule("constant", warmup=4).factor(1, 10) == 0.25
    assert LRSchedule("cosine", warmup=2).factor(2, 10) == 1


def test_onecycle_peaks_at_the_end_of_its_warmup():
    schedule = LRSchedule("onecycle", warmup=2)
    assert [schedule.factor(p, 10) for p in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert LRSchedule("onecycle").factor(2.5, 10) == 1


def test_total_of_the_official_vgg13_run():
    """FACTS of the released configuration: lambda 6.5e-4 times 284 makes a shrinkage of 0.185."""
    schedule = LRSchedule("multistep", milestones=(55, 131))
    steps = math.ceil(50_000 / 128)
    assert 0.1 * schedule.total(60, 148, 190, steps) == pytest.approx(284, abs=0.5)


@pytest.mark.parametrize("bad", [{"kind": "typo"}, {"milestones": (3, 2)}, {"warmup": -1}])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(InvalidArgument, match=next(iter(bad))):
        LRSchedule(**bad)


def test_stage_names_at_the_boundaries():
    stages = Stages(3, 5, 10)
    assert [stages.name(e) for e in (0, 2, 3, 4, 5, 9)] == ["dense"] * 2 + ["regularized"] * 2 + ["sparse"] * 2


def test_the_papers_fractions_give_its_epochs():
    assert Stages.scaled(55 / 190, 95 / 190, 190) == Stages(55, 95, 190)


@pytest.mark.parametrize("order", [(5, 3, 10), (-1, 3, 10), (3, 10, 10)])
def test_stages_out_of_order_are_refused(order):
    with pytest.raises(InvalidArgument, match="select_at <= prune_at < epochs"):
        Stages(*order)
