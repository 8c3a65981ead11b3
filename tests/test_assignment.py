"""Assignments: exact counts, ties by index, round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.assignment import Assignment, assign, pattern_scores
from clicktrain.errors import InvalidArgument
from clicktrain.patterns import PRUNED, all_patterns, full_pool, official_pool


@st.composite
def problems(draw):
    filters, channels = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    levels = draw(st.integers(1, 4))  # few levels: many ties
    seed = draw(st.integers(0, 2**16))
    scores = torch.randint(0, levels, (filters, channels, 3, 3), generator=torch.Generator().manual_seed(seed))
    kept = draw(st.integers(filters, filters * channels))
    return scores.float(), kept


@given(problems(), st.sampled_from([4, 8, 12]), st.sampled_from(["kernel", "pattern"]))
def test_counts_are_exact_and_every_filter_lives(problem, size, rank_by):
    scores, kept = problem
    assignment = assign(scores, official_pool(size), kept, rank_by)
    assert assignment.kept_kernels == kept
    assert assignment.kept_weights == int(assignment.mask().sum()) == 4 * kept
    assert bool((assignment.index != PRUNED).any(1).all())


@given(problems())
def test_what_is_kept_is_best(problem):
    """Beyond the best kernel of each filter, no removed kernel scores higher than a kept one."""
    scores, kept = problem
    kernel = scores.sum((2, 3))
    keep = assign(scores, official_pool(4), kept).index != PRUNED
    best_of_filter = torch.zeros_like(keep).scatter(1, kernel.argmax(1, keepdim=True), True)
    others = keep & ~best_of_filter
    if others.any() and (~keep).any():
        assert kernel[others].min() >= kernel[~keep].max()
    assert bool((kernel.amax(1) == (kernel * keep).amax(1)).all())


def test_each_kernel_takes_the_pattern_that_retains_most():
    scores = torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    pool = all_patterns()
    index = assign(scores, pool, 20).index
    for o in range(5):
        for i in range(4):
            retained = [float(scores[o, i].double()[pattern.mask()].sum()) for pattern in pool]
            assert int(index[o, i]) == retained.index(max(retained))


def test_ties_go_to_the_lower_index():
    assignment = assign(torch.ones(2, 3, 3, 3), official_pool(4), 4)
    assert assignment.index.tolist() == [[0, 0, 0], [0, PRUNED, PRUNED]]


def test_ranking_by_pattern_differs_from_ranking_by_kernel():
    scores = torch.zeros(1, 2, 3, 3)
    scores[0, 0, 0, 2] = scores[0, 0, 2, 0] = 3  # no square covers both corners
    scores[0, 1, 0, 0] = 4
    assert assign(scores, official_pool(4), 1, "kernel").index.tolist()[0][1] == PRUNED
    assert assign(scores, official_pool(4), 1, "pattern").index.tolist()[0][0] == PRUNED


def test_gather_and_scatter_undo_each_other():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    assignment = assign(weight.square(), official_pool(8), 17)
    values = assignment.gather(weight)
    assert values.shape == (17, 4)
    assert torch.equal(assignment.scatter(values), weight * assignment.mask())
    assert torch.equal(assignment.gather(assignment.scatter(values)), values)


def test_digest_is_by_content():
    first = Assignment(torch.tensor([[0, PRUNED]], dtype=torch.uint8), official_pool(4))
    same = Assignment(torch.tensor([[0, PRUNED]], dtype=torch.uint8), official_pool(4))
    assert first.digest() == same.digest()
    assert first.digest() != Assignment(same.index, official_pool(8)).digest()
    assert first.digest() != Assignment(same.index.T.contiguous(), official_pool(4)).digest()


def test_pointwise_kernels_are_kept_or_removed_whole():
    assignment = assign(torch.tensor([[3.0, 1.0], [1.0, 2.0]])[:, :, None, None], full_pool(1), 3)
    assert assignment.mask().flatten().tolist() == [True, True, False, True]
    assert assignment.density == 0.75


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (torch.zeros(2, 2), "uint8"),
        (torch.zeros(2, dtype=torch.uint8), "uint8"),
        (torch.full((1, 1), 4, dtype=torch.uint8), "pattern 4, but the pool has 4"),
    ],
)
def test_a_bad_index_is_named(index, text):
    with pytest.raises(InvalidArgument, match=text):
        Assignment(index, official_pool(4))


@pytest.mark.parametrize(
    ("shape", "kept", "text"),
    [((3, 2, 3, 3), 2, "3 .* to 6"), ((3, 2, 3, 3), 7, "3 .* to 6"), ((3, 2, 5, 5), 6, "C_in, 3, 3")],
)
def test_bad_requests_are_named(shape, kept, text):
    with pytest.raises(InvalidArgument, match=text):
        assign(torch.ones(shape), official_pool(4), kept)


def test_nan_scores_are_refused():
    with pytest.raises(InvalidArgument, match="finite"):
        assign(torch.full((1, 1, 3, 3), torch.nan), official_pool(4), 1)


def test_pattern_scores_of_a_hand_made_kernel():
    flat = torch.tensor([[0.0, 0, 0, 0, 5, 1, 0, 2, 3]])
    retained, best = pattern_scores(flat, official_pool(4))
    assert (retained.tolist(), best.tolist()) == ([11.0], [0])


@pytest.mark.parametrize("share", [2, 4, 8])
def test_blocks_of_filters_share_patterns_and_connectivity(share):
    scores, pool = torch.rand(8, 6, 3, 3), official_pool(4)
    shared = assign(scores, pool, 27, share_filters=share)
    blocks = shared.index.view(8 // share, share, 6)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    assert shared.kept_kernels == 27 // share * share
    summed = assign(scores.view(8 // share, share, 6, 3, 3).sum(1), pool, 27 // share)
    assert torch.equal(blocks[:, 0], summed.index)


def test_a_block_must_divide_the_filters():
    with pytest.raises(InvalidArgument, match="share_filters=3: expected a divisor of the 8 filters"):
        assign(torch.rand(8, 6, 3, 3), official_pool(4), 24, share_filters=3)
