"""The trainer on an NVIDIA GPU: loss scaling, memory format, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clicktrain import recording
from clicktrain.training import train
from clicktrain.training.loop import Trainer
from clicktrain.training.session import build
from tests.helpers import toy
from tests.training.test_run import interrupt

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_of_each_precision_learns_and_resumes(tmp_path: Path, amp: str) -> None:
    config = toy.clicktrain_config(device="cuda", amp=amp, channels_last="auto")
    interrupt(tmp_path, 8, config)
    result = train(config, tmp_path, callbacks=[])
    assert result["stages"][-1]["name"] == "sparse"
    assert result["accuracy"]["last"] > 100 / toy.CLASSES
    assert json.loads((tmp_path / "provenance.json").read_text())["gpu"]["model"] == torch.cuda.get_device_name()


def test_fp16_scales_the_loss_and_keeps_the_scale(tmp_path: Path) -> None:
    config = toy.config(device="cuda", amp="fp16")
    train(config, tmp_path, callbacks=[])
    (newest, *_) = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    scaler = torch.load(newest, weights_only=True)["trainer"]["scaler"]
    assert scaler["scale"] > 1
    assert scaler["_growth_tracker"] > 0


def test_trainers_record_each_stage_and_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    losses: dict[str, list[float]] = {}
    stages: set[str] = set()
    record = recording.record
    monkeypatch.setattr(recording, "record", lambda model, x: recorded.append(len(x)) or record(model, x))  # type: ignore[func-returns-value]
    config = toy.config("clicktrain", {**toy.OPTIONS, "backend": "cuda"}, device="cuda")
    for way in ("recorded", "one by one"):
        if way == "one by one":
            monkeypatch.setenv(recording.DISABLED, "1")
        steps = [entry for entry in Trainer(build(config, 0)).records() if entry["kind"] == "step"]
        stages |= {entry["stage"] for entry in steps}
        losses[way] = [entry["loss"] for entry in steps]
    assert recorded == [config.train.batch_size] * 2, "dense, which the regularized stage goes on with, and sparse"
    assert stages == {"dense", "regularized", "sparse"}
    # Rounding differs where operators are fused, and grows from step to step.
    for one, other in zip(losses["recorded"][:12], losses["one by one"][:12], strict=True):
        assert one == pytest.approx(other, rel=2e-2)
