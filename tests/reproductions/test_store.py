import json
from dataclasses import replace
from pathlib import Path

import pytest

from clicktrain.errors import ConfigError, DataError
from reproductions.paths import StudyDirectory
from reproductions.store import Run, State, is_locked, load_study, state
from tests.helpers.studies import make_study


def test_a_study_is_read_by_method_and_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    assert len(study.runs) == 9
    assert study.sample("dense", "accuracy") == {0: 90.0, 1: 90.1, 2: 90.2}
    assert study.sample("ClickTrain", "compression") == {0: 6.0, 1: 6.0, 2: 6.0}
    assert study.of("PAT")[0].figures.seconds == pytest.approx(120.0)
    assert [record["stage"] for record in study.of("PAT")[0].epochs] == ["dense", "finetune"]


def test_memory_and_time_of_a_gpu_are_not_mixed_with_those_of_a_cpu(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    run = study.of("ClickTrain")[1]
    run.directory.provenance.write_text(json.dumps(run.provenance | {"gpu": {"model": "Some GPU"}}))
    study = load_study(study.directory)
    assert study.sample("ClickTrain", "peak_memory") == {0: 500.0, 2: 500.0}
    assert list(study.sample("ClickTrain", "seconds")) == [0, 2]
    assert list(study.sample("ClickTrain", "accuracy")) == [0, 1, 2]


def test_times_are_of_runs_that_had_the_machine_to_themselves_if_there_are_any(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    share(study.of("ClickTrain")[1])
    for run in study.of("PAT"):
        share(run)
    study = load_study(study.directory)
    assert list(study.sample("ClickTrain", "seconds")) == [0, 2]
    assert list(study.sample("ClickTrain", "accuracy")) == [0, 1, 2]
    assert list(study.sample("PAT", "seconds")) == [0, 1, 2]
    assert list(study.sample_beside("ClickTrain", "dense", "seconds")) == [0, 2]
    assert study.sample_beside("PAT", "dense", "seconds") == {}, "who shared the machine took longer for it"


def share(run: Run) -> None:
    """Let other work have run beside a run."""
    beside = {"concurrency": run.provenance["concurrency"] | {"declared": 1}}
    run.directory.provenance.write_text(json.dumps(run.provenance | beside))


def test_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", skip=("PAT/1",))
    assert list(study.sample("PAT", "accuracy")) == [0, 2]


def test_a_run_at_the_wrong_place_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    path = study.runs[0].directory.result
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 5}))
    with pytest.raises(DataError, match=r"is of \(config_id, seed\)"):
        load_study(study.directory)


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    path = study.runs[0].directory.result
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    with pytest.raises(DataError, match="is of format 0, expected 1"):
        load_study(study.directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the run"),
        ("{}", "there is no 'schema' in it"),
        ("[]", "cannot read the run"),
        ('{"schema": 1}', "there is no 'config_id' in it"),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, content: str, message: str) -> None:
    study = make_study(tmp_path / "toy")
    study.runs[0].directory.result.write_text(content)
    with pytest.raises(DataError, match=message):
        load_study(study.directory)


def test_a_directory_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study"):
        load_study(StudyDirectory(tmp_path))


def test_states_of_a_run(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", skip=("PAT/0",))
    missing = next(spec for spec in study.preset.runs() if spec.label == "PAT/0")
    run = study.directory.run(missing.config.config_id(), 0)
    assert state(run) is State.TO_COME
    run.path.mkdir(parents=True)
    run.config.touch()
    assert state(run) is State.BROKEN_OFF
    assert state(study.runs[0].directory) is State.DONE


def test_an_unlocked_or_missing_file_is_not_locked(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert not is_locked(tmp_path / "file")


def test_a_run_is_exclusive_only_if_its_donor_was(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    run = study.of("PAT")[0]
    assert (run.exclusive, run.began_from) == (True, None)
    for declared, exclusive in (([0], True), ([0, 1], False), ([None], False)):
        began_from = {"epochs": 2, "method": "dense", "seconds": 1.5, "concurrent_runs": declared, "code": [None]}
        begun = replace(run, provenance=run.provenance | {"began_from": began_from})
        assert begun.exclusive is exclusive
        assert begun.began_from == began_from
