"""`python -m bench.training`: the sparse losses are the reference's, and steps are compared with the best dense one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import training
from bench.training import Losses, Setting
from clicktrain.kernels.cpu import backend, blocked_ops, library

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


def test_the_first_losses_are_those_of_the_masked_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLICKTRAIN_DISABLE_JIT")
    compared = training.losses(Setting(0.25, 16))
    assert len(compared.cpu) == len(compared.reference) == training.LOSS_STEPS == 20
    assert compared.difference <= training.LOSS_TOLERANCE
    assert compared.cpu != compared.reference, "both ran on the same kernels, or the losses see nothing of them"
    assert sorted(compared.updates)[15] < 1e-4, "most steps turn no activation's sign"
    # Then rounding has turned the first sign, and runs on their own drift apart: not by wrong steps, as the reference
    # makes the same ones from the same weights.
    assert compared.beside_alone == pytest.approx(compared.cpu_alone, rel=1e-5)
    assert compared.cpu_alone[:4] == pytest.approx(compared.reference[:4], rel=1e-4)
    assert len({round(loss, 2) for loss in compared.reference}) > 5, "the losses move"


def test_a_wrong_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = blocked_ops.grad_values_blocked
    monkeypatch.setattr(blocked_ops, "grad_values_blocked", lambda *operands: gradient(*operands) * 1.01)
    compared = training.losses(Setting(0.125, 8), steps=2)
    assert min(compared.updates) > 1e-3


def test_the_largest_difference_counts() -> None:
    compared = Losses((1.0, 2.0), (1.0, 2.2), (0.0, 0.0), (1.0, 2.0), (1.0, 2.1), (1.0, 2.0))
    assert compared.difference == pytest.approx(0.1)
    assert compared.as_dict()["drift_nudged"] == pytest.approx(0.05)
    assert replace(compared, cpu=(1.0, 2.0), cpu_alone=(1.0, 2.3)).difference == pytest.approx(0.15)
    assert "MISSED" in str(compared)


def test_a_step_is_compared_with_the_best_dense_one() -> None:
    times = training.step_times(Setting(0.125, 8), "torch", rounds=1, compiled=False)
    medians = {str(timed["name"]): float(str(timed["median_ms"])) for timed in times.timings}
    assert set(medians) == {*training.DENSE, "sparse"}
    assert times.dense == min(training.DENSE, key=lambda name: medians[name])
    assert times.reached == pytest.approx(medians[times.dense] / medians["sparse"])
    assert times.name in str(times)


def test_the_command_stores_everything_with_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def in_this_process(command: list[str], check: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "bench.training"]
        assert check
        assert training.main(command[3:]) == 0

    monkeypatch.setattr(training.memory, "keep", lambda: kept.append(True) or True)
    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(training, "Setting", lambda *_: Setting(0.125, 8))
    out = tmp_path / "training.json"
    assert training.main(["--quick", "--no-losses", "--out", str(out)]) == 0
    assert kept == [True]
    report = json.loads(out.read_text())
    assert report["setting"] == {"width": 0.125, "batch": 8}
    assert set(report["times"]) == {"torch", "kept"}
    for memory, times in report["times"].items():
        assert times["name"].endswith(memory)
        assert times["at_least"] == 4.0
        assert {timed["name"] for timed in times["timings"]} == {*training.DENSE, "sparse"}
    assert report["provenance"]["packages"]["torch"]


def test_losses_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Losses((1.0, 0.5), (1.0, 0.5), (0.0, 0.0), (1.0, 0.5), (1.0, 0.5), (1.0, 0.5))
    monkeypatch.setattr(training, "losses", lambda setting: compared)
    out = tmp_path / "training.json"
    assert training.main(["--no-times", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())["losses"]
    assert stored["reference"] == [1.0, 0.5]
    assert stored["difference"] == 0.0
    assert stored["at_most"] == 1e-4


def test_without_the_backend_the_command_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "available", lambda: "no compiler")
    assert training.main([]) == 2
    assert capsys.readouterr().err == "error: the CPU backend is not available: no compiler\n"
