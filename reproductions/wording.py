"""How numbers and verdicts read, in the terminal and in the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from reproductions import arithmetic
from reproductions.claims import Claim
from reproductions.stats import Estimate
from reproductions.store import Run
from reproductions.summary import StoredRow

MISSING = "-"
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, head, rows."""
FEW = 3
"""Verdicts of stored evidence that are shown one by one; more are counted."""


def spread(estimate: Estimate | None, digits: int = 2, unit: str = "") -> str:
    """Return "mean +- std", or the mean alone where there is one value."""
    if estimate is None:
        return MISSING
    mean = f"{estimate.mean:.{digits}f}"
    text = mean if math.isnan(estimate.std) else f"{mean} \N{PLUS-MINUS SIGN} {estimate.std:.{digits}f}"
    return text + unit


def interval(estimate: Estimate | None, digits: int = 2, unit: str = "", *, signed: bool = False) -> str:
    """Return "mean [low, high]", or the mean alone where one value gives no interval."""
    if estimate is None:
        return MISSING
    form = f"{'+' if signed else ''}.{digits}f"
    text = f"{estimate.mean:{form}}{unit}"
    if math.isinf(estimate.high) or estimate.low == estimate.high:
        return text
    return f"{text} [{estimate.low:{form}}, {estimate.high:{form}}]"


def measured(claim: Claim, estimate: Estimate | None) -> str:
    """Return what was measured for a claim, with its interval, unit and n."""
    if estimate is None:
        return MISSING
    unit = "x" if claim.unit == "x" else f" {claim.unit}"
    return f"{interval(estimate, 2, unit, signed=claim.comparison == 'difference')}, n = {estimate.n}"


def published(claim: Claim) -> str:
    """Return the published value of a claim with its unit and the tolerance."""
    low, high = claim.published
    unit = "x" if claim.unit == "x" else f" {claim.unit}"
    if math.isinf(high):
        return f"over {low:g}{unit}"
    if low == 0 < high:
        return f"at most {high:g}{unit}"
    value = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"{value}{unit} (tolerance {claim.tolerance:g})"


def stored(entry: StoredRow) -> str:
    """Return the verdict of stored evidence, and where that comes from."""
    figures = measured(entry.claim, entry.verdict.estimate)
    return f"{entry.verdict.word}: {entry.subject} {figures} (stored evidence: {entry.source})"


def tally(entries: Sequence[StoredRow]) -> str:
    """Return how many verdicts of stored evidence there are, by word."""
    counts = Counter(entry.verdict.word for entry in entries)
    listed = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    return f"{len(entries)} verdicts of stored evidence: {listed}"


def accountings_note() -> str:
    """Return how many released configurations lie in the published range, by schedule and accounting."""
    low, high = arithmetic.PUBLISHED_TRAINING
    counts = ", ".join(
        f"{group.name}: {min(group.savings):.1f} to {max(group.savings):.1f} %, {group.inside} of {len(group.savings)}"
        for group in arithmetic.groups()
    )
    return f"Range, and how many lie in the published one of {low:g} to {high:g} %: {counts}."


def shared_epochs(runs: Sequence[Run]) -> str | None:
    """Return how many epochs the runs of each method took over from the dense run; None where none did."""
    epochs = {run.spec.method: run.began_from["epochs"] for run in runs if run.began_from}
    if not epochs:
        return None
    listed = ", ".join(f"{method} {count}" for method, count in epochs.items())
    return (
        f"Epochs taken over from the dense run of the same seed, equal to the last bit: {listed}. "
        "Their seconds and FLOPs are counted in full for every method."
    )
