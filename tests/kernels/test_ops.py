"""The operators: what PyTorch expects of them, and what users may get wrong."""

import pytest
import torch
from torch.library import opcheck

import clicktrain
from clicktrain.assignment import assign
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import available, plan
from clicktrain.kernels.backends import BACKENDS, select
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


@pytest.mark.skipif("cpu" not in USABLE, reason=str(available()["cpu"]))
@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.ones(9, 4, 8, 8, dtype=torch.float64), "float64"),
        (torch.ones(9, 4, 8, 8, dtype=torch.int64), "int64"),
        (torch.ones(9, 4, 8, 8, dtype=torch.bfloat16), "bfloat16"),
        (torch.ones(9, 5, 8, 8), r"\(9, 5, 8, 8\): expected \(N, 4, H, W\)"),
        (torch.ones(4, 8, 8), r"\(4, 8, 8\)"),
    ],
    ids=["float64", "int64", "bfloat16", "channels", "dimensions"],
)
@pytest.mark.parametrize("converted", [False, True])
def test_bad_input_of_a_layer_on_the_cpu_backend_is_named(x, text, converted):
    made = layer("cpu")
    model = torch.nn.Sequential(made)
    if converted:  # activations stay blocked where they can
        clicktrain.blocked.install(model)
    with pytest.raises(InvalidArgument, match=text):
        model(x)


@pytest.mark.skipif("cpu" not in USABLE, reason=str(available()["cpu"]))
def test_tensors_that_the_cpu_backend_cannot_take_are_named():
    """The operands agree with each other; a tensor on the meta device stands in for one on a GPU."""
    made = layer("cpu")
    x, values, *rest = arguments(made, "cpu")
    with pytest.raises(InvalidArgument, match=r"x is torch.float64, the cpu backend computes in torch.float32"):
        torch.ops.clicktrain.pattern_conv2d(x.detach().double(), values.detach().double(), *rest)
    planned = plan(made.get_assignment(), input_shape=(2, 4, 8, 8), padding=1)
    with pytest.raises(InvalidArgument, match="x is on meta, the cpu backend computes on cpu"):
        select("cpu", x.to("meta"))
    with pytest.raises(InvalidArgument, match="dy is on meta"):
        BACKENDS["cpu"].kernels().grad_input(torch.empty(planned.output_shape, device="meta"), values, planned)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_spread_through_kept_taps_only(backend, bad):
    made = layer(backend)
    x, values, assignment, pool, *rest = arguments(made, backend)
    x, values = x.detach(), values.detach()
    dy = torch.ones(2, 6, 8, 8)
    dy[1, 2, 3, 3] = bad
    dx = torch.ops.clicktrain.pattern_conv2d_grad_input(dy, values, assignment, pool, list(x.shape), *rest)
    kept = made.get_assignment().mask()[2]  # of the filter: (channels, 3, 3)
    spoilt = torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    spoilt[1, :, 2:5, 2:5] = kept
    assert torch.equal(~torch.isfinite(dx), spoilt)

    x[1, 2, 3, 3] = bad
    shape = list(values.shape)
    dvalues = torch.ops.clicktrain.pattern_conv2d_grad_values(x, torch.ones_like(dy), assignment, pool, shape, *rest)
    channels = (assignment != clicktrain.PRUNED).nonzero()[:, 1]
    assert torch.equal(~torch.isfinite(dvalues), (channels == 2)[:, None].expand(shape))


def test_a_plan_of_another_layer_is_refused():
    made, x = layer(), torch.randn(2, 4, 8, 8)
    other = plan(made.get_assignment(), input_shape=(2, 4, 9, 9), padding=1)
    with pytest.raises(InvalidArgument, match=r"\(2, 4, 8, 8\).*\(2, 4, 9, 9\)"):
        clicktrain.pattern_conv2d(x, made.values, other)
    more = layer(filters=7).get_assignment()
    assert more.kept_kernels == made.values.shape[0]  # only the shape of its output differs: it is not this layer's
    assert clicktrain.pattern_conv2d(x, made.values, plan(more, input_shape=(2, 4, 8, 8), padding=1)).shape[1] == 7
    fewer = torch.full((6, 4), clicktrain.PRUNED, dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match=r"values has shape \(13, 4\): the assignment keeps \(0, 4\)"):
        clicktrain.pattern_conv2d(x, made.values, plan(fewer, official_pool(4), (2, 4, 8, 8), 1, 1))


def test_an_index_outside_the_pool_is_named_wherever_an_assignment_is_made():
    index = torch.full((6, 4), 4, dtype=torch.uint8)
    conv = torch.nn.Conv2d(4, 6, 3, padding=1)
    for use in (
        lambda: plan(index, official_pool(4), (2, 4, 8, 8)),
        lambda: clicktrain.Assignment(index, official_pool(4)),
        lambda: PatternConv2d.from_conv2d(conv, index, official_pool(4)),
    ):
        with pytest.raises(InvalidArgument, match=r"\b4\b.*pool"):
            use()


def test_available_says_true_or_why_not():
    assert set(available()) == set(BACKENDS)
    assert available()["reference"] is True
    assert all(reason is True or reason for reason in available().values())


def test_pool_masks_make_the_pool_again():
    assert PatternPool.from_masks(layer().pool_masks) == official_pool(4)
