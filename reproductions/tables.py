"""Tables of results, generated from the evidence that comes with the suite: verdicts for the README, and details."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from clicktrain.errors import ConfigError
from clicktrain.files import write_atomic
from reproductions import arithmetic, cpu_tables, gpu_tables, matching, paths, retained
from reproductions.claims import CLAIMS, Claim
from reproductions.preset import MethodRow
from reproductions.store import Study
from reproductions.summary import MethodSummary, StoredRow, evidence_studies, stored_evidence, summarize
from reproductions.verdicts import NOT_EXCLUSIVE
from reproductions.wording import MISSING, Table, interval, measured, published, spread

BEGIN = "<!-- results: begin (python -m reproductions tables --write) -->"
END = "<!-- results: end -->"

_METHODS = (
    "method", "runs", "accuracy, %", "less dense, points", "compression", "inference FLOPs saved, %",
    "training FLOPs saved, %", "training, s", "time / dense", "peak memory, MB",
)  # fmt: skip
_MATCHES = ("rival", "time / dense", "quickest as good", "accuracy, points", "times faster")


def verdicts() -> str:
    """Return the README's part as Markdown: what became of each claim."""
    return claims_table()


def details() -> str:
    """Return all that the verdicts stand on as Markdown: studies and benchmarks."""
    studies = [study for study in evidence_studies() if study.preset.claims]  # others only prepare a study
    sections = {
        "Training FLOPs by arithmetic": [accountings_table()],
        "Studies": [table for study in studies for table in study_tables(study)],
        "Kernels and training steps on CPUs": _rendered(cpu_tables.kernels()),
        "Inference on CPUs": _rendered(cpu_tables.inference()),
        "GPU": _rendered(gpu_tables.stored()),
    }
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(tables) for title, tables in sections.items() if tables)


def _rendered(tables: Iterable[Table]) -> list[str]:
    return [f"{title}\n\n{_table(head, rows)}" for title, head, rows in tables]


FILES: dict[Path, Callable[[], str]] = {paths.README: verdicts, paths.DETAILS: details}
"""What stands between the markers of each file."""


def replaced(path: Path, made: str) -> str:
    """Return the text of a file with these tables between its markers.

    Raises
    ------
    ConfigError
        It has no markers.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path}: expected the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def write(path: Path, made: str) -> None:
    """Bring the tables in a file up to date."""
    write_atomic(path, replaced(path, made))


def claims_table() -> str:
    """Return the verdicts of the largest study that may decide on each claim, and which claims lack evidence."""
    stored = stored_evidence()
    rows = [_claim_row(row) for claim in CLAIMS for row in _strongest(stored.get(claim.id, []))]
    table = _table(("claim", "method", "published", "measured", "verdict", "evidence"), rows)
    missing = [claim for claim in CLAIMS if claim.id not in stored]
    return f"{table}\n\n{_not_measured(missing)}" if missing else table


def _strongest(rows: Sequence[StoredRow]) -> list[StoredRow]:
    """Return the rows of the source with the most runs, of one that may decide if there is any."""
    sizes = {
        row.source: (row.verdict.word != NOT_EXCLUSIVE, row.verdict.estimate.n)
        for row in rows
        if row.verdict.estimate is not None
    }
    best = max(sizes, key=lambda source: sizes[source]) if sizes else None
    return [row for row in rows if row.source == best]


def _claim_row(row: StoredRow) -> Sequence[str]:
    figures = measured(row.claim, row.verdict.estimate)
    return row.claim.statement, row.subject, published(row.claim), figures, f"**{row.verdict.word}**", row.source


def _not_measured(claims: Iterable[Claim]) -> str:
    listed = ", ".join(f"`{claim.id}`" for claim in claims)
    return f"Not measured yet, see `reproductions/claims.py`: {listed}."


def accountings_table() -> str:
    """Return which accounting and schedule give the published savings of training FLOPs."""
    low, high = arithmetic.PUBLISHED_TRAINING
    rows = [
        (
            group.schedule,
            f"{group.accounting}: {arithmetic.ACCOUNTINGS[group.accounting]}",
            f"{min(group.savings):.1f} to {max(group.savings):.1f} %",
            f"{group.inside} of {len(group.savings)}",
        )
        for group in arithmetic.groups()
    ]
    within = f"within the published {low:g} to {high:g} %"
    title = "Training FLOPs saved by the released configurations with a known accuracy, by arithmetic:"
    return f"{title}\n\n{_table(('schedule', 'accounting', 'saved', within), rows)}"


def study_tables(study: Study) -> list[str]:
    """Return what each method of a study reached and, where times count, how long as good ones took."""
    tables = [methods_table(study)]
    if _is_exclusive(study):
        tables += [matches_table(study, rows) for rows in study.preset.groups.values()]
    return list(filter(None, tables))


def _is_exclusive(study: Study) -> bool:
    return all(run.exclusive for run in study.runs)


def matches_table(study: Study, rows: Sequence[MethodRow]) -> str:
    """Return by rival the quickest subject that is as good; empty without rivals."""
    found = matching.matches(study, rows)
    if not found:
        return ""
    tolerance = f"mean at most {matching.ACCURACY_TOLERANCE} points lower"
    title = f"The same study, time at equal compression and accuracy ({tolerance}):"
    cells = [
        (
            match.rival.row.name,
            interval(match.rival.time_ratio, 2, "x"),
            match.subject.row.name if match.subject else "none",
            interval(match.accuracy_difference, signed=True),
            interval(match.speedup, 2, "x"),
        )
        for match in found
    ]
    return f"{title}\n\n{_table(_MATCHES, cells)}"


def methods_table(study: Study) -> str:
    """Return what each method of a study reached."""
    title = f"{study.preset.title}: {study.preset.data_label}, mean and standard deviation over seeds."
    if not _is_exclusive(study):
        title += " Other work ran beside some of the runs: times are of the others, or say little where there are none."
    head: Sequence[str] = _METHODS
    found = [summary for summary in summarize(study) if summary.n]
    rows = [_method_row(summary) for summary in found]
    if kept := retained.rows(retained.read(study.directory)):
        head = (*head, "importance retained before training on, %")
        rows = [(*row, _retained(kept, summary.row)) for row, summary in zip(rows, found, strict=True)]
    return f"{title}\n\n{_table(head, rows)}"


def _method_row(summary: MethodSummary) -> Sequence[str]:
    figures = summary.figures
    return (
        summary.row.name,
        str(summary.n),
        spread(figures.get("accuracy")),
        interval(summary.accuracy_difference, signed=True),
        spread(figures.get("compression"), 2, "x"),
        spread(figures.get("inference_flops_saved"), 1),
        spread(summary.training_flops_saved, 1),
        spread(figures.get("seconds"), 1),
        interval(summary.time_ratio, 2, "x"),
        spread(figures.get("peak_memory"), 0),
    )


def _retained(kept: Sequence[retained.RetainedRow], method: MethodRow) -> str:
    """Return what the pool of a method keeps of the dense networks' importance, by the method's own score."""
    options = method.config.get("method", {}).get("options", {})
    score, size = options.get("score", "taylor"), options.get("patterns")
    found = [row.pools[options["pool"]] for row in kept if (row.score, row.size) == (score, size)]
    return spread(found[0], 1) if found else MISSING


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") or MISSING for cell in line) + " |" for line in lines)
