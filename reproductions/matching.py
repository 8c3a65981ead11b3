"""Time at equal accuracy and compression: for each rival, the quickest of our methods that is as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reproductions.preset import MethodRow
from reproductions.stats import Estimate, paired_difference, paired_ratio
from reproductions.store import Study
from reproductions.summary import MethodSummary, summarize

ACCURACY_TOLERANCE = 0.5
"""Points that a method may lose against the rival and still count as as accurate, on the mean over shared seeds."""
COMPRESSION_TOLERANCE = 0.02
"""Share by which mean compressions may differ and still count as equal."""
PUBLISHED_PHASES = {
    "phases of PatDNN's code": 370 / 190,  # 190 epochs of training, 120 of ADMM, 60 of retraining
    "a rival that makes 2.3x": 437 / 190,
}
"""Epochs of pruning after training over those of dense training, by what they follow from."""


@dataclass(frozen=True)
class Match:
    """A rival, and the quickest subject of equal compression that is as accurate.

    Attributes
    ----------
    rival : MethodSummary
        The rival.
    subject : MethodSummary or None
        None where no subject of equal compression is as accurate.
    accuracy_difference : Estimate or None
        Accuracy of the subject less that of the rival, points, paired by seed.
    speedup : Estimate or None
        Time of the rival over that of the subject, paired by seed.
    """

    rival: MethodSummary
    subject: MethodSummary | None = None
    accuracy_difference: Estimate | None = None
    speedup: Estimate | None = None


def matches(study: Study, rows: Sequence[MethodRow]) -> list[Match]:
    """Return a match for each finished rival among some methods of a study that has a subject's compression."""
    finished = {summary.row.name: summary for summary in summarize(study) if summary.n}
    among = [finished[row.name] for row in rows if row.name in finished]
    subjects = [summary for summary in among if summary.row.role == "subject"]
    found = []
    for rival in among:
        equal = [subject for subject in subjects if rival.row.role == "rival" and _is_as_small(subject, rival)]
        if equal:
            found.append(_match(study, rival, equal))
    return found


def _is_as_small(subject: MethodSummary, rival: MethodSummary) -> bool:
    ours, theirs = (each.figures["compression"].mean for each in (subject, rival))
    return abs(ours / theirs - 1) <= COMPRESSION_TOLERANCE


def _match(study: Study, rival: MethodSummary, subjects: Sequence[MethodSummary]) -> Match:
    accuracy, seconds = (study.sample(rival.row.name, figure) for figure in ("accuracy", "seconds"))
    found = []
    for subject in subjects:
        difference = paired_difference(study.sample(subject.row.name, "accuracy"), accuracy)
        speedup = paired_ratio(seconds, study.sample_beside(subject.row.name, rival.row.name, "seconds"))
        if difference and speedup and difference.mean >= -ACCURACY_TOLERANCE:
            found.append(Match(rival, subject, difference, speedup))
    return max(found, key=_speedup, default=Match(rival))


def _speedup(match: Match) -> float:
    assert match.speedup is not None
    return match.speedup.mean


def phases(study: Study) -> Mapping[str, float]:
    """Return the marks that a plot over time needs: published lengths, where the study has pruning after training."""
    return PUBLISHED_PHASES if "end-to-end-time-vs-pat" in study.preset.claims else {}
