"""Budgets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.budget import LayerSize, feasible_interval, from_ratios, share_out
from clicktrain.errors import InvalidArgument

LAYERS = {
    "early": LayerSize(16, 8, 9, 4, 1024),
    "late": LayerSize(64, 32, 9, 4, 64),
    "point": LayerSize(32, 64, 1, 1, 64),
}
FIXED = 216


def scores(seed=0, power=4):
    random = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s.filters, s.channels, generator=random) ** power for n, s in LAYERS.items()}


@pytest.mark.parametrize(("ratio", "removed"), [(0, 0), (0.55, 1), (55, 71), (50, 64), (87.5, 112)])
def test_removed_kernels_are_the_exact_ceiling(ratio, removed):
    assert from_ratios({"early": LAYERS["early"]}, [ratio]) == {"early": 128 - removed}


def test_ratios_that_floats_would_round_wrongly():
    layer = LayerSize(10, 1000, 9, 4, 1)
    assert from_ratios({"a": layer}, [0.07]) == {"a": 10000 - 7}  # 0.07 * 10000 / 100 is 7.000000000000001 in floats


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([50, 50], "2 values for 3"),
        ([50, 50, 100], "100 of layer point"),
        ([-1, 50, 50], "-1 of layer early"),
        ([50, 50, 99], "without a kernel"),
        ({"early": 50, "late": 50, "typo": 50}, "point, typo"),
    ],
)
def test_bad_ratios_are_named(ratios, text):
    with pytest.raises(InvalidArgument, match=text):
        from_ratios(LAYERS, ratios)


def spent(kept, cost):
    return FIXED + sum(kept[n] * s.kernel_cost(cost) for n, s in LAYERS.items())


def dense(cost):
    return FIXED + sum(s.dense_cost(cost) for s in LAYERS.values())


@given(st.floats(0, 1), st.integers(0, 100), st.sampled_from(["weights", "macs"]))
def test_the_target_is_met_to_the_last_kernel(position, seed, cost):
    low, high = feasible_interval(LAYERS, FIXED, cost)
    target = round(low + position * (high - low), 3)
    if not low <= target <= high:
        return
    kept = share_out(LAYERS, scores(seed), target, FIXED, cost)
    assert all(s.filters <= kept[n] <= s.kernels for n, s in LAYERS.items())
    room = math.floor(dense(cost) / target) - spent(kept, cost)
    assert 0 <= room < max(s.kernel_cost(cost) for s in LAYERS.values()) or kept == {
        n: s.kernels for n, s in LAYERS.items()
    }


def test_both_ends_of_the_interval_can_be_had():
    low, high = feasible_interval(LAYERS, FIXED)
    assert share_out(LAYERS, scores(), low, FIXED) == {n: s.kernels for n, s in LAYERS.items()}
    assert share_out(LAYERS, scores(), math.floor(high * 1e6) / 1e6, FIXED) == {n: s.filters for n, s in LAYERS.items()}


def test_no_exchange_of_two_kernels_retains_more():
    """Optimal up to the last kernel: moving budget between two layers lowers the sum of log retained."""
    values = scores(3)
    kept = share_out(LAYERS, values, 4.0, FIXED)

    def objective(counts):
        total = 0.0
        for name, score in values.items():
            best, column = score.double().max(1)
            rest = score.double().scatter(1, column[:, None], -1).flatten().sort(descending=True).values
            total += math.log(float(best.sum() + rest[: counts[name] - len(best)].sum()) / float(score.double().sum()))
        return total

    for source, target in (("early", "late"), ("late", "early")):
        moved = {**kept, source: kept[source] - 1, target: kept[target] + 1}
        assert objective(moved) <= objective(kept) + 1e-9


def test_layers_without_any_score_still_get_a_budget():
    zero = {n: torch.zeros(s.filters, s.channels) for n, s in LAYERS.items()}
    kept = share_out(LAYERS, zero, 4.0, FIXED)
    assert spent(kept, "weights") <= dense("weights") / 4


@pytest.mark.parametrize("target", [0.5, 1000.0])
def test_an_impossible_target_names_the_interval(target):
    low, high = feasible_interval(LAYERS, FIXED)
    with pytest.raises(ValueError, match=f"target_compression={target}: feasible are {low:.4g} to {high:.4g}"):
        share_out(LAYERS, scores(), target, FIXED)
