from __future__ import annotations

import pytest

from clicktrain.algorithm import ClickTrain
from clicktrain.config import RunConfig
from clicktrain.official import ROWS
from clicktrain.presets import PRESETS
from clicktrain.training.session import build_method


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str) -> None:
    assert isinstance(build_method(RunConfig.from_dict({"preset": name})), ClickTrain)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.address)
def test_official_presets_are_the_released_settings(row: object) -> None:
    config = RunConfig.from_dict({"preset": row.address})
    assert (config.data.name, config.model.name, config.train.epochs) == (row.dataset, row.model, row.stages.epochs)
    train = config.train
    assert (train.lr, train.momentum, train.nesterov, train.weight_decay) == (0.1, 0.9, False, 5e-4)
    assert (train.schedule.kind, train.schedule.milestones, train.batch_size) == (
        "multistep",
        row.milestones,
        row.batch_size,
    )
    assert (config.data.eval_on, config.data.validation) == ("test", 0)
    ours, theirs = build_method(config), ClickTrain.official(row.address)
    for name in ("stages", "sparsity", "penalty_strength", "batches", "prune_after_step"):
        assert getattr(ours, name) == getattr(theirs, name) or list(getattr(ours, name).ratios) == list(
            getattr(theirs, name).ratios
        )
    assert (ours.mixup_after_prune, ours.mixup_from) == (theirs.mixup_after_prune, theirs.mixup_from)
