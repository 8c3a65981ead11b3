from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from clicktrain.training import Trainer, build
from clicktrain.training.result import (
    chosen_epochs,
    kept_weights,
    layer_records,
    pattern_records,
    size_figures,
    stage_times,
)
from tests.helpers import toy


def epoch(number: int, val: float | None, test: float, density: float) -> dict[str, Any]:
    return {"epoch": number, "val_accuracy": val, "test_accuracy": test, "density": density}


EPOCHS = [
    epoch(0, 50.0, 60.0, 1.0),
    epoch(1, 90.0, 80.0, 1.0),  # the best of all, but not pruned yet
    epoch(2, 70.0, 85.0, 0.5),
    epoch(3, 80.0, 70.0, 0.5),
    epoch(4, 80.0, 75.0, 0.5),
]


def numbers(chosen: dict[str, dict[str, Any] | None]) -> dict[str, int | None]:
    return {key: record and record["epoch"] for key, record in chosen.items()}


def test_the_validation_split_chooses() -> None:
    config = toy.config()
    assert numbers(chosen_epochs(EPOCHS, config)) == {"last": 4, "best": 1, "best_after_prune": 3}


def test_the_test_split_chooses_where_the_configuration_says_so() -> None:
    config = toy.config().model_copy(update={"data": toy.config().data.model_copy(update={"eval_on": "test"})})
    assert numbers(chosen_epochs(EPOCHS, config)) == {"last": 4, "best": 2, "best_after_prune": 2}


def test_a_dense_run_has_no_best_after_pruning() -> None:
    assert numbers(chosen_epochs(EPOCHS[:2], toy.config())) == {"last": 1, "best": 1, "best_after_prune": None}


def test_epochs_without_evaluation_are_passed_over() -> None:
    records = [epoch(0, None, 0.0, 1.0), epoch(1, 40.0, 40.0, 1.0)]
    assert numbers(chosen_epochs(records, toy.config()))["best"] == 1


def test_a_ramp_counts_as_pruned_at_its_final_density_only() -> None:
    ramp = [epoch(0, 99.0, 99.0, 0.9), epoch(1, 50.0, 50.0, 0.2), epoch(2, 40.0, 40.0, 0.2)]
    assert numbers(chosen_epochs(ramp, toy.config()))["best_after_prune"] == 1


def test_stage_times() -> None:
    steps = [{"stage": stage, "seconds": seconds} for stage, seconds in [("a", 1), ("a", 5), ("a", 2), ("b", 3)]]
    epochs = [{"stage": "a"}, {"stage": "b"}]
    assert stage_times(steps, epochs) == [
        {"name": "a", "epochs": 1, "steps": 3, "median_step_seconds": 2, "seconds": 8},
        {"name": "b", "epochs": 1, "steps": 1, "median_step_seconds": 3, "seconds": 3},
    ]


def test_a_physically_smaller_network_is_counted_by_its_layers() -> None:
    trainer = Trainer(build(toy.config(), 0))
    smaller = nn.Sequential(
        *[
            nn.Conv2d(4, 3, 3, padding=1)
            if index == 3
            else nn.Conv2d(3, 8, 3, stride=2, padding=1)
            if index == 7
            else nn.BatchNorm2d(3)
            if index == 4
            else module
            for index, module in enumerate(trainer.method.model)
        ]
    )
    kept = kept_weights(trainer, smaller)
    assert (kept["0"], kept["3"], kept["7"]) == (36, 3 * 4 * 9, 8 * 3 * 9)
    figures = size_figures(trainer, smaller)
    assert figures["compression"]["paper"] == pytest.approx((36 + 216 + 432) / (36 + 108 + 216))
    assert figures["inference_macs"] == {"dense": 64 * 252 + 16 * 432, "sparse": 64 * 144 + 16 * 216}
    assert figures["parameters"]["kept"] < figures["parameters"]["dense"]


def test_masks_go_before_the_layers_they_belong_to() -> None:
    trainer = Trainer(build(toy.clicktrain_config(), 0))
    list(trainer.records())
    masks = trainer.method.masks()
    kept = kept_weights(trainer, trainer.method.finish())
    assert {name: kept[name] for name in masks} == {name: int(mask.sum()) for name, mask in masks.items()}
    assert size_figures(trainer, trainer.method.finish())["compression"]["paper"] == pytest.approx(2.5, rel=0.05)


def test_layers_and_patterns_of_the_final_network_are_recorded() -> None:
    trainer = Trainer(build(toy.clicktrain_config(), 0))
    list(trainer.records())
    network = trainer.method.finish()
    layers, patterns = layer_records(trainer, network), pattern_records(network)
    assert [layer["name"] for layer in layers] == ["0", "3", "7"]
    selected = trainer.method.selection
    assert [layer["kept"] for layer in layers] == [36, *(choice.kept.kept_weights for choice in selected.values())]
    assert sum(entry["kernels"] for entry in patterns) == sum(choice.kept.kept_kernels for choice in selected.values())
    assert {tuple(entry["kept"]) for entry in patterns} == {pattern.kept for pattern in selected["3"].kept.pool}
    assert [entry["kernels"] for entry in patterns] == sorted((entry["kernels"] for entry in patterns), reverse=True)


def test_a_dense_network_has_no_patterns() -> None:
    trainer = Trainer(build(toy.config(), 0))
    assert pattern_records(trainer.method.model) == []
    assert all(layer["kept"] == layer["weights"] for layer in layer_records(trainer, trainer.method.model))
