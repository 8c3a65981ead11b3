from __future__ import annotations

from pathlib import Path

import pytest

from clicktrain.errors import CheckpointError
from clicktrain.training.metrics import MetricsLog, read_metrics


def test_records_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"kind": "step", "loss": 0.5, "accuracy": None})
    log.write({"kind": "epoch", "norm": float("nan"), "rate": float("inf")})
    log.close()
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [
        {"kind": "step", "loss": 0.5, "accuracy": None},
        {"kind": "epoch", "norm": None, "rate": None},
    ]


def test_what_came_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"step": 0})
    size = log.sync()
    log.write({"step": 1})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 2, "los')  # killed while writing
    log = MetricsLog(path, size)
    log.write({"step": 1, "again": True})
    log.close()
    assert list(read_metrics(path)) == [{"step": 0}, {"step": 1, "again": True}]


def test_lost_lines_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    with pytest.raises(CheckpointError, match="has lost lines: the checkpoint was written at 500 bytes"):
        MetricsLog(path, 500)
    assert path.read_text() == '{"step": 0}\n'
