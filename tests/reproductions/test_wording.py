import math

import pytest

from reproductions.claims import BY_ID
from reproductions.stats import Estimate, estimate
from reproductions.summary import StoredRow
from reproductions.verdicts import EXCEEDED, TOO_FEW, Verdict
from reproductions.wording import interval, measured, published, spread, tally


def test_one_value_is_shown_without_spread_or_interval() -> None:
    single = estimate([1.234])
    assert spread(single) == "1.23"
    assert interval(single, signed=True) == "+1.23"


def test_several_values_are_shown_with_both() -> None:
    several = Estimate(-0.5, -0.75, -0.25, 0.2, 5)
    assert spread(several) == "-0.50 \N{PLUS-MINUS SIGN} 0.20"
    assert interval(several, signed=True) == "-0.50 [-0.75, -0.25]"
    assert measured(BY_ID["accuracy-vs-dense"], several) == "-0.50 points [-0.75, -0.25], n = 5"


def test_nothing_measured_is_a_dash() -> None:
    assert spread(None) == interval(None) == measured(BY_ID["accuracy-vs-dense"], None) == "-"


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ("end-to-end-time-vs-pat", "2.3x (tolerance 0.2)"),
        ("training-flops-saved", "36.7 to 45.2 % (tolerance 0.5)"),
        ("accuracy-vs-pdt", "over 0 points"),
        ("accuracy-vs-dense", "0 points (tolerance 1)"),
        ("fast-time", "at most 0.7x"),
    ],
)
def test_published_values_read_as_in_the_paper(claim: str, text: str) -> None:
    assert published(BY_ID[claim]) == text


def test_many_verdicts_are_counted() -> None:
    rows = [StoredRow("some study", "ours", BY_ID["fast-time"], Verdict(word)) for word in (TOO_FEW, EXCEEDED, TOO_FEW)]
    assert tally(rows) == "3 verdicts of stored evidence: 2 undecided (n too small), 1 exceeded"


def test_ratios_carry_their_sign_in_no_way() -> None:
    assert interval(Estimate(0.8, 0.7, 0.9, 0.1, 3), 2, "x") == "0.80x [0.70, 0.90]"
    assert math.isnan(estimate([1.0]).std)
