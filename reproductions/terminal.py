"""A study on the terminal: its methods and the verdicts on the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reproductions import comparison, matching, retained
from reproductions.estimates import Estimate
from reproductions.matching import Match
from reproductions.retained import RetainedRow
from reproductions.store import Study
from reproductions.summary import ClaimRow, MethodSummary, StoredRow, check, stored_verdicts, summarize, with_evidence
from reproductions.wording import FEW, MISSING, interval, measured, published, spread, stored, tally

_PLAIN_WIDTH = 140
_STYLES = {"reproduced": "green", "exceeded": "green", "not reproduced": "red"}


def console() -> Console:
    """Return a console as wide as the terminal, and wide enough for the tables where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(width=_PLAIN_WIDTH, highlight=False)


def show(study: Study, output: Console) -> None:
    """Print the tables of a study."""
    output.print(methods_table(study, summarize(study)))
    for methods in study.preset.groups.values():
        if found := matching.matches(study, methods):
            output.print(matches_table(found))
    measured_pools = retained.rows(retained.read(study.directory))
    if measured_pools:
        output.print(retained_table(measured_pools))
    rows, evidence = check(study), stored_verdicts(study)
    unmeasured = [row for row in rows if row.verdict.estimate is None and row.claim.id not in evidence]
    output.print(claims_table([row for row in rows if row not in unmeasured], evidence))
    if unmeasured:
        output.print(unmeasured_table(unmeasured))


def methods_table(study: Study, summaries: list[MethodSummary]) -> Table:
    """Return the table of methods: mean, standard deviation and paired difference to the dense network."""
    table = Table(title=f"{study.preset.title}: {study.preset.data_label}", title_justify="left")
    table.add_column("method")
    for heading in ("n", "accuracy %", "- dense, points", "compression", "FLOPs saved %\ninference", "\ntraining"):
        table.add_column(heading, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("/ dense", justify="right")
    table.add_column("peak MB", justify="right")
    for summary in summaries:
        figures = summary.figures
        table.add_row(
            Text(summary.row.name),
            f"{summary.n} of {len(study.preset.seeds)}",
            spread(figures.get("accuracy")),
            interval(summary.accuracy_difference, signed=True),
            spread(figures.get("compression"), 2, "x"),
            spread(figures.get("inference_flops_saved"), 1),
            spread(summary.training_flops_saved, 1),
            spread(figures.get("seconds"), 1),
            interval(summary.time_ratio, 2, "x"),
            spread(figures.get("peak_memory"), 0),
        )
    return table


def matches_table(matches: list[Match]) -> Table:
    """Return the table of rivals and the quickest subjects that are as good."""
    title = f"Time at equal compression and accuracy (mean at most {matching.ACCURACY_TOLERANCE} points lower)"
    table = Table(title=title, title_justify="left")
    for heading in ("rival", "/ dense", "quickest as good", "accuracy, points", "times faster"):
        table.add_column(heading)
    for match in matches:
        table.add_row(
            Text(match.rival.row.name),
            interval(match.rival.time_ratio, 2, "x"),
            Text(match.subject.row.name if match.subject else "none"),
            interval(match.accuracy_difference, signed=True),
            interval(match.speedup, 2, "x"),
        )
    return table


def retained_table(rows: list[RetainedRow]) -> Table:
    """Return the table of what pools of patterns retain of the importance of trained weights."""
    table = Table(title="Importance retained by the best pattern of each kernel, %", title_justify="left")
    table.add_column("score")
    for heading in ("patterns", *rows[0].pools):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.score, str(row.size), *(spread(pool) for pool in row.pools.values()))
    return table


def claims_table(rows: list[ClaimRow], evidence: dict[str, list[StoredRow]]) -> Table:
    """Return the table of claims: published, measured, verdict, and what stored evidence adds."""
    table = Table(title="Claims of the paper", title_justify="left", show_lines=True)
    for heading in ("claim", "published", "measured here", "verdict", "dense %"):
        table.add_column(heading)
    for row, beside in with_evidence(rows, evidence):
        subject = f"\n{row.subject}" if row.subject else ""
        verdict = Text(row.verdict.word, style=_STYLES.get(row.verdict.word, ""))
        for line in [tally(beside)] if len(beside) > FEW else map(stored, beside):
            verdict.append(f"\n{line}", style="dim")
        table.add_row(
            Text(f"{row.claim.statement}{subject}"),
            published(row.claim),
            measured(row.claim, row.verdict.estimate),
            verdict,
            MISSING if row.dense_accuracy is None else f"{row.dense_accuracy:.2f}",
        )
    return table


def unmeasured_table(rows: list[ClaimRow]) -> Table:
    """Return the table of the claims of which nothing is measured, neither here nor in stored evidence."""
    table = Table(title="Claims of which nothing is measured yet", title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(row.claim.id, Text(row.verdict.word))
    return table


def comparison_table(left: Study, right: Study) -> Table:
    """Return the table of the claims that either of two studies has measured."""
    table = Table(title="Claims", title_justify="left", show_lines=True)
    for heading in ("claim", "published", left.directory.name, right.directory.name):
        table.add_column(heading)
    for pair in comparison.claims(left, right):
        cells = [
            MISSING if row is None else f"{measured(row.claim, row.verdict.estimate)}\n{row.verdict.word}"
            for row in (pair.left, pair.right)
        ]
        table.add_row(Text(f"{pair.claim.statement}\n{pair.subject}"), published(pair.claim), *map(Text, cells))
    return table


def estimates_table(estimates: Sequence[Estimate], jobs: int = 1, price: float | None = None) -> Table:
    """Return the table of a study's runs before they run, with its sum; `price` is that of an hour."""
    hours = sum(estimate.seconds for estimate in estimates) / 3600
    together = f"\n{hours / jobs:.2f} h with --jobs {jobs}" if jobs > 1 else ""
    table = Table(title=f"{len(estimates)} runs", title_justify="left", show_footer=True)
    for heading, footer in (("run", "all"), ("state", ""), ("configuration", "")):
        table.add_column(heading, footer)
    table.add_column("steps", str(sum(estimate.steps for estimate in estimates)), justify="right")
    table.add_column("hours", f"{hours:.2f}{together}", justify="right")
    if price is not None:
        table.add_column("cost", f"{hours * price:.2f}", justify="right")
    table.add_column("estimated from")
    for entry in estimates:
        cost = [] if price is None else [f"{entry.seconds / 3600 * price:.2f}"]
        time = f"{entry.seconds / 3600:.3f}"
        config_id = entry.spec.config.config_id()[:12]
        table.add_row(entry.spec.label, entry.state, config_id, str(entry.steps), time, *cost, entry.basis)
    return table
