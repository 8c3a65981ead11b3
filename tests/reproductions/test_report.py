import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from reproductions import paths, report, terminal
from tests.helpers.studies import PRESET, make_study

VOID = {"meta", "br", "link", "img", "input", "hr"}


class _Checker(HTMLParser):
    """Collects ids and outside references, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def html(tmp_path: Path) -> str:
    return report.render(make_study(tmp_path / "toy"))


def test_the_report_is_one_sound_file_that_needs_nothing_else(html: str) -> None:
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.outside == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert "<script" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html


def test_the_report_shows_methods_claims_plots_and_provenance(html: str) -> None:
    for text in ("Toy study", "toy data", "reproduced", "needs PruneTrain", "Some CPU", "0123456789ab"):
        assert text in html
    assert html.count("<svg") == 3
    assert "python -m clicktrain train --config" in html
    assert "40.0" in html


def test_plots_follow_the_colours_of_the_page(html: str) -> None:
    drawn = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", html.split("</style>", 1)[1]))
    assert drawn == set()
    assert "var(--series-2)" in html


def test_the_same_study_gives_the_same_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    assert report.render(study) == report.render(study)


def test_text_of_presets_is_escaped(tmp_path: Path) -> None:
    text = PRESET.replace("Toy study", "<b>Toy</b> & study")
    assert "&lt;b&gt;Toy&lt;/b&gt; &amp; study" in report.render(make_study(tmp_path / "toy", text))


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"skip": ("PAT/0",)}, "Unfinished: 8 of 9 runs are done."),
        ({"concurrent": 1}, "Some runs shared the machine with others"),
    ],
)
def test_remarks_say_what_weakens_a_study(tmp_path: Path, changes: dict, remark: str) -> None:
    study = make_study(tmp_path / "toy", **changes)
    assert any(remark in found for found in report.remarks(study))
    assert remark in report.render(study)


def test_a_complete_study_needs_no_remark(tmp_path: Path) -> None:
    assert report.remarks(make_study(tmp_path / "toy")) == []


def test_a_study_without_any_run_still_has_a_report(tmp_path: Path) -> None:
    every = tuple(f"{method}/{seed}" for method in ("dense", "PAT", "ClickTrain") for seed in range(3))
    assert "0 of 3" in report.render(make_study(tmp_path / "toy", skip=every))


def test_the_terminal_shows_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "evidence")
    make_study(tmp_path / "evidence" / "long")
    output = Console(width=400, record=True, file=(tmp_path / "out").open("w"))
    terminal.show(make_study(tmp_path / "toy", skip=("ClickTrain/1",)), output)
    text = output.export_text()
    for expected in ("2 of 3", "90.10 \N{PLUS-MINUS SIGN} 0.10", "6.00", "reproduced", "long study, toy data"):
        assert expected in text


def test_shared_epochs_are_told(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    assert "taken over" not in report.render(study)
    for method, epochs in (("PAT", 10), ("ClickTrain", 3)):
        for run in study.of(method):
            code = {"commit": "f" * 40, "dirty": False}
            run.provenance["began_from"] = {
                "epochs": epochs, "method": "dense", "seconds": 12.25, "concurrent_runs": [0], "code": [code],
            }  # fmt: skip
    html = report.render(study)
    assert "equal to the last bit: PAT 10, ClickTrain 3. Their seconds and FLOPs are counted in full" in html
    assert "10 with dense, 12.2 s" in html
    assert "The runs come from 2 states of the code" in html
