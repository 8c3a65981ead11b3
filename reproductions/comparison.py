"""Two studies side by side."""

from __future__ import annotations

from dataclasses import dataclass

from reproductions.claims import Claim
from reproductions.store import Study
from reproductions.summary import ClaimRow, MethodSummary, check, summarize


@dataclass(frozen=True)
class ClaimPair:
    """A claim as two studies judge it for a method; None where one has no such method."""

    claim: Claim
    subject: str
    left: ClaimRow | None
    right: ClaimRow | None


@dataclass(frozen=True)
class MethodPair:
    """A method of either study."""

    name: str
    left: MethodSummary | None
    right: MethodSummary | None


def methods(left: Study, right: Study) -> list[MethodPair]:
    """Return all methods by name, in the order of the first study and then of the second."""
    both = [{summary.row.name: summary for summary in summarize(study)} for study in (left, right)]
    return [MethodPair(name, both[0].get(name), both[1].get(name)) for name in dict.fromkeys([*both[0], *both[1]])]


def claims(left: Study, right: Study) -> list[ClaimPair]:
    """Return what either study has measured, by claim and method."""
    both = [_measured(study) for study in (left, right)]
    pairs = []
    for key in dict.fromkeys([*both[0], *both[1]]):
        first, second = (rows.get(key) for rows in both)
        row = first or second
        assert row is not None
        pairs.append(ClaimPair(row.claim, row.subject, first, second))
    return pairs


def _measured(study: Study) -> dict[tuple[str, str], ClaimRow]:
    return {(row.claim.id, row.subject): row for row in check(study) if row.verdict.estimate is not None}
