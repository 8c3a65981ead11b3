"""Blocked tensors: to any code they are tensors with NCHW values."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clicktrain import blocked
from clicktrain.blocked import BlockedTensor
from clicktrain.kernels.cpu import library
from tests.kernels.cases import relative_error

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")

X = torch.randn(8, 3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def b() -> Tensor:
    packed = blocked.pack(X.clone())
    assert isinstance(packed, BlockedTensor)
    return packed


def test_values_and_shape(b: Tensor) -> None:
    assert b.shape == X.shape
    assert (len(b), b.ndim, b.dtype, b.device.type, b.is_contiguous()) == (8, 4, torch.float32, "cpu", True)
    assert np.array_equal(b.numpy(), X.numpy())
    assert b.tolist() == X.tolist()
    assert torch.equal(blocked.plain(b), X)
    assert repr(X) in repr(b)


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid, F.gelu, lambda x: x[2:5, :, 1], lambda x: x.permute(2, 3, 0, 1), lambda x: x * x,
        lambda x: torch.cat([x, x], 1), lambda x: x.sum((0, 2, 3)), lambda x: x.mean((2, 3)), torch.sum,
        lambda x: x + torch.ones(3, 1, 1), lambda x: x + 2, lambda x: x + x[:1], lambda x: 1 - x,
        lambda x: F.max_pool2d(x, 2, ceil_mode=True), lambda x: F.max_pool2d(x, 2, dilation=2),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), lambda x: F.hardtanh(x, 0, 1),
        lambda x: F.adaptive_max_pool2d(x, 3), lambda x: F.threshold(x, 0.5, 0.0), lambda x: F.instance_norm(x),
        lambda x: F.conv2d(x, torch.ones(6, 1, 3, 3), groups=3),
        lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 2, 2)),
        lambda x: F.conv2d(x, torch.ones(4, 3, 5, 5), torch.ones(4), padding=2), lambda x: x.detach().clone() + x,
        lambda x: torch.linalg.vector_norm(x), lambda x: x.to(torch.float64), lambda x: x.view(x.shape),
    ],
)  # fmt: skip
def test_any_function_and_its_gradient(function: Callable[[Tensor], Tensor]) -> None:
    results = []
    for wrap in (blocked.pack, lambda t: t):
        leaf = X.clone().requires_grad_()
        y = blocked.plain(function(wrap(leaf)))
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weights).sum().backward()
        results.append((y.detach(), leaf.grad))
    assert relative_error(results[0][0], results[1][0]) < 1e-6
    assert relative_error(results[0][1], results[1][1]) < 1e-5


def test_writing_through_a_view_or_an_index_shows(b: Tensor) -> None:
    b.view(8, -1).mul_(2)
    b[:, 0] = 0
    expected = X * 2
    expected[:, 0] = 0
    assert torch.equal(blocked.plain(b), expected)
    assert torch.equal(blocked.plain(F.relu_(b)), expected.relu())
    assert torch.equal(blocked.plain(b), expected.relu())
    assert torch.equal(blocked.plain(b.add_(b)), expected.relu() * 2)


def test_in_place_operators_leave_what_was_computed_before(b: Tensor) -> None:
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        deferred = norm(b)
        F.relu_(b)
        assert torch.allclose(blocked.plain(deferred), norm(X))
        assert torch.equal(blocked.plain(b), X.relu())


def test_autograd_notices_a_saved_value_that_was_overwritten() -> None:
    packed = blocked.pack(X.clone().requires_grad_())
    y = torch.relu(packed)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_deferred_normalisation_may_be_used_twice() -> None:
    gradients = []
    norm = nn.BatchNorm2d(3)
    for wrap in (blocked.pack, lambda t: t):
        leaf = X.clone().requires_grad_()
        y = norm(wrap(leaf))
        (torch.relu(y) + 3 * y).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "pooled",
    [
        lambda y: F.max_pool2d(F.relu(y), 2),
        lambda y: F.max_pool2d(F.relu(y, inplace=True), 2),
        lambda y: F.max_pool2d(F.relu(y), 3, 2, 1),
        lambda y: F.max_pool2d(y, 2),
        lambda y: F.max_pool2d(F.relu(y + y.square()), 2),
        lambda y: F.max_pool2d((r := F.relu(y)), 2) + r[:, :, :2, :3],
        lambda y: F.relu(F.max_pool2d(F.relu(F.relu(y) - 0.1), 2)),
    ],
)
def test_a_deferred_normalisation_may_be_pooled(training: bool, pooled: Callable[[Tensor], Tensor]) -> None:
    made = []
    for wrap in (blocked.pack, lambda t: t):
        norm = nn.BatchNorm2d(3).train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
            norm.bias.copy_(torch.tensor([0.1, -0.3, 2.0]))
        leaf = X.clone().requires_grad_()
        y = pooled(norm(wrap(leaf)))
        (y * torch.arange(float(y.numel())).view(y.shape).sin()).sum().backward()
        made.append((y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad))
    for result, truth in zip(*made, strict=True):
        assert result is not None
        assert truth is not None
        assert relative_error(blocked.plain(result), truth) < 1e-5


def test_second_derivatives() -> None:
    made = []
    for wrap in (blocked.pack, lambda t: t):
        leaf = X.clone().requires_grad_()
        y = F.avg_pool2d(torch.relu(wrap(leaf)) ** 3, 2)
        (first,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        first.square().sum().backward()
        made.append(leaf.grad)
    assert relative_error(*made) < 1e-5


def test_indices_of_a_pooling(b: Tensor) -> None:
    y, indices = F.max_pool2d(b, 3, 2, 1, return_indices=True)
    expected, expected_indices = F.max_pool2d(X, 3, 2, 1, return_indices=True)
    assert indices.dtype == torch.int64
    assert np.array_equal(indices.numpy(), expected_indices.numpy())
    assert indices.sum() == expected_indices.sum()
    unpooled = F.max_unpool2d(*F.max_pool2d(b, 2, return_indices=True), 2, output_size=(5, 7))
    assert torch.equal(
        blocked.plain(unpooled),
        F.max_unpool2d(*F.max_pool2d(X, 2, return_indices=True), 2, output_size=(5, 7)),
    )
    assert torch.equal(blocked.plain(y), expected)


def test_copies_and_files_hold_plain_tensors(b: Tensor) -> None:
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    assert torch.equal(torch.load(file), X)
    assert torch.equal(copy.deepcopy(b), X)
