"""Patterns and pools."""

import itertools

import numpy as np
import pytest
import torch

from clicktrain.errors import InvalidArgument
from clicktrain.patterns import (
    PRUNED,
    Pattern,
    PatternPool,
    all_patterns,
    full_pool,
    kept_positions,
    official_pool,
)


def test_mask_shows_the_kept_positions_row_major():
    assert Pattern(3, (0, 1, 3, 5)).mask().int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_rotation_turns_by_180_degrees():
    for pattern in all_patterns():
        assert torch.equal(pattern.rotated().mask(), pattern.mask().flip(0, 1))


def test_the_pool_of_four_squares_is_closed_under_rotation():
    assert set(official_pool(4).rotated()) == set(official_pool(4))


def test_all_patterns_are_the_126_of_4_of_9():
    pool = all_patterns()
    assert len(pool) == 126
    assert [p.kept for p in pool] == list(itertools.combinations(range(9), 4))


def test_official_pools_are_the_released_matrices():
    squares = [[4, 5, 7, 8], [3, 4, 6, 7], [1, 2, 4, 5], [0, 1, 3, 4]]
    assert [list(p.kept) for p in official_pool(4)] == squares
    assert official_pool(8).patterns[:4] == official_pool(4).patterns
    assert official_pool(12).patterns[:8] == official_pool(8).patterns
    without_centre = [n for n, p in enumerate(official_pool(12, "comment"), 1) if 4 not in p.kept]
    assert without_centre == [5, 10, 11]
    assert official_pool(12)[11].kept == (3, 5, 7, 8)
    assert official_pool(12, "comment")[11].kept == (3, 4, 7, 8)


def test_released_comments_number_their_zero_sets():
    """The comments number each pattern by the lexicographic rank of its zeros; the twelfth matrix is the odd one."""
    ranks = {zeros: n for n, zeros in enumerate(itertools.combinations(range(9), 5), 1)}
    numbers = [ranks[tuple(sorted(set(range(9)) - set(p.kept)))] for p in official_pool(12, "comment")]
    assert numbers == [3, 12, 65, 120, 1, 14, 44, 53, 125, 6, 126, 10]


@pytest.mark.parametrize("array", [np.array, torch.tensor, list])
def test_from_masks_takes_any_arrays(array):
    masks = [[[1, 1, 0], [1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 1], [0, 1, 1]]]
    pool = PatternPool.from_masks([array(mask) for mask in masks])
    assert pool.masks().int().tolist() == masks
    assert (len(pool), pool.entries, pool.kernel_size) == (2, 4, 3)
    assert [p.mask().int().tolist() for p in pool] == masks


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ([], "pool of 0 patterns"),
        ([[[1, 0], [0, 1]], [[1, 1], [0, 1]]], r"entries \[2, 3\]"),
        ([[[1, 0], [0, 1]], [[1]]], "kernel_size"),
        ([[[1, 0, 1]]], r"shape \(1, 3\)"),
        ([[[2, 0], [0, 1]]], "other than 0 and 1"),
        ([[[0, 0], [0, 0]]], "kept"),
        ([[[1, 0], [0, 1]]] * 2, "twice"),
    ],
)
def test_bad_masks_are_named(masks, text):
    with pytest.raises(ValueError, match=text):
        PatternPool.from_masks(masks)


@pytest.mark.parametrize(
    "call", [lambda: official_pool(5), lambda: official_pool(12, "typo"), lambda: all_patterns(10)]
)
def test_unknown_pools_are_errors(call):
    with pytest.raises(InvalidArgument):
        call()


def test_kept_positions_are_canonical():
    """Kernels row-major by (filter, channel), entries row-major in the pattern."""
    pool = official_pool(4)
    index = torch.tensor([[PRUNED, 3], [0, PRUNED]], dtype=torch.uint8)
    assert kept_positions(index, pool).tolist() == [[9, 10, 12, 13], [22, 23, 25, 26]]
    assert kept_positions(torch.full((2, 2), PRUNED, dtype=torch.uint8), full_pool(1)).shape == (0, 1)
