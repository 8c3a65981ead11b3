"""What the kernels chose is a part of a checkpoint: a resumed run adds up in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from clicktrain.kernels.cpu import backend, estimates, runtime, tuning
from clicktrain.training import Trainer, build
from tests.helpers import toy
from tests.training.test_loop import saved_and_loaded

pytestmark = pytest.mark.skipif(backend.available() is not True, reason=str(backend.available()))

CONFIG = toy.config("clicktrain", toy.OPTIONS | {"backend": "cpu"}, batch_size=8)


@pytest.fixture(autouse=True)
def _no_choices() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    tuning.forget()
    runtime.forget()


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.method.model.parameters()]


def train_on(state: dict[str, Any]) -> list[torch.Tensor]:
    """Go on as a process would in which the heuristic has not chosen yet."""
    forget()
    trainer = Trainer.from_state(build(CONFIG, 0), state)
    list(trainer.records())
    return weights(trainer)


def test_a_resumed_run_cuts_up_its_layers_as_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other_version:
        other_version.setattr(estimates, "_channel_block", lambda layer: min(2, layer.channels))
        other_version.setattr(estimates, "_by_channel", lambda layer, pooled: [])
        trainer = Trainer(build(CONFIG, 0))
        states = [saved_and_loaded(trainer.state_dict()) for r in trainer.records() if r["stage"] == "sparse"]
        expected = weights(trainer)
    assert len(states) == 4
    assert {choice["channel_block"] for choice in states[0]["kernels"]["cpu"].values()} <= {1, 2}
    resumed = train_on(states[0])
    assert all(torch.equal(one, other) for one, other in zip(resumed, expected, strict=True))
    without = train_on({key: value for key, value in states[0].items() if key != "kernels"})
    assert not all(torch.equal(one, other) for one, other in zip(without, expected, strict=True))


def test_the_trainer_says_which_batches_will_come() -> None:
    trainer = Trainer(build(toy.clicktrain_config(batch_size=9), 0))
    assert trainer.method.batch_sizes == [6, 9]  # 24 images
    assert trainer.method.eval_batch_sizes == [6, 12]
