"""The command line, with real trainings of a few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reproductions import __main__ as command_line
from reproductions import paths, preset
from reproductions.paths import StudyDirectory
from tests.helpers.studies import make_study, write_preset
from tests.helpers.victim import fingerprint

TOY = """
title = "Toy study"
data_label = "toy data"
seeds = [0]
claims = ["accuracy-vs-dense", "training-flops-saved"]

[base.data]
name = "fashion-mnist-small"
train_limit = 200

[base.model]
name = "vgg11"
width = 0.125

[base.train]
epochs = 2
channels_last = "off"
threads = 1

[[methods]]
name = "dense"
role = "dense"
config.method = { name = "baselines:Dense" }

[[methods]]
name = "ClickTrain"
role = "subject"
rivals = { dense = "dense" }
config.method = { name = "clicktrain", options = { target_compression = 4.0, select_at = 1, prune_at = 1 } }
"""


def call(*words: str | Path, code: int = 0) -> None:
    """Run the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["reproductions", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    assert ended.value.code == code


def test_a_study_runs_is_found_done_and_becomes_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(paths.CLONE)
    file, results = write_preset(tmp_path / "toy.toml", TOY), tmp_path / "results"
    call("run", file, "--results", results)
    printed = capfd.readouterr().out
    assert "run 2 of 2: ClickTrain/0: starts" in printed
    assert "Training needs 36.7 to 45.2 %" in printed
    assert "ClickTrain/0  begins with 1 epochs of another run" in printed
    html = (results / "toy" / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "equal to the last bit: ClickTrain 1. Their seconds" in html

    files = {path: path.stat().st_mtime_ns for path in results.rglob("seed_0/*") if path.is_file()}
    call("run", file, "--results", results)
    assert capfd.readouterr().out.count("already done") == 2
    assert {path: path.stat().st_mtime_ns for path in files} == files

    call("status", "toy", "--results", results)
    assert capfd.readouterr().out.count("done") == 2
    call("retained", "toy", "--results", results)
    assert "Importance retained" in capfd.readouterr().out
    call("export", results / "toy", tmp_path / "evidence" / "toy")
    assert "2 runs exported" in capfd.readouterr().out
    call("report", "toy", "--results", tmp_path / "evidence", "--out", tmp_path / "report.html")
    assert "Retained importance" in (tmp_path / "report.html").read_text()
    records = [json.loads(path.read_text()) for path in (tmp_path / "evidence").rglob("provenance.json")]
    assert [record["concurrency"]["declared"] for record in records] == [0, 0]

    study = StudyDirectory(results / "toy")
    donor, begun = (study.run(spec.config.config_id(), 0) for spec in preset.load(file).runs())
    assert [
        record["began_from"] and record["began_from"]["epochs"] for record in (donor.read_record(), begun.read_record())
    ] == [None, 1]
    shared = fingerprint(begun.path)
    shutil.rmtree(begun.path)
    shutil.rmtree(donor.shared)
    call("run", file, "--results", results, "--only", "ClickTrain")
    kept_nothing = "it kept none of its first 1 epochs: train it with --keep-epoch 1; trains from the start"
    assert kept_nothing in capfd.readouterr().out
    assert begun.read_record()["began_from"] is None
    assert fingerprint(begun.path) == shared, "sharing epochs changed a number"


def test_status_of_a_study_that_was_never_run_lists_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("status", "quick", "--results", tmp_path)
    assert capsys.readouterr().out.count("to come") == len(preset.load(preset.find("quick")).runs())


def test_status_tells_done_from_to_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(tmp_path / "toy", skip=("PAT/1",))
    call("status", "toy", "--results", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if not line.startswith("done")] == ["come"]
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quik"], "preset 'quik': expected one of"),
        (["run", "quick", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["run", "quick", "--only", "nobody"], "--only nobody: matches none of the runs"),
        (["report", "quick"], "holds no study"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    call(*words, "--results", tmp_path / "results", code=2)
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_refused_option_of_a_method_is_found_before_any_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_preset(tmp_path / "toy.toml", TOY.replace("select_at", "select_when"))
    call("run", file, "--results", tmp_path / "results", code=2)
    assert "select_when" in capfd.readouterr().err
    assert not (tmp_path / "results").exists()
