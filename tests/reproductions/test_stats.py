import math

import pytest

from reproductions.stats import estimate, paired_difference, paired_ratio, savings, t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),  # published tables of the 0.975 quantile
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantile_agrees_with_the_published_table(degrees: int, expected: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-5)


def test_t_quantile_at_another_level() -> None:
    assert t_quantile(0.95, 5) == pytest.approx(2.0150, abs=5e-5)
    assert t_quantile(0.995, 4) == pytest.approx(4.6041, abs=5e-5)


@pytest.mark.parametrize(("probability", "degrees"), [(0.5, 3), (1.0, 3), (0.975, 0)])
def test_t_quantile_refuses_what_has_no_meaning(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match=f"probability={probability}, degrees={degrees}"):
        t_quantile(probability, degrees)


def test_interval_of_a_known_sample() -> None:
    found = estimate([1.0, 2.0, 3.0])
    margin = 4.30265 / math.sqrt(3)
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2 - margin, abs=1e-4)
    assert found.high == pytest.approx(2 + margin, abs=1e-4)


def test_one_value_gives_a_mean_and_no_interval() -> None:
    found = estimate([5.0])
    assert (found.mean, found.low, found.high, found.n) == (5.0, -math.inf, math.inf, 1)
    assert math.isnan(found.std)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_pairing_uses_only_shared_seeds() -> None:
    found = paired_difference({0: 5.0, 1: 6.0, 2: 100.0}, {0: 4.0, 1: 4.0, 7: 0.0})
    assert found is not None
    assert (found.mean, found.n) == (1.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairing_removes_what_seeds_have_in_common() -> None:
    reference = {0: 10.0, 1: 50.0, 2: 90.0}
    found = paired_difference({seed: value - 1 for seed, value in reference.items()}, reference)
    assert found is not None
    assert (found.mean, found.low, found.high) == (-1.0, -1.0, -1.0)


def test_ratio_is_the_geometric_mean() -> None:
    found = paired_ratio({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0})
    assert found is not None
    assert found.mean == pytest.approx(4.0)
    assert 0 < found.low < found.mean < found.high


def test_savings_are_percent_of_the_reference() -> None:
    assert savings({0: 60.0, 1: 110.0}, {0: 100.0, 1: 100.0, 2: 1.0}) == {0: 40.0, 1: pytest.approx(-10.0)}
