from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from clicktrain import provenance


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_record_is_plain_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/somebody/bin/clicktrain", "train", "--out", "runs/x"])
    record = provenance.collect(seed=3, data_fingerprint="abc", concurrent_runs=1)
    assert json.loads(json.dumps(record)) == record
    assert (record["seed"], record["data_fingerprint"], record["concurrency"]["declared"]) == (3, "abc", 1)
    assert record["argv"] == ["clicktrain", "train", "--out", "runs/x"]
    assert {"torch", "numpy"} <= set(record["packages"])
    assert record["threads"]["torch"] >= 1
    assert record["started"].endswith("+00:00")


def test_a_clean_commit(repository: Path) -> None:
    found = provenance.commit(repository)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["dirty"] is False


def test_a_changed_tree_is_dirty(repository: Path) -> None:
    (repository / "file").write_text("two")
    found = provenance.commit(repository)
    assert found is not None
    assert found["dirty"] is True


@pytest.mark.parametrize(("text", "dirty"), [("0123abcd\n", False), ("0123abcd dirty\n", True)])
def test_a_carried_commit(tmp_path: Path, text: str, dirty: bool) -> None:
    (tmp_path / provenance.COMMIT_FILE).write_text(text)
    assert provenance.commit(tmp_path) == {"commit": "0123abcd", "dirty": dirty}


def test_no_history_at_all(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None


def test_no_probe_can_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such tool")

    for probe in ("commit", "processor", "_gpu"):
        monkeypatch.setattr(provenance, probe, fail)
    monkeypatch.setattr("os.getloadavg", fail)
    record = provenance.collect()
    assert record["code"] is record["gpu"] is record["cpu"]["model"] is record["concurrency"]["load"] is None
    assert record["cpu"]["signature"] is None
