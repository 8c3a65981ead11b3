"""Which processor this is."""

from pathlib import Path

import pytest

from clicktrain.processor import processor


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "vendor_id\t: Some\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: Some CPU\nstepping\t: 1\n\nmodel\t: 9\n"
    found = []
    for number in (1, 17):
        monkeypatch.setattr(Path, "read_text", lambda _, number=number: text.format(number))
        found.append(processor())
    assert found == [
        {"model": "Some CPU", "signature": "family 25, model 1, stepping 1"},
        {"model": "Some CPU", "signature": "family 25, model 17, stepping 1"},
    ]


def test_a_machine_without_such_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor()["signature"] is None
