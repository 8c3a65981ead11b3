"""A study on the terminal: its methods and the verdicts on the paper's claims."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reproductions import retained
from reproductions.retained import RetainedRow
from reproductions.store import Study
from reproductions.summary import ClaimRow, MethodSummary, StoredRow, check, stored_verdicts, summarize
from reproductions.wording import MISSING, interval, measured, published, spread, stored

_PLAIN_WIDTH = 140
_STYLES = {"reproduced": "green", "exceeded": "green", "not reproduced": "red"}


def console() -> Console:
    """Return a console as wide as the terminal, and wide enough for the tables where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(width=_PLAIN_WIDTH, highlight=False)


def show(study: Study, output: Console) -> None:
    """Print the tables of a study."""
    output.print(methods_table(study, summarize(study)))
    measured_pools = retained.rows(retained.read(study.directory))
    if measured_pools:
        output.print(retained_table(measured_pools))
    output.print(claims_table(check(study), stored_verdicts(study)))


def methods_table(study: Study, summaries: list[MethodSummary]) -> Table:
    """Return the table of methods: mean, standard deviation and paired difference to the dense network."""
    table = Table(title=f"{study.preset.title}: {study.preset.data_label}", title_justify="left")
    table.add_column("method")
    for heading in ("n", "accuracy %", "- dense, points", "compression", "FLOPs saved %\ninference", "\ntraining"):
        table.add_column(heading, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("/ dense", justify="right")
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
    for row in rows:
        subject = f"\n{row.subject}" if row.subject else ""
        verdict = Text(row.verdict.word, style=_STYLES.get(row.verdict.word, ""))
        if not row.verdict.decided:
            for entry in evidence.get(row.claim.id, []):
                verdict.append(f"\n{stored(entry)}", style="dim")
        table.add_row(
            Text(f"{row.claim.statement}{subject}"),
            published(row.claim),
            measured(row.claim, row.verdict.estimate),
            verdict,
            MISSING if row.dense_accuracy is None else f"{row.dense_accuracy:.2f}",
        )
    return table
