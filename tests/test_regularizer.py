"""Group lasso."""

import torch

from clicktrain.assignment import assign
from clicktrain.patterns import full_pool, official_pool
from clicktrain.regularizer import PrunedGroups, group_lasso


def problem(seed=0, kernel=3, dtype=torch.float64):
    weight = torch.randn(5, 4, kernel, kernel, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    pool = official_pool(4) if kernel == 3 else full_pool(kernel)
    groups = PrunedGroups.of(assign(weight**2, pool, 20), assign(weight**2, pool, 9))
    return weight.requires_grad_(), groups


def by_definition(weight, groups):
    """R_p + R_k as sums over kernels, by autograd."""
    outside = (weight * groups.off_pattern).square().sum((2, 3)) + 1e-8
    whole = (weight * groups.removed).square().sum((2, 3)) + 1e-8
    return outside.sqrt().sum() + whole.sqrt().sum()


def test_value_and_gradient_equal_the_definition():
    for kernel in (1, 3):
        weight, groups = problem(kernel=kernel)
        (mine,) = torch.autograd.grad(3 * group_lasso([weight], [groups]), weight)
        (expected,) = torch.autograd.grad(3 * by_definition(weight, groups), weight)
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(group_lasso([weight], [groups]), by_definition(weight, groups))


def test_gradcheck_over_two_layers():
    first, second = problem(1), problem(2)
    assert torch.autograd.gradcheck(lambda a, b: group_lasso([a, b], [first[1], second[1]]), (first[0], second[0]))


def test_kernels_with_nothing_to_remove_cost_a_constant():
    weight, _ = problem(kernel=1)
    everything = assign(weight.detach() ** 2, full_pool(1), 20)
    penalty = group_lasso([weight], [PrunedGroups.of(everything, everything)])
    torch.testing.assert_close(penalty, torch.tensor(2 * 20 * 1e-4, dtype=torch.float64))


def test_zero_groups_give_no_nan():
    weight, groups = problem()
    zero = torch.zeros_like(weight, requires_grad=True)
    (gradient,) = torch.autograd.grad(0.0 * group_lasso([zero], [groups]), zero)
    assert torch.equal(gradient, torch.zeros_like(zero))
    (gradient,) = torch.autograd.grad(group_lasso([zero], [groups]), zero)
    assert bool(torch.isfinite(gradient).all())


def test_kept_weights_feel_nothing():
    weight, groups = problem()
    (gradient,) = torch.autograd.grad(group_lasso([weight], [groups]), weight)
    kept = ~(groups.off_pattern | groups.removed)
    assert int(kept.sum()) == 9 * 4
    assert bool((gradient[kept] == 0).all())
    assert bool((gradient[~kept] != 0).all())


def test_channels_last_weights_are_accepted():
    weight, groups = problem(dtype=torch.float32)
    other = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(group_lasso([other], [groups]), other)
    (expected,) = torch.autograd.grad(group_lasso([weight], [groups]), weight)
    torch.testing.assert_close(gradient, expected)


def test_left_is_the_squared_norm_of_what_goes():
    weight, groups = problem()
    gone = weight.detach()[groups.off_pattern | groups.removed.expand_as(groups.off_pattern)]
    torch.testing.assert_close(groups.left(weight), gone.square().sum())
