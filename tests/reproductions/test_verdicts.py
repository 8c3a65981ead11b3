import math
from dataclasses import replace

import pytest

from clicktrain import official
from reproductions.claims import BY_ID, CLAIMS
from reproductions.verdicts import EXCEEDED, NOT_EXCLUSIVE, NOT_REPRODUCED, REPRODUCED, TOO_FEW, judge, not_run

DENSE = {0: 90.0, 1: 90.5, 2: 89.8}
ACCURACY = BY_ID["accuracy-vs-dense"]


def _shifted(by: float, spread: float = 0.0) -> dict[int, float]:
    return {seed: value + by + spread * (seed - 1) for seed, value in DENSE.items()}


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(0.0, REPRODUCED), (-0.9, REPRODUCED), (0.9, REPRODUCED), (-1.1, NOT_REPRODUCED), (1.1, EXCEEDED)],
)
def test_a_difference_is_judged_by_its_tolerance_of_one_point(shift: float, expected: str) -> None:
    assert judge(ACCURACY, _shifted(shift), DENSE).word == expected


def test_an_interval_across_the_bound_decides_nothing() -> None:
    verdict = judge(ACCURACY, _shifted(-0.9, spread=0.5), DENSE)
    assert verdict.word == TOO_FEW
    assert verdict.estimate is not None
    assert verdict.estimate.low < -1 < verdict.estimate.high
    assert not verdict.decided


def test_too_few_seeds_decide_nothing() -> None:
    verdict = judge(ACCURACY, {0: 90.0, 1: 90.5}, DENSE)
    assert verdict.word == TOO_FEW
    assert verdict.estimate is not None
    assert verdict.estimate.n == 2


def test_no_shared_seed_measures_nothing() -> None:
    verdict = judge(ACCURACY, {7: 90.0}, DENSE)
    assert (verdict.word, verdict.estimate) == (TOO_FEW, None)


def test_lower_is_better_for_time() -> None:
    claim = BY_ID["no-time-overhead"]
    dense = dict.fromkeys(range(3), 100.0)

    def verdict(seconds: float) -> str:
        return judge(claim, dict.fromkeys(range(3), seconds), dense).word

    assert verdict(104.0) == REPRODUCED
    assert verdict(106.0) == NOT_REPRODUCED
    assert verdict(80.0) == EXCEEDED


def test_speedup_is_the_rivals_time_over_ours() -> None:
    claim = BY_ID["end-to-end-time-vs-pat"]
    verdict = judge(claim, dict.fromkeys(range(3), 100.0), dict.fromkeys(range(3), 225.0))
    assert verdict.word == REPRODUCED
    assert verdict.estimate is not None
    assert verdict.estimate.mean == pytest.approx(2.25)


def test_times_of_shared_machines_decide_nothing_but_accuracies_do() -> None:
    times = dict.fromkeys(range(3), 100.0)
    assert judge(BY_ID["no-time-overhead"], times, times, exclusive=False).word == NOT_EXCLUSIVE
    assert judge(ACCURACY, DENSE, DENSE, exclusive=False).word == REPRODUCED


@pytest.mark.parametrize(
    ("saved", "expected"),
    [([80.0], REPRODUCED), ([73.2], REPRODUCED), ([72.0], NOT_REPRODUCED), ([87.0], EXCEEDED), ([60.0, 80.0], TOO_FEW)],
)
def test_counts_are_exact_and_judged_by_their_range(saved: list[float], expected: str) -> None:
    verdict = judge(BY_ID["inference-flops-saved"], dict(enumerate(saved)), {})
    assert verdict.word == expected
    assert verdict.estimate is not None
    assert (verdict.estimate.low, verdict.estimate.high) == (min(saved), max(saved))


def test_an_accuracy_is_judged_by_its_mean_over_seeds() -> None:
    claim = BY_ID["top1-cifar10_vgg13@9.0x"]
    assert claim.published == (93.52, 93.52)
    assert judge(claim, {0: 93.4, 1: 93.5, 2: 93.6}, {}).word == REPRODUCED
    assert judge(claim, {0: 93.0, 1: 93.6, 2: 92.2}, {}).word == TOO_FEW
    assert judge(claim, {0: 92.0, 1: 92.1, 2: 91.9}, {}).word == NOT_REPRODUCED
    assert judge(claim, {0: 94.2, 1: 94.3, 2: 94.25}, {}).word == EXCEEDED
    assert judge(claim, {}, {}).estimate is None


def test_a_goal_that_is_an_upper_bound_cannot_be_exceeded() -> None:
    claim, dense = BY_ID["fast-time"], dict.fromkeys(range(3), 100.0)
    assert judge(claim, dict.fromkeys(range(3), 70.0), dense).word == REPRODUCED
    assert judge(claim, dict.fromkeys(range(3), 10.0), dense).word == REPRODUCED
    assert judge(claim, dict.fromkeys(range(3), 71.0), dense).word == NOT_REPRODUCED


def test_every_accuracy_in_the_released_comments_is_a_claim() -> None:
    claims = [claim for claim in CLAIMS if claim.id.startswith("top1-")]
    reported = [config for config in official.ROWS if config.reported]
    assert [claim.subject for claim in claims] == [config.address for config in reported]
    assert len(claims) == 13
    for claim, config in zip(claims, reported, strict=True):
        best = max(result.top1 for result in config.reported)
        assert claim.published == (best, best)
        assert config.lam in {result.lam for result in config.reported if result.top1 == best}
        assert config.row in claim.statement


def test_saving_is_of_the_rivals_flops() -> None:
    verdict = judge(BY_ID["training-flops-saved"], {0: 60.0}, {0: 100.0})
    assert verdict.word == REPRODUCED
    assert verdict.estimate is not None
    assert verdict.estimate.mean == pytest.approx(40.0)


def test_a_claim_without_a_figure_needs_only_the_sign() -> None:
    claim = BY_ID["importance-vs-magnitude"]
    assert judge(claim, _shifted(0.2), DENSE).word == REPRODUCED
    assert judge(claim, _shifted(-0.2), DENSE).word == NOT_REPRODUCED


def test_a_claim_that_is_not_checked_says_what_it_needs() -> None:
    assert not_run(BY_ID["accuracy-vs-pdt"]).word == "not run in this preset (needs PruneTrain)"


def test_claims_are_well_formed() -> None:
    assert len(BY_ID) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.published[0] <= claim.published[1]
        assert claim.tolerance >= 0
        assert (claim.rival is None) == (claim.comparison in ("value", "mean"))
        assert claim.better == "higher" or not math.isinf(claim.published[1])
    with pytest.raises(AttributeError):
        CLAIMS[0].tolerance = 9.0  # type: ignore[misc]
    assert replace(CLAIMS[0], tolerance=9.0) != CLAIMS[0]
