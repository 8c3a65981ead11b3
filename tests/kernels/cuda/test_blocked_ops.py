"""The CUDA kernels of normalisations and poolings, run on the CPU, against float64 torch; and networks of them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clicktrain import blocked
from clicktrain.assignment import Assignment
from clicktrain.blocked import BlockedTensor
from clicktrain.blocked import kernels as blocked_kernels
from clicktrain.conversion import convert
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cuda import blocked_ops
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.layers import PatternConv2d
from clicktrain.models.blocks import BasicBlock
from clicktrain.patterns import PRUNED, official_pool
from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.host import Fault, HostLauncher, on_host

EPS, MOMENTUM = 1e-5, 0.3
SIZES = [(1, 1), (2, 2), (4, 6), (6, 4), (3, 5), (9, 12), (20, 8), (30, 34)]
"""Planes of 1, 2 and 4 pixels at once, and some that need several threads' turns."""


@pytest.fixture
def on_gpu(units):
    """Run CUDA kernels on the CPU; a channel has several blocks."""
    with on_host(HostLauncher(units, Limits(16 << 10, multiprocessors=2))) as launcher:
        yield launcher


several = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def activations(draw: st.DrawFn, even: bool = False) -> Tensor:
    n, c = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    h, w = draw(st.sampled_from([size for size in SIZES if not even or size[0] % 2 == size[1] % 2 == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mean, deviation = draw(st.sampled_from([(0.0, 1.0), (3.0, 0.1), (-100.0, 2.0)]))
    x = torch.randn(n, c, h, w, generator=generator) * deviation + mean
    return x.repeat(2, 1, 1, 1) if n * h * w == 1 else x


def close(result: Tensor, truth: Tensor, tolerance: float = 1e-5) -> bool:
    return float((result.double() - truth.double()).norm()) <= tolerance * float(truth.double().norm()) + 1e-12


@several
@given(x=activations(), learned=st.booleans(), tracked=st.booleans())
def test_normalisation(on_gpu, x, learned, tracked):
    c = x.shape[1]
    weight, bias = (torch.randn(c), torch.randn(c)) if learned else (None, None)
    running = (torch.randn(c), torch.rand(c) + 0.5) if tracked else (None, None)
    expected = tuple(None if r is None else r.double() for r in running)
    truth = F.batch_norm(
        x.double(), *expected, *(None if w is None else w.double() for w in (weight, bias)), True, MOMENTUM, EPS
    )
    packed = blocked_ops.pack(x)
    mean, invstd, scale, shift = blocked_ops.normalisation(packed, len(x), weight, bias, EPS, MOMENTUM, *running)
    variance = x.double().var((0, 2, 3), unbiased=False)
    size = float(x.double().norm() / x.numel() ** 0.5)  # the statistics can be no more exact than the values are
    assert float((mean - x.double().mean((0, 2, 3))).abs().max()) <= 1e-6 * size
    assert torch.allclose(invstd.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)
    if tracked:
        assert torch.allclose(running[0].double(), expected[0], rtol=1e-5, atol=1e-6 * (1 + size))
        assert torch.allclose(running[1].double(), expected[1], rtol=1e-5, atol=1e-6 * (1 + size))
    y = blocked_ops.unpack(blocked_ops.affine(packed, len(x), scale, shift), len(x))
    assert float((y - truth).abs().max()) <= 1e-6 * (1 + size * float(scale.abs().max())) * 4


@several
@given(x=activations(), with_residual=st.booleans(), relu=st.booleans())
def test_affine(on_gpu, x, with_residual, relu):
    scale, shift = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    residual = torch.randn_like(x) if with_residual else None
    y = blocked_ops.affine(
        blocked_ops.pack(x), len(x), scale, shift, None if residual is None else blocked_ops.pack(residual), relu
    )
    truth = x.double() * scale[:, None, None] + shift[:, None, None]
    truth = truth if residual is None else truth + residual
    assert close(blocked_ops.unpack(y, len(x)), truth.relu() if relu else truth)


@several
@given(
    x=activations(), training=st.booleans(), learned=st.booleans(), relu=st.sampled_from(["none", "output", "affine"])
)
def test_batch_norm_backward(on_gpu, x, training, learned, relu):
    x = x / x.abs().mean()  # the gradient divides by the deviation: keep its condition out of the test
    c = x.shape[1]
    x64 = x.double().requires_grad_()
    weight, bias = (torch.rand(c) + 0.5, torch.randn(c)) if learned else (None, None)
    weight64 = (torch.ones(c) if weight is None else weight).double().requires_grad_()
    bias64 = (torch.zeros(c) if bias is None else bias).double().requires_grad_()
    running = torch.randn(c).double(), torch.rand(c).double() + 0.5
    y64 = F.batch_norm(x64, *(r.clone() for r in running), weight64, bias64, training, 0.1, EPS)
    mean = x.double().mean((0, 2, 3)) if training else running[0]
    invstd = ((x.double().var((0, 2, 3), unbiased=False) if training else running[1]) + EPS).rsqrt()
    scale = weight64.detach() * invstd
    shift = bias64.detach() - mean * scale
    dy = torch.randn_like(x)
    dy[(y64.detach().abs() < 1e-4)] = 0  # where float32 and float64 may disagree about the side of zero
    (y64.relu() if relu != "none" else y64).backward(dy.double())
    dx, dweight, dbias = blocked_ops.batch_norm_backward(
        blocked_ops.pack(dy), blocked_ops.pack(x), len(x), mean.float(), invstd.float(), weight, training,
        relu_output=blocked_ops.pack(y64.detach().relu().float()) if relu == "output" else None,
        relu_affine=(scale.float(), shift.float()) if relu == "affine" else None,
    )  # fmt: skip
    of_terms, of_sums = float(dy.double().norm() * scale.abs().max()), dy.double().norm() * x.numel() ** 0.5
    assert float((blocked_ops.unpack(dx, len(x)) - x64.grad).norm()) <= 2e-5 * of_terms + 1e-9
    assert float((dbias - bias64.grad).norm()) <= 1e-6 * of_sums + 1e-9
    assert float((dweight - weight64.grad).norm()) <= 1e-6 * of_sums * float(invstd.max()) + 1e-9


@several
@given(x=activations(even=True), relu=st.booleans(), special=st.booleans(), scaled=st.booleans())
def test_max_pool_and_its_backward(on_gpu, x, relu, special, scaled):
    halves = (2, 2), (2, 2), (0, 0)
    function = (torch.randn(x.shape[1]), torch.randn(x.shape[1])) if scaled else None
    if special:  # equal values, infinities and NaN
        x = x.round()
        x.flatten()[::3] = float("-inf")
        x.flatten()[::5] = float("nan")
    packed = blocked_ops.pack(x)
    pooled = packed if function is None else blocked_ops.affine(packed, len(x), *function)
    pooled = blocked_ops.unpack(pooled.clone(), len(x)).requires_grad_()
    truth = F.max_pool2d(pooled.relu() if relu else pooled, 2)
    y, places = blocked_ops.max_pool(packed, len(x), *halves, function, relu)
    assert torch.equal(blocked_ops.unpack(y, len(x)).nan_to_num(7e7), truth.detach().nan_to_num(7e7))
    dy = torch.randn_like(truth)
    F.max_pool2d(pooled, 2).backward(dy)
    _, places = blocked_ops.max_pool(packed, len(x), *halves, function)
    dx = blocked_ops.max_pool_backward(blocked_ops.pack(dy), places, tuple(x.shape[2:]), *halves)
    assert torch.equal(blocked_ops.unpack(dx, len(x)), pooled.grad)


@several
@given(x=activations(even=True), training=st.booleans(), special=st.booleans())
def test_batch_norm_backward_through_relu_and_pooling(on_gpu, x, training, special):
    x = x / x.abs().mean()
    c = x.shape[1]
    statistics = torch.randn(c), torch.rand(c) + 0.5
    scale, shift = torch.randn(c), torch.randn(c)
    if special:  # all of some windows is negative, and equal after the ReLU
        x[..., ::3] = -(shift[:, None, None] + 1) / scale[:, None, None]
    packed, halves = blocked_ops.pack(x), ((2, 2), (2, 2), (0, 0))
    pooled, places = blocked_ops.max_pool(packed, len(x), *halves, (scale, shift), relu=True)
    dy = torch.randn_like(pooled)
    between = blocked_ops.max_pool_backward(dy, places, tuple(x.shape[2:]), *halves)
    rest = (packed, len(x), *statistics, scale, training)
    truth = blocked_ops.batch_norm_backward(between, *rest, relu_affine=(scale, shift))
    result = blocked_ops.batch_norm_backward(dy, *rest, relu_affine=(scale, shift), places=places)
    invstd, of_input = float(statistics[1].max()), float(dy.norm() * scale.abs().max())
    of_sums = float(dy.norm()) * x.numel() ** 0.5  # their terms may cancel
    for one, other, tolerance in zip(
        result, truth, (2e-5 * of_input * invstd, 1e-6 * of_sums * invstd, 1e-6 * of_sums), strict=True
    ):
        assert float((one.double() - other.double()).norm()) <= tolerance + 1e-9


def test_infinite_inputs_do_not_reach_gradients_of_running_statistics(on_gpu):
    x, dy = torch.randn(3, 2, 4, 4, 1), torch.randn(3, 2, 4, 4, 1)
    x[0, 0, 0, 0], x[1, 1, 2, 2] = float("inf"), float("nan")
    mean, invstd = torch.randn(2), torch.rand(2) + 0.5
    dx, _, dbias = blocked_ops.batch_norm_backward(dy, x, 3, mean, invstd, None, training=False)
    assert close(dx, dy * invstd[:, None, None, None])
    assert close(dbias, dy.sum((0, 2, 3, 4)))


def test_the_input_is_left_out_where_nobody_asks_for_it(on_gpu):
    x, ones = torch.randn(4, 3, 6, 6, 1), torch.ones(3)
    dx, _, dbias = blocked_ops.batch_norm_backward(x, x, 4, ones, ones, None, True, needs_input=False)
    assert dx is None
    assert close(dbias, x.sum((0, 2, 3, 4)), 1e-4)


def test_what_cannot_be_addressed_is_refused(on_gpu):
    x, ones = torch.zeros(1).expand(2**15, 2**8, 16, 16, 1), torch.ones(2**8)
    for call in (
        lambda: blocked_ops.normalisation(x, len(x), None, None, EPS, MOMENTUM, None, None),
        lambda: blocked_ops.affine(x, len(x), ones, ones),
        lambda: blocked_ops.batch_norm_backward(x, x, len(x), ones, ones, None, True),
        lambda: blocked_ops.max_pool(x, len(x), (2, 2), (2, 2), (0, 0)),
    ):
        with pytest.raises(
            InvalidArgument, match=r"shape \(32768, 256, 16, 16\) has 2147483648 elements: .*; split the"
        ):
            call()
    assert not on_gpu.kernels


def test_a_missing_barrier_is_found(units):
    launcher = HostLauncher(units, Limits(16 << 10, multiprocessors=2))
    launcher.edit = lambda text: re.sub(r"__syncthreads\(\);", "", text)
    x = torch.randn(4, 3, 30, 34, 1)
    with on_host(launcher):
        try:
            found = [blocked_ops.normalisation(x, 4, None, None, EPS, 0.1, None, None)[0] for _ in range(3)]
        except Fault:
            return
    assert not all(close(mean, x.mean((0, 2, 3, 4)), 1e-3) for mean in found)


@pytest.mark.skipif(not nvrtc.libraries(), reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("vector", "pooling"), [(4, True), (2, True), (1, False)])
def test_registers_and_no_spills(vector, pooling, gpu):
    found = nvrtc.compile_for(blocked_ops._text(vector, pooling), gpu)
    assert len(found) == (10 if pooling else 6)
    for kernel, resources in found.items():
        assert resources.spilled_bytes == resources.stack_bytes == 0, (kernel, resources)
        # With 32 registers a multiprocessor holds all its threads; sums have several loads on their way in each.
        assert resources.registers <= (48 if kernel.endswith("_sums") else 32), (kernel, resources)


class Everything(nn.Module):
    """What is fused on a GPU, and some that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)])
        self.block = BasicBlock(8, 16, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm[0](self.stem(x)), inplace=True), 2)
        x = F.relu(self.norm[1](self.conv(x))) + 0.5 * F.silu(x)
        x = F.max_pool2d(self.block(x), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def network(monkeypatch, on_gpu):
    """Return a pruned network whose activations stay on the GPU that the CPU plays."""
    monkeypatch.setattr(blocked_kernels, "GPU", "cpu")
    monkeypatch.setattr("clicktrain.blocked.tensor.availability", lambda name: True)
    torch.manual_seed(0)
    model, assignments = Everything(), {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and name != "stem":
            index = torch.randint(0, 4, conv.weight.shape[:2], dtype=torch.uint8)
            index[torch.rand(index.shape) > 0.6] = PRUNED
            assignments[name] = Assignment(index, official_pool(4))
    convert(model, assignments, backend="cuda")
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    blocked.remove(twin)
    for layer in twin.modules():
        if isinstance(layer, PatternConv2d):
            layer.backend = "reference"
    return twin.double()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_state_equal_those_of_the_plain_network(network, training, on_gpu):
    twin = plain_copy(network)
    x, target = torch.randn(6, 3, 16, 16), torch.randint(0, 5, (6,))
    results = []
    for model in (network.train(training), twin.train(training)):
        inputs = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
        output = model(inputs)
        assert type(output) is Tensor
        F.cross_entropy(output, target).backward()
        assert type(inputs.grad) is Tensor
        results.append([output, inputs.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()])
    scale = max(float(t.double().norm()) for t in results[1][1:])
    for got, want in zip(*results, strict=True):
        assert float((got.double() - want.double()).detach().norm()) <= 1e-4 * max(
            float(want.double().norm()), 1e-2 * scale
        )
    fused = {"affine", "max_pool", "norm_gradient", "pooled_norm_gradient", "convolve"}
    assert on_gpu.kernels >= (fused | {"statistics"} if training else fused)


def test_what_torch_asks_cudnn_for_is_the_same(network):
    norm = network.norm[0]
    x, gradients = torch.randn(6, 8, 8, 8), []
    for ask in (F.batch_norm, torch.cudnn_batch_norm):
        inputs = x.clone().requires_grad_()
        packed, running = blocked.pack(inputs), (torch.zeros(8), torch.ones(8))
        assert isinstance(packed, BlockedTensor)
        if ask is F.batch_norm:
            y = ask(packed, *running, norm.weight, norm.bias, True, 0.1, EPS)
        else:
            y = ask(packed, norm.weight, norm.bias, *running, True, 0.1, EPS)[0]
        assert isinstance(y, BlockedTensor)
        y.relu().square().sum().backward()
        gradients.append([inputs.grad, norm.weight.grad, norm.bias.grad, *running])
        norm.weight.grad = norm.bias.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_write_to_the_memory_of_an_operand_does_not_reach_what_is_deferred(network):
    with torch.no_grad():
        x = blocked.pack(torch.randn(4, 8, 4, 4))
        y = network.norm[0].eval()(x)
        want = F.batch_norm(blocked.plain(x), *(getattr(network.norm[0], k) for k in ("running_mean", "running_var")),
                            network.norm[0].weight, network.norm[0].bias)  # fmt: skip
        x.mul_(2)
        x.view(-1).zero_()
        assert close(blocked.plain(y), want)
        assert not blocked.plain(x).any()
