"""What a study says: one row a method and one a claim, for the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reproductions import kernels, paths
from reproductions.claims import CLAIMS, Claim
from reproductions.paths import StudyDirectory
from reproductions.preset import MethodRow
from reproductions.stats import Estimate, estimate, paired_difference, paired_ratio, savings
from reproductions.store import FIGURES, Study, load_study
from reproductions.verdicts import NOT_ON_HARDWARE, SMOKE, Verdict, judge, not_run


@dataclass(frozen=True)
class MethodSummary:
    """A method's figures over its seeds.

    Attributes
    ----------
    row : MethodRow
        The method.
    n : int
        Finished runs.
    figures : dict of str to Estimate
        By name of `Figures`; empty without a finished run.
    accuracy_difference : Estimate or None
        Accuracy less that of the dense network, points, paired by seed.
    training_flops_saved : Estimate or None
        Percent of the FLOPs of training the dense network, paired by seed; negative for more than those.
    time_ratio : Estimate or None
        Training time over that of the dense network, paired by seed; of pairs that one machine trained.
    """

    row: MethodRow
    n: int
    figures: dict[str, Estimate]
    accuracy_difference: Estimate | None
    training_flops_saved: Estimate | None
    time_ratio: Estimate | None


@dataclass(frozen=True)
class ClaimRow:
    """A claim, judged for one method of a study.

    Attributes
    ----------
    claim : Claim
        The claim.
    subject : str
        Method that it was judged for; empty where the study does not check the claim.
    verdict : Verdict
        What the study's runs say.
    dense_accuracy : float or None
        Mean accuracy of the dense network that the method is compared with, percent: a poor one flatters all.
    """

    claim: Claim
    subject: str
    verdict: Verdict
    dense_accuracy: float | None


@dataclass(frozen=True)
class StoredRow:
    """A verdict from evidence that comes with the suite, and where that comes from."""

    source: str
    subject: str
    claim: Claim
    verdict: Verdict


def summarize(study: Study) -> list[MethodSummary]:
    """Return one row for each method of the preset, finished or not."""
    return [_summary(study, row) for row in study.preset.methods]


def _summary(study: Study, row: MethodRow) -> MethodSummary:
    reference = study.preset.dense_of(row).name
    samples = {figure: study.sample(row.name, figure) for figure in FIGURES}
    dense = {figure: study.sample(reference, figure) for figure in FIGURES}
    saved = savings(samples["training_flops"], dense["training_flops"])
    return MethodSummary(
        row,
        n=len(study.of(row.name)),
        figures={figure: estimate(sample.values()) for figure, sample in samples.items() if sample},
        accuracy_difference=None if row.role == "dense" else paired_difference(samples["accuracy"], dense["accuracy"]),
        training_flops_saved=estimate(saved.values()) if saved else None,
        time_ratio=paired_ratio(study.sample_beside(row.name, reference, "seconds"), dense["seconds"]),
    )


def check(study: Study) -> list[ClaimRow]:
    """Judge every claim there is; those that the preset does not check say so."""
    return [row for claim in CLAIMS for row in _check(study, claim)]


def _check(study: Study, claim: Claim) -> list[ClaimRow]:
    if claim.hardware == "cuda" and study.runs and not any(run.provenance["gpu"] for run in study.runs):
        return [ClaimRow(claim, "", Verdict(NOT_ON_HARDWARE), _dense_accuracy(study, study.preset.methods[0]))]
    if claim.id not in study.preset.claims:
        return [ClaimRow(claim, "", not_run(claim), _dense_accuracy(study, study.preset.methods[0]))]
    return [_judged(study, claim, row) for row in study.preset.subjects(claim)]


def _judged(study: Study, claim: Claim, row: MethodRow) -> ClaimRow:
    accuracy = _dense_accuracy(study, row)
    return ClaimRow(claim, row.name, _judge(study, claim, row, accuracy), accuracy)


def _dense_accuracy(study: Study, row: MethodRow) -> float | None:
    sample = study.sample(study.preset.dense_of(row).name, "accuracy")
    return estimate(sample.values()).mean if sample else None


def _judge(study: Study, claim: Claim, subject: MethodRow, dense_accuracy: float | None) -> Verdict:
    floor = study.preset.dense_floor
    rival = subject.rivals[claim.rival] if claim.rival else subject.name
    verdict = judge(
        claim,
        study.sample_beside(subject.name, rival, claim.metric),
        study.sample(rival, claim.metric),
        exclusive=all(run.exclusive for run in study.of(subject.name) + study.of(rival)),
    )
    if study.preset.smoke:
        return Verdict(SMOKE, verdict.estimate)
    if floor is not None and dense_accuracy is not None and dense_accuracy < floor:
        return Verdict(f"undecided (study void: the dense network is below {floor:g} %)")
    return verdict


def stored_verdicts(study: Study) -> dict[str, list[StoredRow]]:
    """Return by claim id what the suite's stored evidence says, other than that of `study` itself."""
    return stored_evidence(but=study.directory.name)


def with_evidence(
    rows: Iterable[ClaimRow], evidence: Mapping[str, list[StoredRow]]
) -> list[tuple[ClaimRow, list[StoredRow]]]:
    """Return each row with the stored evidence to be shown beside it: once a claim, by its first undecided row."""
    shown: set[str] = set()
    paired = []
    for row in rows:
        beside = [] if row.verdict.decided or row.claim.id in shown else evidence.get(row.claim.id, [])
        if beside:
            shown.add(row.claim.id)
        paired.append((row, beside))
    return paired


def stored_evidence(but: str | None = None) -> dict[str, list[StoredRow]]:
    """Return by claim id what the suite's stored evidence says, one study left out."""
    stored: dict[str, list[StoredRow]] = {}
    for row in (*_stored_studies(but), *_stored_benchmarks()):
        stored.setdefault(row.claim.id, []).append(row)
    return stored


def _stored_studies(but: str | None) -> Iterator[StoredRow]:
    for evidence in evidence_studies():
        if evidence.directory.name != but:
            source = f"{evidence.directory.name} study, {evidence.preset.data_label}"
            for row in check(evidence):
                if row.verdict.estimate is not None:
                    yield StoredRow(source, row.subject, row.claim, row.verdict)


def _stored_benchmarks() -> Iterator[StoredRow]:
    for benchmark in kernels.stored():
        for claim in CLAIMS:
            if claim.is_of_kernels and benchmark.on_gpu == (claim.hardware == "cuda"):
                source = f"{paths.BENCHMARKS.parent.name}/{paths.BENCHMARKS.name}/{benchmark.name}, {benchmark.machine}"
                subject = f"best of {len(benchmark.layers)} layers"
                yield StoredRow(source, subject, claim, benchmark.verdict(claim))


def evidence_studies() -> Sequence[Study]:
    """Return the studies stored with the suite."""
    directories = sorted(path.parent for path in paths.EVIDENCE.glob("*/study.toml"))
    return [load_study(StudyDirectory(path)) for path in directories]
