"""Means and 95 % confidence intervals of small samples, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes
    ----------
    mean : float
        Mean of the sample (geometric for ratios).
    low, high : float
        Ends of the 95 % confidence interval; infinite where one value cannot give one.
    std : float
        Sample standard deviation (of the logarithms, for ratios); NaN for a single value.
    n : int
        Values in the sample.
    """

    mean: float
    low: float
    high: float
    std: float
    n: int

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate with an increasing function applied to its mean and interval."""
        return Estimate(function(self.mean), function(self.low), function(self.high), self.std, self.n)


def estimate(sample: Iterable[float]) -> Estimate:
    """Estimate the mean of a sample that is about normally distributed (Student's t interval).

    Raises
    ------
    ValueError
        If the sample is empty.
    """
    values = list(sample)
    if not values:
        raise ValueError("sample: expected at least one value")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf, math.nan, 1)
    std = statistics.stdev(values)
    margin = t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * std / math.sqrt(len(values))
    return Estimate(mean, mean - margin, mean + margin, std, len(values))


def paired_difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Estimate the mean of ours - reference over shared seeds; None if they share none."""
    differences = [ours[seed] - reference[seed] for seed in ours if seed in reference]
    return estimate(differences) if differences else None


def paired_ratio(ours: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Estimate the geometric mean of ours / reference over shared seeds; None if they share none."""
    logarithms = [math.log(ours[seed] / reference[seed]) for seed in ours if seed in reference]
    return estimate(logarithms).map(math.exp) if logarithms else None


def savings(ours: Mapping[int, float], reference: Mapping[int, float]) -> dict[int, float]:
    """Return by seed what ours saves of the reference, in percent, over shared seeds."""
    return {seed: 100 * (1 - ours[seed] / reference[seed]) for seed in ours if seed in reference}


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution, to about 1e-9.

    Parameters
    ----------
    probability : float
        In (0.5, 1): 0.975 for a two-sided 95 % interval.
    degrees : int
        Degrees of freedom, at least 1.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"probability={probability}, degrees={degrees}: expected (0.5, 1) and at least 1")
    central = 2 * probability - 1
    low, high = 0.0, math.pi / 2  # bisect on the angle: t = sqrt(degrees) * tan(angle) covers all of (0, inf)
    for _ in range(60):
        middle = (low + high) / 2
        if _t_central_probability(middle, degrees) < central:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _t_central_probability(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) * tan(angle)); Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    odd = degrees % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
