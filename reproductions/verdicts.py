"""The rule that turns measurements into a verdict on a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from reproductions.claims import Claim
from reproductions.stats import Estimate, estimate, paired_difference, paired_ratio, savings

REPRODUCED = "reproduced"
EXCEEDED = "exceeded"
NOT_REPRODUCED = "not reproduced"
TOO_FEW = "undecided (n too small)"
NOT_EXCLUSIVE = "undecided (not exclusive)"
NOT_ON_HARDWARE = "not run on this hardware"
SMOKE = "undecided (smoke run)"
QUICK_BENCHMARK = "undecided (quick benchmark)"
DECIDED = (REPRODUCED, EXCEEDED, NOT_REPRODUCED)


@dataclass(frozen=True)
class Verdict:
    """What the measurements say about a claim.

    Attributes
    ----------
    word : str
        The verdict, in the words above or "not run in this preset (needs ...)".
    estimate : Estimate or None
        The compared quantity in the claim's unit; None where nothing was measured.
    """

    word: str
    estimate: Estimate | None = None

    @property
    def decided(self) -> bool:
        """Whether the claim was confirmed or refuted."""
        return self.word in DECIDED


def not_run(claim: Claim) -> Verdict:
    """Return the verdict on a claim that a preset does not check."""
    return Verdict(f"not run in this preset (needs {claim.needs})")


def judge(claim: Claim, ours: Mapping[int, float], rival: Mapping[int, float], *, exclusive: bool = True) -> Verdict:
    """Judge a claim from figures by seed.

    A claim is one-sided: being better than published by more than the tolerance is "exceeded", never a
    failure. It is reproduced when the whole 95 % interval is at least as good as the published range less the
    tolerance, not reproduced when the whole interval is worse, and undecided in between.

    Parameters
    ----------
    claim : Claim
        The claim.
    ours, rival : mapping of seed to figure
        `rival` is not used for claims about the value itself.
    exclusive : bool
        Whether nothing else ran on the machine.
    """
    measured = _measure(claim, ours, rival)
    if measured is None:
        return Verdict(TOO_FEW)
    if claim.exclusive and not exclusive:
        return Verdict(NOT_EXCLUSIVE, measured)
    if measured.n < claim.min_seeds:
        return Verdict(TOO_FEW, measured)
    sign = 1 if claim.better == "higher" else -1
    worst, best = sorted((sign * measured.low, sign * measured.high))
    floor, ceiling = sorted(sign * value for value in claim.published)
    if worst > ceiling + claim.tolerance:
        return Verdict(EXCEEDED, measured)
    if worst >= floor - claim.tolerance:
        return Verdict(REPRODUCED, measured)
    if best < floor - claim.tolerance:
        return Verdict(NOT_REPRODUCED, measured)
    return Verdict(TOO_FEW, measured)


def _measure(claim: Claim, ours: Mapping[int, float], rival: Mapping[int, float]) -> Estimate | None:
    """Return the compared quantity, or None where no seed has it."""
    match claim.comparison:
        case "value":
            return _count(ours)
        case "mean":
            return estimate(ours.values()) if ours else None
        case "saving":
            return _count(savings(ours, rival))
        case "difference":
            return paired_difference(ours, rival)
        case "ratio":
            return paired_ratio(ours, rival)
        case "speedup":
            return paired_ratio(rival, ours)


def _count(figures: Mapping[int, float]) -> Estimate | None:
    """Return the mean of exact counts with their range as interval: they have no sampling noise."""
    if not figures:
        return None
    return replace(estimate(figures.values()), low=min(figures.values()), high=max(figures.values()))
