"""The operators: what PyTorch expects of them, and what users may get wrong."""

import pytest
import torch
from torch.library import opcheck

import clicktrain
from clicktrain.assignment import assign
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import available, plan
from clicktrain.kernels.backends import BACKENDS
from clicktrain.layers import PatternConv2d
from clicktrain.patterns import PatternPool, official_pool

USABLE = [name for name, reason in available().items() if reason is True]


def layer(backend="auto", stride=1, filters=6, channels=4):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(filters, channels, 3, 3, generator=random)
    conv = torch.nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
    conv.weight.data.copy_(weight)
    return PatternConv2d.from_conv2d(conv, assign(weight**2, official_pool(4), 13), backend=backend)


def arguments(made, backend, size=8):
    x = torch.randn(2, made.in_channels, size, size, requires_grad=True)
    return (x, made.values, made.assignment, made.pool_masks, list(made.stride), list(made.padding), backend)


@pytest.mark.parametrize("backend", ["auto", *USABLE])
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(backend, stride):
    opcheck(torch.ops.clicktrain.pattern_conv2d, arguments(layer(stride=stride), backend))


@pytest.mark.parametrize("backend", USABLE)
def test_gradients_of_all_backends_equal_the_dense_layer(backend):
    made = layer(backend)
    dense = made.to_conv2d()
    x = torch.randn(9, 4, 8, 8, requires_grad=True)
    torch.testing.assert_close(made(x), dense(x))
    gradients = torch.autograd.grad(made(x).square().sum(), [x, made.values])
    expected = torch.autograd.grad(dense(x).square().sum(), [x, dense.weight])
    torch.testing.assert_close(gradients[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], made.get_assignment().gather(expected[1]), rtol=1e-4, atol=1e-4)


def test_compile_in_one_graph():
    made = layer()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    compiled(x).sum().backward()
    assert made.values.grad is not None


def test_export_runs_with_new_data():
    made = layer().eval()
    program = torch.export.export(made, (torch.randn(2, 4, 8, 8),))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(program.module()(x), made(x))


def test_cpu_autocast_computes_in_float32():
    made = layer()
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, made(x.bfloat16().float()))


def test_the_function_with_a_plan_is_the_layer():
    made = layer()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    planned = clicktrain.kernels.plan(made.get_assignment(), input_shape=(2, 4, 8, 8), padding=1)
    y = clicktrain.pattern_conv2d(x, made.values, planned)
    torch.testing.assert_close(y, made(x))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_a_changed_assignment_is_not_taken_for_the_old_one():
    made = layer()
    x = torch.randn(2, 4, 8, 8)
    before = made(x)
    kept = made.assignment != 255
    made.assignment[kept] = (made.assignment[kept] + 1) % 4
    assert not torch.allclose(made(x), before)
    torch.testing.assert_close(made(x), made.to_conv2d()(x))


def test_equal_plans_are_one_object():
    made = layer().get_assignment()
    assert plan(made, input_shape=(2, 4, 8, 8)) is plan(made.index.clone(), made.pool, (2, 4, 8, 8), (1, 1), (0, 0))
    assert plan(made, input_shape=(2, 4, 8, 8)) is not plan(made, input_shape=(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.randn(2, 5, 8, 8)}, r"\(N, 4, H, W\)"),
        ({0: torch.ones(2, 4, 8, 8, dtype=torch.int64)}, "int64"),
        ({0: torch.randn(2, 4, 8, 8).double()}, "float64.*float32"),
        ({1: torch.randn(12, 4)}, r"\(12, 4\).*\(13, 4\)"),
        ({2: torch.full((6, 4), 7, dtype=torch.uint8)}, "index 7 is outside the pool of 4"),
        ({0: torch.randn(2, 4, 1, 1), 5: [0, 0]}, "smaller than the 3x3 kernel"),
        ({6: "typo"}, "backend='typo'"),
    ],
)
def test_bad_input_is_named(change, text):
    inputs = list(arguments(layer(), "auto"))
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(InvalidArgument, match=text):
        torch.ops.clicktrain.pattern_conv2d(*inputs)


def test_a_plan_of_another_layer_is_refused():
    made = layer()
    other = plan(made.get_assignment(), input_shape=(2, 4, 9, 9), padding=1)
    with pytest.raises(InvalidArgument, match=r"\(2, 4, 8, 8\).*\(2, 4, 9, 9\)"):
        clicktrain.pattern_conv2d(torch.randn(2, 4, 8, 8), made.values, other)


def test_available_says_true_or_why_not():
    assert set(available()) == set(BACKENDS)
    assert available()["reference"] is True
    assert all(reason is True or reason for reason in available().values())


def test_pool_masks_make_the_pool_again():
    assert PatternPool.from_masks(layer().pool_masks) == official_pool(4)
