"""The command line, with real trainings of a few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reproductions import __main__ as command_line
from reproductions import paths, preset
from reproductions.paths import StudyDirectory
from tests.helpers.studies import TOY, make_study, write_preset
from tests.helpers.victim import fingerprint


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


def test_a_dry_run_lists_the_runs_of_a_claim_and_starts_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("run", "quick", "--dry-run", "--only", "accuracy-vs-pat", "--results", tmp_path / "results")
    printed = capsys.readouterr().out
    assert "4 runs" in printed
    assert "earlier runs of this configuration" in printed
    assert not (tmp_path / "results").exists()


def test_data_that_are_not_there_are_named_once_and_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(paths.CLONE)
    file = write_preset(tmp_path / "toy.toml", TOY.replace("fashion-mnist-small", "imagefolder:nowhere"))
    call("run", file, "--results", tmp_path / "results", "--only", "dense", code=1)
    printed = capfd.readouterr()
    assert printed.out.count("error: nowhere: expected a folder") == 1
    assert "starts again" not in printed.out
    assert "failed: dense/0; see train.log" in printed.err


def test_two_studies_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(tmp_path / "one")
    make_study(tmp_path / "two")
    call("report", "--compare", "one", "two", "--results", tmp_path)
    assert f"comparison: {tmp_path / 'one-and-two.html'}" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "one-and-two.html").is_file()


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    call("tables")
    assert capsys.readouterr().out.startswith("| claim | method |")


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


def test_a_study_is_also_named_by_the_preset_file_that_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_preset(tmp_path / "toy.toml")
    call("status", file, "--results", tmp_path / "results")
    assert capsys.readouterr().out.count("to come") == 9
    make_study(tmp_path / "results" / "toy")
    call("status", file, "--results", tmp_path / "results")
    assert capsys.readouterr().out.count("done") == 9
    call("report", file, "--results", tmp_path / "results")
    assert (tmp_path / "results" / "toy" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quik"], "preset 'quik': expected one of"),
        (["run", "quick", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["run", "quick", "--only", "nobody"], "--only nobody: matches none of the runs"),
        (["report", "quick"], "holds no study"),
        (["report", "quick", "--compare"], "two studies and --compare go together"),
        (["report", "quick", "embedded"], "two studies and --compare go together"),
        (["run", "quick", "--jobs", "2"], "--jobs 2: end-to-end-time-vs-pat, no-time-overhead"),
        (["run", "small", "--data", "fashion-mnist-small"], "methods of small name their own data sets"),
        (["run", "quick", "--only", "importance-vs-magnitude"], "this preset does not check that claim"),
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
