"""Dynamic pools."""

import math

import pytest
import torch

from clicktrain.errors import InvalidArgument
from clicktrain.patterns import PatternPool, all_patterns, official_pool
from clicktrain.pool import coverage_pool, frequency_pool, retained_importance

PLANTED = PatternPool(tuple(all_patterns()[i] for i in (3, 40, 77, 125)))


def planted_scores(shapes=((16, 8), (32, 16)), noise=0.05, seed=0):
    """Score kernels so that each one needs one of the planted patterns, over a floor of noise."""
    random = torch.Generator().manual_seed(seed)
    layers = []
    for filters, channels in shapes:
        which = torch.randint(len(PLANTED), (filters, channels), generator=random)
        strength = 0.5 + torch.rand(filters, channels, 3, 3, generator=random)
        layers.append(PLANTED.masks()[which] * strength + noise * torch.rand(strength.shape, generator=random))
    return layers


@pytest.mark.parametrize("choose", [frequency_pool, coverage_pool])
@pytest.mark.parametrize("seed", range(5))
def test_planted_patterns_are_recovered(choose, seed):
    assert set(choose(planted_scores(seed=seed), 4)) == set(PLANTED)


def test_frequency_pools_are_prefixes_of_larger_ones():
    scores = planted_scores(noise=1.0)
    assert frequency_pool(scores, 12).patterns[:4] == frequency_pool(scores, 4).patterns


def test_coverage_retains_at_least_what_frequency_and_the_official_pool_retain():
    scores = [torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(s)) ** 4 for s in range(3)]
    for size in (4, 8, 12):
        ours = retained_importance(scores, coverage_pool(scores, size))
        assert ours >= retained_importance(scores, frequency_pool(scores, size))
        assert ours >= retained_importance(scores, official_pool(size))


@pytest.mark.parametrize("seed", range(5))
def test_coverage_keeps_the_bound_of_a_greedy_choice(seed):
    """At least 1 - 1/e of the best pair of all 7,875, and no exchange of one pattern improves it."""
    kernels = torch.rand(64, 9, generator=torch.Generator().manual_seed(seed)) ** 3
    scores = [kernels.view(8, 8, 3, 3)]
    table = kernels @ all_patterns().masks().flatten(1).float().T
    pairs = torch.maximum(table[:, :, None], table[:, None, :]).sum(0) / kernels.sum()
    pool = coverage_pool(scores, 2)
    ours = retained_importance(scores, pool)
    assert ours >= (1 - 1 / math.e) * float(pairs.max())
    for pattern in pool:
        assert ours >= float(pairs[all_patterns().index(pattern)].max()) - 1e-6


def test_coverage_counts_each_layer_the_same():
    """A layer with huge scores does not take the whole pool."""
    loud = PLANTED[0].mask().expand(4, 4, 3, 3) * 1e6
    quiet = PLANTED[1].mask().expand(4, 4, 3, 3) * 1.0
    assert set(coverage_pool([loud, quiet], 2)) == set(PLANTED[:2])


def test_retained_importance_of_a_full_cover_is_one():
    assert retained_importance(planted_scores(noise=0.0), PLANTED) == pytest.approx(1.0)


@pytest.mark.parametrize("choose", [frequency_pool, coverage_pool])
def test_bad_sizes_are_named(choose):
    with pytest.raises(InvalidArgument, match="size=127"):
        choose(planted_scores(), 127)
    with pytest.raises(InvalidArgument, match="at least one layer"):
        choose([], 4)
    with pytest.raises(InvalidArgument, match=r"one kernel size, got \[4, 9\]"):
        choose([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)], 4)
