import json
from dataclasses import replace
from pathlib import Path

import pytest

from reproductions import paths, summary
from reproductions.claims import BY_ID
from reproductions.paths import StudyDirectory
from reproductions.store import load_study
from reproductions.summary import check, evidence_studies, stored_verdicts, summarize, with_evidence
from reproductions.verdicts import NOT_EXCLUSIVE, NOT_ON_HARDWARE, NOT_REPRODUCED, REPRODUCED, TOO_FEW
from tests.helpers.studies import make_study


def _words(study) -> dict[str, str]:
    return {row.claim.id: row.verdict.word for row in check(study)}


def test_methods_are_compared_with_the_dense_network_of_the_same_seed(tmp_path: Path) -> None:
    dense, pat, ours = summarize(make_study(tmp_path / "toy"))
    assert (dense.n, pat.n, ours.n) == (3, 3, 3)
    assert ours.accuracy_difference is not None
    assert ours.accuracy_difference.mean == pytest.approx(-0.5)
    assert ours.accuracy_difference.std == pytest.approx(0.0, abs=1e-9)
    assert ours.figures["accuracy"].std == pytest.approx(0.1)
    assert ours.time_ratio is not None
    assert ours.time_ratio.mean == pytest.approx(0.8)
    assert ours.training_flops_saved is not None
    assert ours.training_flops_saved.mean == pytest.approx(40.0)
    assert pat.training_flops_saved is not None
    assert pat.training_flops_saved.mean == pytest.approx(-5.0)


def test_methods_without_a_run_have_no_figures(tmp_path: Path) -> None:
    pat = summarize(make_study(tmp_path / "toy", skip=("PAT/0", "PAT/1", "PAT/2")))[1]
    assert (pat.n, pat.figures, pat.accuracy_difference, pat.time_ratio) == (0, {}, None, None)


def test_times_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    for run in study.of("ClickTrain"):
        if run.spec.seed < 2:
            elsewhere = run.provenance | {"platform": "another one"}
            run.directory.provenance.write_text(json.dumps(elsewhere))
    study = load_study(study.directory)
    _, pat, ours = summarize(study)
    assert pat.time_ratio is not None
    assert ours.time_ratio is not None
    assert (pat.time_ratio.n, ours.time_ratio.n, ours.n) == (3, 1, 3)
    assert ours.accuracy_difference is not None
    assert ours.accuracy_difference.n == 3
    (verdict,) = [row.verdict for row in check(study) if row.claim.id == "no-time-overhead"]
    assert verdict.word == TOO_FEW
    assert verdict.estimate is not None
    assert verdict.estimate.n == 1


def test_every_claim_has_a_verdict(tmp_path: Path) -> None:
    words = _words(make_study(tmp_path / "toy"))
    assert words["accuracy-vs-dense"] == REPRODUCED
    assert words["training-flops-saved"] == REPRODUCED
    assert words["inference-flops-saved"] == REPRODUCED
    assert words["end-to-end-time-vs-pat"].startswith("not run in this preset")
    assert words["kernel-speedup-cpu"] == "not run in this preset (needs python -m bench.cpu)"
    assert words["kernel-speedup"] == NOT_ON_HARDWARE


def test_the_verdict_says_how_good_the_dense_network_is(tmp_path: Path) -> None:
    assert all(row.dense_accuracy == pytest.approx(90.1) for row in check(make_study(tmp_path / "toy")))


def test_a_poor_dense_network_voids_the_study(tmp_path: Path) -> None:
    words = _words(make_study(tmp_path / "toy", dense_accuracy=80.0))
    assert words["accuracy-vs-dense"] == "undecided (study void: the dense network is below 87 %)"
    assert NOT_REPRODUCED not in words.values()
    assert REPRODUCED not in words.values()


def test_times_of_shared_runs_decide_nothing(tmp_path: Path) -> None:
    words = _words(make_study(tmp_path / "toy", concurrent=1))
    assert words["no-time-overhead"] == NOT_EXCLUSIVE
    assert words["accuracy-vs-dense"] == REPRODUCED


def test_times_of_runs_that_said_nothing_decide_nothing(tmp_path: Path) -> None:
    assert _words(make_study(tmp_path / "toy", concurrent=None))["no-time-overhead"] == NOT_EXCLUSIVE


def test_claims_about_other_hardware_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = replace(BY_ID["no-time-overhead"], hardware="cuda")
    monkeypatch.setattr(summary, "CLAIMS", (claim,))
    assert _words(make_study(tmp_path / "toy")) == {"no-time-overhead": NOT_ON_HARDWARE}


def test_an_unfinished_study_decides_on_what_it_has(tmp_path: Path) -> None:
    words = _words(make_study(tmp_path / "toy", skip=("ClickTrain/1", "ClickTrain/2")))
    assert words["accuracy-vs-dense"] == TOO_FEW
    assert words["inference-flops-saved"] == REPRODUCED


def test_stored_evidence_stands_beside_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "evidence")
    make_study(tmp_path / "evidence" / "long")
    study = make_study(tmp_path / "results" / "toy")
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    stored = stored_verdicts(study)["accuracy-vs-dense"]
    assert [(entry.source, entry.subject, entry.verdict.word) for entry in stored] == [
        ("long study, toy data", "ClickTrain", REPRODUCED)
    ]
    assert stored_verdicts(load_study(StudyDirectory(tmp_path / "evidence" / "long"))) == {}


def test_committed_evidence_can_be_read() -> None:
    for study in evidence_studies():
        assert study.runs
        assert check(study)


def test_stored_evidence_is_shown_once_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "evidence")
    make_study(tmp_path / "evidence" / "long")
    study = make_study(tmp_path / "study", skip=("ClickTrain/1", "ClickTrain/2"))
    undecided = [row for row in check(study) if row.claim.id == "accuracy-vs-dense"]
    stored = stored_verdicts(study)
    paired = with_evidence(undecided * 2, stored)
    assert [len(beside) for _, beside in paired] == [len(stored["accuracy-vs-dense"]), 0]
    assert paired[0][1]
