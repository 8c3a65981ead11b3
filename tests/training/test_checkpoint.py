from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clicktrain.errors import CheckpointError
from clicktrain.training.checkpoint import CheckpointStore


def refuse(text: str) -> None:
    raise AssertionError(f"unexpected note: {text}")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=2)


def test_nothing_written_nothing_loaded(store: CheckpointStore) -> None:
    assert store.load(refuse) is None
    assert store.latest() is None


def test_the_newest_comes_back_and_two_are_kept(store: CheckpointStore) -> None:
    for step in (5, 9, 10, 11):
        store.save(step, {"step": step, "weights": torch.arange(step)})
    loaded = store.load(refuse)
    assert loaded is not None
    assert torch.equal(loaded["weights"], torch.arange(11))
    assert [path.name.split("-")[1] for path in sorted(store.folder.iterdir())] == ["000000010", "000000011"]


def test_files_are_ordinary_safe_torch_files(store: CheckpointStore) -> None:
    path = store.save(3, {"nested": {"list": [1, 2.5, None, True], "tensor": torch.ones(2)}})
    assert torch.load(path, weights_only=True)["nested"]["list"] == [1, 2.5, None, True]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_the_one_before_it_used(store: CheckpointStore, damage: str) -> None:
    store.save(1, {"step": 1})
    path = store.save(2, {"step": 2})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-7]), "empty": b""}[damage])
    notes: list[str] = []
    assert store.load(notes.append) == {"step": 1}
    assert notes == [f"checkpoint {path.name} is damaged (its digest does not fit): using the one before it"]


def test_a_damaged_file_gives_way_to_the_same_step_written_again(store: CheckpointStore) -> None:
    store.save(1, {"step": 1})
    store.save(2, {"step": 2}).write_bytes(b"damaged")
    store.save(2, {"step": 2, "again": True})
    assert store.load(refuse) == {"step": 2, "again": True}
    assert len(list(store.folder.iterdir())) == 2


def test_all_damaged_is_an_error(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.save(step, {"step": step}).write_bytes(b"damaged")
    notes: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        store.load(notes.append)
    assert len(notes) == 2


def test_a_full_disk_leaves_the_earlier_ones(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clicktrain.training.checkpoint.write_atomic", full)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2: .*No space left"):
        store.save(2, {"step": 2})
    assert store.load(refuse) == {"step": 1}
