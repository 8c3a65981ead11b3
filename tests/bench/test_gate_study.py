"""`python -m bench.gate.study`: that resampled gates find what is in the stored sessions, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.gate import study
from bench.gate.items import ITEMS
from bench.gate.measuring import SIDES

NAMES = [item.name for item in ITEMS[:3]]


def stored(path: Path, factor: float, runs: int = 4) -> Path:
    """Write a file of runs with two full sessions each, and a third of one item only."""
    random = np.random.default_rng(0)
    files = []
    for number in range(runs):
        rounds = {
            name: [
                {side: list((factor if side == "head" else 1) * np.exp(random.normal(0, 0.01, 5))) for side in SIDES}
                for _ in range(3 if name == NAMES[0] else 2)
            ]
            for name in NAMES
        }
        files.append(path / f"{number}.json")
        files[-1].write_text(json.dumps({"rounds": rounds}))
    study.collect(path / "runs.json.gz", files)
    return path / "runs.json.gz"


def test_full_sessions_are_those_of_all_items(tmp_path: Path) -> None:
    runs = study.read(stored(tmp_path, 1.0))
    sessions = study.full_sessions(runs, NAMES)
    assert len(sessions) == 8
    assert all(set(session) == set(NAMES) for session in sessions)
    assert sessions[1][NAMES[0]] == runs[0]["rounds"][NAMES[0]][1]


@pytest.mark.parametrize(("factor", "failed"), [(1.0, 0), (1.3, 50)])
def test_gates_drawn_from_sessions(factor: float, failed: int, tmp_path: Path) -> None:
    sessions = study.full_sessions(study.read(stored(tmp_path, factor)), NAMES)
    rate, seconds = study.false_alarms(sessions, 50, 100)
    assert rate == study.Rate(failed, 50)
    assert min(seconds) >= 2 * study.START_SECONDS


def test_the_command_prints_rate_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["resample", str(stored(tmp_path, 1.0)), "--gates", "100"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs of equal commits, 8 sessions of 3 items" in printed
    assert "false alarms: 0 of 100 (0.00%, 95 % interval 0.00% to 3.70%)" in printed


def test_intervals_are_wilsons() -> None:
    assert study.Rate(20, 1000).interval == pytest.approx((0.01298, 0.03070), abs=1e-4)
    assert study.Rate(20, 20).interval == pytest.approx((0.8389, 1.0), abs=1e-3)
