import io
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from reproductions import kernels, paths, report, terminal, wording
from reproductions.summary import stored_verdicts
from reproductions.wording import FEW, tally
from tests.helpers.studies import PRESET, TWO, make_study

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
    assert html.count("<figure") == 6 + 1 + len(kernels.stored())
    assert "python -m clicktrain train --config" in html
    assert "40.0" in html


def test_the_report_draws_the_patterns_that_were_chosen(html: str) -> None:
    galleries = html.split('<ul class="patterns">')[1:]
    assert len(galleries) == 2  # of PAT and ClickTrain
    first = galleries[0].split("</ul>")[0]
    assert re.findall(r'aria-label="keeps ([\d, ]+)"', first) == ["0, 1, 3, 4", "4, 5, 7, 8"]
    assert re.findall(r"<span>([\d.]+) %", first) == ["75.0", "25.0"]
    assert (first.count('class="kept"'), first.count('class="gone"')) == (8, 10)


def test_claims_of_which_nothing_is_measured_stand_apart(html: str) -> None:
    table, _, rest = html.partition("more claims of which nothing is measured yet")
    assert "Training takes no longer" in table
    assert "The pruned network is within 1 point" in table
    assert "CIFAR-10 VGG13 at 9.0x reaches 93.52 %" in rest
    assert "CIFAR-10 VGG13 at 9.0x" not in table


def test_a_few_verdicts_of_stored_evidence_are_shown_and_many_folded_away(html: str, tmp_path: Path) -> None:
    study = make_study(tmp_path / "other")
    evidence = stored_verdicts(study)
    few, many = evidence["accuracy-vs-masked"], evidence["dynamic-vs-fixed-pool"]
    assert len(few) <= FEW < len(many)
    assert all(escape(wording.stored(entry)) in html for entry in few + many)
    rows = [html.partition(escape(entries[0].claim.statement))[2].partition("</tr>")[0] for entries in (few, many)]
    assert "<summary>" not in rows[0]
    assert rows[1].count("<summary>") == rows[1].count(f"<summary>{escape(tally(many))}</summary>") == 1
    console = Console(width=1000, record=True, file=io.StringIO())
    terminal.show(study, console)
    text = console.export_text()
    assert tally(many) in text
    assert wording.stored(many[0]) not in text
    assert wording.stored(few[0]) in text


def test_every_run_has_a_page_that_leads_back(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    report.write(study, tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "report.html").read_text()
    pages = re.findall(r'<a href="(runs/[^"]+)">', text)
    assert len(set(pages)) == len(study.runs) == 9
    for page in pages:
        checker = _Checker()
        content = (tmp_path / "out" / page).read_text()
        checker.feed(content)
        assert (checker.open, checker.outside) == ([], ["a href=../report.html"])
        assert "python -m clicktrain train --config" in content
        assert "0123456789ab" in content
    ours = next(page for page in pages if "<h1>ClickTrain/0</h1>" in (tmp_path / "out" / page).read_text())
    assert 'class="patterns"' in (tmp_path / "out" / ours).read_text()


def test_evidence_of_before_layers_were_recorded_has_a_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    for run in study.runs:
        for key in ("layers", "patterns"):
            del run.result[key]
    html = report.render(study)
    assert 'class="patterns"' not in html
    assert "Weights kept" not in html
    assert "<h1>PAT/0</h1>" in report.render_run(study, study.of("PAT")[0], "report.html")


def test_two_studies_stand_side_by_side(tmp_path: Path) -> None:
    left = make_study(tmp_path / "left", skip=("PAT/0", "PAT/1", "PAT/2"))
    right = make_study(tmp_path / "right", dense_accuracy=91.0)
    report.write_comparison(left, right, tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text()
    checker = _Checker()
    checker.feed(html)
    assert (checker.open, checker.outside) == ([], [])
    claims = html[html.index("Claims that either") : html.index("<h2>Methods")]
    assert claims.count("Accuracy is comparable to pruning after training") == 1
    assert '<td data-label="left">-</td>' in claims
    assert "90.10 \N{PLUS-MINUS SIGN} 0.10" in html
    assert "91.10 \N{PLUS-MINUS SIGN} 0.10" in html
    output = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    output.print(terminal.comparison_table(left, right))
    assert "reproduced" in output.export_text()


def test_methods_of_two_networks_are_drawn_apart(tmp_path: Path) -> None:
    html = report.render(make_study(tmp_path / "toy", TWO))
    assert "<h2>Methods: dense</h2>" in html
    assert "<h2>Methods: PAT</h2>" in html
    assert html.count("Training time by stage.") == 2


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
    for expected in ("2 of 3", "90.10 \N{PLUS-MINUS SIGN} 0.10", "6.00", "reproduced", "long study, toy data", "top1-"):
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
