from pathlib import Path

import pytest
from rich.console import Console

from clicktrain.errors import DataError
from reproductions import estimates, paths, preset, terminal
from reproductions.estimates import estimate
from reproductions.paths import StudyDirectory
from reproductions.store import State
from tests.helpers.studies import PRESET, make_study, write_preset


@pytest.fixture(autouse=True)
def _no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "none")


def test_finished_runs_cost_nothing_and_tell_what_other_seeds_will(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", skip=("PAT/1",))
    found = estimate(study.directory, study.preset, study.preset.runs())
    by_label = {entry.spec.label: entry for entry in found}
    assert [label for label, entry in by_label.items() if entry.state is not State.DONE] == ["PAT/1"]
    assert sum(entry.seconds for entry in found) == pytest.approx(121.0)  # seconds.total of a finished PAT run
    assert by_label["PAT/1"].basis == "earlier runs of this configuration"


def test_unknown_configurations_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_measure", lambda *network: 0.5)
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    found = estimate(StudyDirectory(tmp_path / "toy"), loaded, loaded.runs()[:3])
    dense, pat, ours = found
    assert dense.steps == 2 * 3  # 270 of 300 images, held-out ones left out, in batches of 128
    evaluated = (30 + 5000) / 3
    assert dense.seconds == pytest.approx(0.5 * 2 * (270 + evaluated))
    assert pat.steps == 3  # one epoch of fine-tuning after those of the dense run
    assert ours.steps == 3
    assert {entry.basis for entry in found} == {"dense step, measured now"}
    alone = estimate(StudyDirectory(tmp_path / "toy"), loaded, loaded.runs()[:3], sharing=False)
    assert [entry.steps for entry in alone] == [6, 9, 6]


def test_the_step_is_really_measured(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    (dense,) = estimate(StudyDirectory(tmp_path / "toy"), loaded, loaded.runs()[:1])
    assert 0 < dense.seconds < 3600


def test_data_that_must_be_counted_must_be_there(tmp_path: Path) -> None:
    text = PRESET.replace('"fashion-mnist-small"', '"imagefolder:nowhere"')
    loaded = preset.load(write_preset(tmp_path / "toy.toml", text))
    with pytest.raises(DataError, match="nowhere"):
        estimate(StudyDirectory(tmp_path / "toy"), loaded, loaded.runs())


def test_the_table_sums_up(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy", skip=("PAT/1",))
    found = estimate(study.directory, study.preset, study.preset.runs())
    output = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    output.print(terminal.estimates_table(found, jobs=2, price=10.0))
    text = output.export_text()
    assert "9 runs" in text
    assert "0.34" in text  # 121 s at 10 an hour
    assert "0.02 h with --jobs 2" in text
