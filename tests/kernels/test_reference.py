"""The reference backend against the definition of a convolution."""

import pytest
import torch
from torch.nn import functional as F

from clicktrain.assignment import Assignment, assign
from clicktrain.kernels import plan, reference
from clicktrain.patterns import PRUNED, full_pool, official_pool

CASES = [
    # batch, channels, filters, size, pool, stride, padding
    (2, 3, 4, (6, 7), official_pool(4), (1, 1), (1, 1)),
    (1, 5, 2, (8, 8), official_pool(12), (2, 2), (1, 1)),
    (3, 2, 3, (5, 9), official_pool(8), (2, 1), (0, 2)),
    (2, 4, 4, (4, 4), full_pool(1), (2, 2), (0, 0)),
    (1, 2, 2, (7, 7), full_pool(5), (1, 1), (2, 2)),
]


def problem(case, dtype=torch.float64):
    n, c, o, size, pool, stride, padding = case
    random = torch.Generator().manual_seed(3)
    k = pool.kernel_size
    weight = torch.randn(o, c, k, k, generator=random, dtype=dtype)
    assignment = assign(weight**2, pool, max(o, o * c // 2))
    made = plan(assignment, None, (n, c, *size), stride, padding)
    x = torch.randn(n, c, *size, generator=random, dtype=dtype)
    dy = torch.randn(made.output_shape, generator=random, dtype=dtype)
    return x, assignment.gather(weight), dy, made, assignment


def loop_forward(x, values, made):
    """Sum over kept weights, one by one: the definition."""
    _, _, h, w = x.shape
    (sy, sx), (py, px) = made.stride, made.padding
    y = torch.zeros(made.output_shape, dtype=x.dtype)
    k = made.pool.kernel_size
    for row, position in enumerate(made.positions.flatten().tolist()):
        value = values.flatten()[row]
        kernel, inside = divmod(position, k * k)
        o, i = divmod(kernel, made.index.shape[1])
        r, s = divmod(inside, k)
        for a in range(y.shape[2]):
            for b in range(y.shape[3]):
                u, v = a * sy + r - py, b * sx + s - px
                if 0 <= u < h and 0 <= v < w:
                    y[:, o, a, b] += value * x[:, i, u, v]
    return y


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_definition(case):
    x, values, _, made, _ = problem(case)
    torch.testing.assert_close(reference.forward(x, values, made), loop_forward(x, values, made))


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograd_of_the_masked_convolution(case):
    x, values, dy, made, assignment = problem(case)
    x.requires_grad_()
    dense = assignment.scatter(values).requires_grad_()
    F.conv2d(x, dense, None, made.stride, made.padding).backward(dy)
    torch.testing.assert_close(reference.grad_input(dy, values, made), x.grad)
    torch.testing.assert_close(reference.grad_values(x.detach(), dy, made), assignment.gather(dense.grad))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", CASES[:3])
def test_what_is_not_finite_spreads_through_kept_taps_only(case, bad):
    x, values, dy, made, _ = problem(case)
    x[0, :, 2:4, 2:4] = bad
    y, expected = reference.forward(x, values, made), loop_forward(x, values, made)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert bool((~torch.isfinite(y)).any())
    assert bool(torch.isfinite(y).any())
    dy[0, 0, 1, 1] = bad
    dx = reference.grad_input(dy, values, made)
    clean = reference.grad_input(dy.nan_to_num(0, 0, 0), values, made)
    touched = ~torch.isfinite(dx)
    torch.testing.assert_close(dx[~touched], clean[~touched])
    assert 0 < int(touched.sum()) <= made.pool.entries * made.index.shape[1]


@pytest.mark.parametrize("entry", [0, PRUNED])
def test_layers_with_all_or_nothing(entry):
    assignment = Assignment(torch.full((3, 2), entry, dtype=torch.uint8), official_pool(4))
    made = plan(assignment, None, (2, 2, 5, 5), 1, 1)
    values = torch.randn(assignment.kept_kernels, 4, dtype=torch.float64)
    x, dy = torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(reference.forward(x, values, made), loop_forward(x, values, made))
    assert reference.grad_input(dy, values, made).shape == x.shape
    assert reference.grad_values(x, dy, made).shape == values.shape
