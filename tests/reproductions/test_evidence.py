from pathlib import Path

import pytest

from clicktrain.errors import InvalidArgument
from reproductions.evidence import export
from reproductions.store import load_study
from reproductions.summary import check, summarize
from tests.helpers.studies import PRESET, make_study


def test_evidence_says_what_the_study_says(tmp_path: Path) -> None:
    study = make_study(tmp_path / "results" / "toy", skip=("dense/2",))
    assert export(study, tmp_path / "evidence" / "toy") == 8
    copy = load_study(type(study.directory)(tmp_path / "evidence" / "toy"))
    assert [row.verdict for row in check(copy)] == [row.verdict for row in check(study)]
    assert [summary.figures for summary in summarize(copy)] == [summary.figures for summary in summarize(study)]
    assert copy.runs[0].epochs == study.runs[0].epochs


def test_evidence_holds_no_steps_and_no_absolute_path(tmp_path: Path) -> None:
    study = make_study(tmp_path / "results" / "toy")
    export(study, tmp_path / "evidence")
    for path in (tmp_path / "evidence").rglob("*.*"):
        text = path.read_text()
        assert '"kind": "step"' not in text
        assert "/somewhere" not in text
        assert str(tmp_path) not in text


def test_evidence_is_never_overwritten(tmp_path: Path) -> None:
    study = make_study(tmp_path / "results" / "toy")
    export(study, tmp_path / "evidence")
    result = load_study(type(study.directory)(tmp_path / "evidence")).runs[0].directory.result
    before = result.read_text()
    study.runs[0].result["accuracy"]["last"] = 1.0
    assert export(study, tmp_path / "evidence") == 0
    assert result.read_text() == before


@pytest.mark.parametrize("data", ['"imagefolder:/data/mine"', '"cifar10"\nroot = "/data"'])
def test_data_at_an_absolute_path_are_refused(tmp_path: Path, data: str) -> None:
    study = make_study(tmp_path / "results" / "toy", PRESET.replace('"fashion-mnist-small"', data))
    with pytest.raises(InvalidArgument, match="lies at a place of this machine"):
        export(study, tmp_path / "evidence")


@pytest.mark.parametrize("data", ['"imagefolder:data/mine"', '"cifar10"\nroot = "data"'])
def test_data_at_a_place_of_the_project_are_not(tmp_path: Path, data: str) -> None:
    study = make_study(tmp_path / "results" / "toy", PRESET.replace('"fashion-mnist-small"', data))
    assert export(study, tmp_path / "evidence") == 9


def test_an_unwritable_destination_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path / "results" / "toy")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="cannot write"):
        export(study, tmp_path / "file" / "evidence")
