"""`python -m bench.cpu`: that it measures what it says, stores it, and refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import cpu
from bench.suite.workloads import LAYERS, Goal, LayerShape, Workload
from clicktrain import timing
from clicktrain.kernels.cpu import backend, library

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")

SMALL = LayerShape("test", "small", 9, 10, (6, 5))


@pytest.fixture(autouse=True)
def _generic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    monkeypatch.setenv("CLICKTRAIN_DISABLE_JIT", "1")


@pytest.mark.parametrize("function", ["forward", "grad_input", "grad_values"])
def test_a_row_is_checked_and_complete(function: str) -> None:
    row = cpu.measure(Workload(SMALL, 9, 4.5), function, rounds=2)
    assert {t["name"] for t in row.timings} == {*cpu.DENSE, "blocked", "nchw", "peak"}
    assert row.dense in cpu.DENSE
    assert row.speedup("blocked") == row.speedup_blocked > 0
    assert row.speedup("nchw") == row.speedup_nchw > 0
    assert row.share_of_peak > 0
    assert row.workload in str(row)


def test_few_images_are_timed_as_strips() -> None:
    row = cpu.measure(Workload(LayerShape("test", "strips", 9, 10, (17, 9)), 1, 4.5), "forward", rounds=2)
    assert row.speedup_blocked > 0, "and its result was the right one, else it would not have been timed"


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = backend.forward_blocked
    monkeypatch.setattr(backend, "forward_blocked", lambda *operands: forward(*operands) * 1.001)
    with pytest.raises(timing.WrongResult, match="blocked is wrong"):
        cpu.measure(Workload(SMALL, 8, 4.5), "forward", rounds=1)


def test_flops_count_kept_weights_only() -> None:
    case = cpu.Case(Workload(LAYERS["vgg13.512x2"], 8, 4.5))
    assert case.flops == 2 * 8 * 4 * case.assignment.kept_weights


def test_a_goal_is_the_geometric_mean_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    speedups = iter([2.0, 8.0])
    calls = []

    def measured(workload: Workload, function: str, rounds: int) -> cpu.Row:
        calls.append(workload.name)
        return cpu.Row(workload.name, function, "NCHW", next(speedups), 1.0, 0.5, [])

    monkeypatch.setattr(cpu, "measure", measured)
    goals = [
        Goal("g", "forward", "blocked", (SMALL,), (1, 2), 4.5, 4.0),
        Goal("h", "forward", "nchw", (SMALL,), (1,), 4.5, 4.0),
    ]
    rows, verdicts = cpu.check_goals(goals, 1, None)
    assert len(rows) == len(calls) == 2, "the workload that both goals are about was measured once"
    assert [v.reached for v in verdicts] == pytest.approx([4.0, 1.0])
    assert str(verdicts[0]).endswith("reached")
    assert str(verdicts[1]).endswith("MISSED")


def test_the_command_stores_everything_with_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GOALS", (Goal("tiny", "forward", "blocked", (SMALL,), (8,), 4.5, 1.0),))
    out = tmp_path / "cpu.json"
    assert cpu.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [goal["name"] for goal in report["goals"]] == ["tiny"]
    assert report["rows"][0]["function"] == "forward"
    assert report["ceilings"]["gflops"] > 0
    assert report["threads"]["used"] == torch.get_num_threads()
    assert report["provenance"]["packages"]["torch"]


def test_without_the_backend_the_command_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "available", lambda: "no compiler")
    assert cpu.main([]) == 2
    assert capsys.readouterr().err == "error: the CPU backend is not available: no compiler\n"
