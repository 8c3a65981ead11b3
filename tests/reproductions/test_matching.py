"""Time at equal accuracy: each rival against the quickest subject that is as good."""

import json
from pathlib import Path

import pytest

from reproductions import matching, plots, tables
from reproductions.matching import Match, matches
from reproductions.store import Study, load_study
from tests.helpers.studies import PRESET, make_study

SECOND = """
[[methods]]
name = "ClickTrain long"
role = "subject"
rivals = { dense = "dense", pat = "PAT" }
config = { train = { epochs = 4 }, method = { name = "clicktrain", options = { target_compression = 6.0 } } }
"""


def study_of(folder: Path, accuracy: float = 89.5, compression: float = 6.0, seconds: float = 200.0) -> Study:
    """Return a study with PAT (120 s, 89.5 %), ClickTrain (80 s) and another ClickTrain, as given, all at 6x."""
    study = make_study(folder, PRESET + SECOND)
    return changed(study, "ClickTrain long", accuracy, compression, seconds)


def changed(study: Study, method: str, accuracy: float, compression: float = 6.0, seconds: float = 80.0) -> Study:
    """Return a study with other results of a method."""
    for run in study.of(method):
        record = run.result
        record["accuracy"]["last"] = accuracy + 0.1 * run.spec.seed
        record["compression"]["paper"] = compression
        for stage in record["stages"]:
            stage["median_step_seconds"] = seconds / stage["steps"] / len(record["stages"])
        run.directory.result.write_text(json.dumps(record))
    return load_study(study.directory)


def only(study: Study) -> Match:
    (match,) = matches(study, study.preset.methods)
    return match


def test_the_quickest_of_those_as_accurate_counts(tmp_path: Path) -> None:
    match = only(study_of(tmp_path / "toy"))
    assert match.rival.row.name == "PAT"
    assert match.subject is not None
    assert match.subject.row.name == "ClickTrain"
    assert match.speedup is not None
    assert match.speedup.mean == pytest.approx(120 / 80)
    assert match.accuracy_difference is not None
    assert match.accuracy_difference.mean == pytest.approx(0.0)


def test_a_quicker_one_that_is_as_accurate_is_taken(tmp_path: Path) -> None:
    match = only(study_of(tmp_path / "toy", accuracy=89.1, seconds=40.0))
    assert match.speedup is not None
    assert match.speedup.mean == pytest.approx(3.0)


@pytest.mark.parametrize(("accuracy", "compression"), [(88.9, 6.0), (89.5, 5.0), (89.5, 7.0)])
def test_a_quicker_one_that_is_not_as_good_is_not(tmp_path: Path, accuracy: float, compression: float) -> None:
    match = only(study_of(tmp_path / "toy", accuracy, compression, seconds=40.0))
    assert match.subject is not None
    assert match.subject.row.name == "ClickTrain"


def test_a_rival_that_no_subject_equals_has_no_speedup(tmp_path: Path) -> None:
    study = changed(study_of(tmp_path / "toy", accuracy=60.0), "ClickTrain", accuracy=60.0)
    match = only(study)
    assert (match.subject, match.speedup) == (None, None)
    assert "| PAT | 1.20x | none | - | - |" in tables.matches_table(study, study.preset.methods)


def test_without_a_subject_of_equal_compression_there_is_nothing_to_say(tmp_path: Path) -> None:
    study = changed(make_study(tmp_path / "toy"), "ClickTrain", accuracy=89.5, compression=12.0)
    assert matches(study, study.preset.methods) == []
    assert tables.matches_table(study, study.preset.methods) == ""


def test_tables_of_time_need_exclusive_runs(tmp_path: Path) -> None:
    assert len(tables.study_tables(make_study(tmp_path / "alone"))) == 2
    assert len(tables.study_tables(make_study(tmp_path / "beside", concurrent=1))) == 1


def test_published_lengths_are_marked_where_they_are_the_question(tmp_path: Path) -> None:
    asked = PRESET.replace('"no-time-overhead"', '"end-to-end-time-vs-pat"')
    study = make_study(tmp_path / "asked", asked)
    svg = plots.accuracy_against_time(study, study.preset.methods)
    assert all(label in svg for label in matching.PUBLISHED_PHASES)
    other = make_study(tmp_path / "other")
    assert not any(
        label in plots.accuracy_against_time(other, other.preset.methods) for label in matching.phases(study)
    )
